"""The numbers of a run: on disk once per step, on the terminal as a person reads them, and stopped at a NaN."""

from __future__ import annotations

import json
import struct
import types

import jax.numpy as jnp
import pytest

from nuner_jax import progress as progress_lib
from nuner_jax.errors import NunerError
from nuner_jax.progress import Progress
from nuner_jax.writers import METRICS_FILE, Console, MetricWriter, NoWriter, duration, plot_training, read_metrics


def write(workdir, steps, resumed_at=None, offset=0.0) -> None:
    writer = MetricWriter(workdir, resumed_at)
    for step in steps:
        writer.write(step, {"train/loss": 10 - step + offset})
    writer.close()


def board_events(workdir) -> list[tuple[str, int]]:
    """What the TensorBoard files hold, in order: (name of a scalar, step), and ("start", step) of each start."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, event, its checksum
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            found += [("start", event.step)] if event.session_log.status == SessionLog.START else []
            content = content[16 + size :]
    return found


def test_metrics_are_read_as_they_were_written(tmp_path):
    writer = MetricWriter(tmp_path, None)
    writer.write(3, {"train/loss": jnp.float32(0.5), "train/tokens": 7})
    [line] = read_metrics(tmp_path)  # before it is closed: a killed run loses nothing
    writer.close()
    assert line.pop("time") > 1.7e9
    assert line == {"step": 3, "train/loss": 0.5, "train/tokens": 7.0}
    assert board_events(tmp_path) == [("start", 0), ("train/loss", 3), ("train/tokens", 3)]


def test_a_resumed_run_takes_away_the_steps_that_it_does_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    [events] = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1"))  # files are named by the second they are made in
    write(tmp_path, [3, 4, 5], resumed_at=2, offset=0.25)
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [
        (1, 9),
        (2, 8),
        (3, 7.25),
        (4, 6.25),
        (5, 5.25),
    ]
    loss = "train/loss"
    before, again = [(loss, 1), (loss, 2), (loss, 3), (loss, 4)], [(loss, 3), (loss, 4), (loss, 5)]
    assert board_events(tmp_path) == [("start", 0), *before, ("start", 3), *again], (
        "TensorBoard hides what is after a start"
    )
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [METRICS_FILE]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1], offset=0.25)
    assert [line["train/loss"] for line in read_metrics(tmp_path)] == [9.25]


def test_resuming_a_run_without_metrics_starts_them(tmp_path):
    write(tmp_path, [8], resumed_at=7)
    assert [line["step"] for line in read_metrics(tmp_path)] == [8]


@pytest.mark.parametrize("resumed_at", [2, 5])
def test_a_last_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path, resumed_at):
    write(tmp_path, [1, 2])
    path = tmp_path / METRICS_FILE
    whole = path.read_text()
    for cut in (1, 5, 30):
        path.write_text(whole + whole.splitlines()[-1][:-cut])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, [6], resumed_at=resumed_at)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 6]
    assert all(json.loads(line) for line in path.read_text().splitlines()), "nothing of it is left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_are_said_as_a_person_does(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_plot_is_a_picture_of_both_curves(tmp_path, evaluated, recwarn):
    writer = MetricWriter(tmp_path, None)
    for step in range(1, 50):
        writer.write(step, {"train/loss": 5 / step})
        if evaluated and step % 10 == 0:
            writer.write(step, {"validation/loss": 6 / step, "retrieval/top1": step / 90, "retrieval/mrr": step / 60})
    writer.close()
    plot_training(tmp_path, tmp_path / "training.png")
    content = (tmp_path / "training.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1200, 480)
    assert len(content) > 15_000
    assert not [str(w.message) for w in recwarn if "legend" in str(w.message).lower()]


def test_a_process_that_is_not_the_first_says_nothing(capsys):
    console = Console(active=False)
    console.say("hello")
    console.progress("step 1", final=True)
    NoWriter().write(1, {"train/loss": 1.0})
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_only_final_lines_are_printed(capsys):
    console = Console(active=True)
    console.progress("step 1", final=False)
    console.progress("step 2", final=True)
    console.say("done")
    assert capsys.readouterr() == ("step 2\ndone\n", "")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress_lib, "time", types.SimpleNamespace(perf_counter=lambda: self.now))


class Run:
    """A run of steps of known length and loss, watched by Progress."""

    def __init__(self, workdir, clock, *, log_every=4, total=100, compile_seconds=50.0, full_rate_seconds=0.5):
        self.workdir, self.clock, self.compile_seconds = workdir, clock, compile_seconds
        self.waited, self.step = 0.0, 0
        self.writer = MetricWriter(workdir, None)
        self.progress = Progress(
            step=0,
            total=total,
            log_every=log_every,
            counts=("tokens",),
            full_rate_seconds=full_rate_seconds,
            waited=lambda: self.waited,
            last_good=lambda: "The last good checkpoint is number 7.",
            writer=self.writer,
            console=Console(active=True),
        )

    def steps(self, number, *, seconds=2.0, waited=0.5, loss=None, grad_norm=1.0, param_norm=9.0) -> None:
        """The device takes `seconds` a step, of which the host waited for data; the first one compiles besides."""
        for _ in range(number):
            self.step += 1
            loss = float(self.step) if loss is None else loss
            values = {"loss": loss, "grad_norm": grad_norm, "param_norm": param_norm, "tokens": 300}
            metrics = {name: jnp.float32(value) for name, value in values.items()}
            self.progress.step(self.step, metrics)  # waits for the step before
            self.clock.now += seconds + (self.compile_seconds if self.step == 1 else 0)
            self.waited += waited
            loss = None

    def lines(self) -> list[dict[str, float]]:
        return [{k.removeprefix("train/"): v for k, v in line.items()} for line in read_metrics(self.workdir)]


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_lines_hold_means_over_their_interval_and_rates_without_compiling(tmp_path, clock):
    run = Run(tmp_path, clock)
    run.steps(8)
    run.progress.flush()
    first, second = run.lines()
    assert (first["step"], second["step"]) == (4, 8)
    assert (first["loss"], second["loss"]) == (2.5, 6.5)
    assert first["tokens"] == second["tokens"] == 300
    for line in (first, second):
        assert line["seconds_per_step"] == pytest.approx(2)
        assert line["tokens_per_second"] == pytest.approx(150)
        assert line["data_wait_share"] == pytest.approx(0.25)
        assert line["mfu"] == pytest.approx(0.25)
    assert first["grad_norm"] == 1 and first["param_norm"] == 9


def test_a_line_per_step_has_true_rates_and_none_of_the_step_that_compiled(tmp_path, clock):
    run = Run(tmp_path, clock, log_every=1)
    run.steps(3)
    run.progress.flush()
    first, *others = run.lines()
    assert first["loss"] == 1 and "tokens_per_second" not in first and "seconds_per_step" not in first
    assert [line["tokens_per_second"] for line in others] == [pytest.approx(150)] * 2


def test_evaluation_does_not_count_as_training(tmp_path, clock):
    run = Run(tmp_path, clock)
    run.steps(6)
    run.progress.flush()
    with run.progress.paused():
        clock.now += 1000
        run.progress.evaluated(6, {"validation/loss": 4.0})
    run.steps(2)
    run.progress.flush()
    first, evaluation, second = run.lines()
    assert evaluation["validation/loss"] == 4
    assert first["seconds_per_step"] == second["seconds_per_step"] == pytest.approx(2)


def test_metrics_are_fetched_a_step_late_and_the_last_at_the_end(tmp_path, clock):
    run = Run(tmp_path, clock, log_every=1, total=3)
    run.steps(1)
    assert run.lines() == []
    run.steps(2)
    assert [line["step"] for line in run.lines()] == [1, 2]
    run.progress.flush()
    run.progress.flush()
    assert [line["step"] for line in run.lines()] == [1, 2, 3]


def test_the_last_step_is_logged_off_the_beat(tmp_path, clock):
    run = Run(tmp_path, clock, total=6)
    run.steps(6)
    run.progress.flush()
    assert [(line["step"], line["loss"]) for line in run.lines()] == [(4, 2.5), (6, 5.5)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": float("nan")}, "loss is nan at step 5"),
        ({"param_norm": float("inf")}, "param_norm is inf at step 5"),
        ({"grad_norm": float("inf")}, "grad_norm is inf at step 5"),
    ],
)
def test_a_value_that_is_not_finite_stops_the_run_with_its_step(tmp_path, clock, values, message):
    run = Run(tmp_path, clock, log_every=1)
    run.steps(4)
    run.steps(1, **values)
    with pytest.raises(NunerError, match=f"{message}: training stops. The last good checkpoint is number 7."):
        run.steps(1)
    assert [line["step"] for line in run.lines()] == [1, 2, 3, 4], "nothing of the bad step is written"


def test_the_line_for_the_terminal_tells_step_loss_rate_and_time_left(tmp_path, clock, capsys):
    run = Run(tmp_path, clock, total=1004)
    run.steps(4)
    run.progress.flush()
    assert capsys.readouterr().out == "step 4/1,004  loss 4.0000  2 s/step  150 tokens/s  mfu 25.0%  33 min 20 s left\n"


def test_where_the_matrix_rate_is_unknown_nothing_is_said_of_it(tmp_path, clock, capsys):
    run = Run(tmp_path, clock, full_rate_seconds=None)
    run.steps(4)
    run.progress.flush()
    assert "mfu" not in run.lines()[0] and "mfu" not in capsys.readouterr().out
