"""The benchmark, and what it takes for granted of the training loop: one program, and nothing moved unasked."""

import contextlib
import dataclasses
import json
import pathlib
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuner_jax import config as config_lib
from nuner_jax import sharding, train
from nuner_jax.benchmark.measure import compilations
from nuner_jax.performance import costs, device_rates
from nuner_jax.performance.device_rates import Rate
from nuner_jax.tasks import make_task
from nuner_jax.writers import Console, read_metrics

SILENT = Console(active=False)


def tiny(rows_file, name="tiny", **changes):
    config = config_lib.load_file(f"tests/configs/{name}.py" + (f":{rows_file}" if name == "tiny" else ""))
    config.data.cache_dir = str(rows_file.parent / "cache")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def measured(rows_file, tmp_path_factory, run_python):
    """(figures, output) of the command on four devices."""
    out = tmp_path_factory.mktemp("benchmark") / "figures.json"
    done = run_python(
        "-m",
        "nuner_jax.benchmark",
        f"--config=tests/configs/tiny.py:{rows_file}",
        f"--config.data.cache_dir={rows_file.parent}/cache",
        "--config.data.prefetch=1",
        "--config.optim.accumulate=2",
        "--steps=3",
        "--warmup=1",
        f"--out={out}",
        f"--profile={out.parent}/trace",
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
        timeout=300,
    )
    return json.loads(out.read_text()), done.stdout


def test_a_benchmark_tells_floor_and_gap_part_by_part(measured):
    figures, _ = measured
    parts, step, rate = figures["parts"], figures["step"], figures["matrix_rate"]["per_second"]
    assert set(parts) == {
        "embeddings",
        "text tower, frozen",
        "text tower, trained",
        "concept tower",
        "loss",
        "optimizer",
    }
    operations = sum(part["forward_operations"] + part["backward_operations"] for part in parts.values())
    assert step["operations"] == operations
    assert step["mfu"] == pytest.approx(operations / (4 * rate * step["median"]))
    assert step["floor_seconds"] == pytest.approx(sum(part["floor_seconds"] for part in parts.values()))
    assert step["floor_share"] == pytest.approx(step["floor_seconds"] / step["median"])
    assert step["floor_seconds"] >= operations / (4 * rate), "no floor is under that of the products alone"
    assert parts["text tower, frozen"]["backward_operations"] == 0 < parts["optimizer"]["bytes"]
    assert figures["encoders"]["operations"] == pytest.approx(
        operations - parts["loss"]["forward_operations"] - parts["loss"]["backward_operations"]
    )


def test_it_tells_where_the_rest_of_the_time_goes(measured):
    figures, _ = measured
    assert 0 < figures["padding"]["step"] < 1
    assert 0 <= figures["with_loader"]["data_wait_share"] < 1
    assert figures["dispatch_seconds"] > 0 and figures["batch_seconds"] > 0
    assert figures["compilation"]["programs"] >= 1 and figures["compilation"]["seconds"] > 0
    assert figures["collectives"]["number"] > 0 and figures["collectives"]["seconds"] > 0
    assert figures["run"] == {"steps": 20, "seconds": pytest.approx(20 * figures["with_loader"]["median"])}
    assert 0 < figures["amounts"]["sequences"] <= figures["amounts"]["tokens"] <= 8 * 64


def test_the_file_has_what_it_takes_to_repeat_it_and_the_table_the_same_figures(measured):
    figures, output = measured
    assert figures["devices"] == "4 x cpu" and figures["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert figures["config"]["optim"]["accumulate"] == 2 and "-m nuner_jax.benchmark" in figures["command"]
    assert {"jax", "python", "nuner_jax"} <= set(figures["versions"])
    trace = pathlib.Path(shlex.split(figures["command"])[-1].partition("=")[2])
    assert list(trace.rglob("*.xplane.pb")), "--profile was given"
    for part in figures["parts"]:
        assert f"  {part} " in output
    assert f"{figures['step']['mfu']:.1%} (model FLOP utilisation)" in output
    assert f"{figures['with_loader']['data_wait_share']:.1%} of it waiting for data" in output


def test_too_few_steps_are_refused_before_anything_is_opened(run_python):
    done = run_python("-m", "nuner_jax.benchmark", "--config=configs/quickstart.py", "--steps=2", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --steps=2 --warmup=3: at least 3 steps are timed")
    assert done.stdout == ""


# --- What is true of the loop itself ----------------------------------------------------------


@contextlib.contextmanager
def transfers(guard: str):
    """In all threads, the one that makes batches among them, which a context of JAX's own would not reach."""
    before = jax.config.jax_transfer_guard
    jax.config.update("jax_transfer_guard", guard)
    try:
        yield
    finally:
        jax.config.update("jax_transfer_guard", before)


@pytest.mark.parametrize("name", ["tiny", "tagger"])
def test_the_loop_compiles_its_step_once_and_moves_nothing_unasked(rows_file, tmp_path, name):
    config = tiny(rows_file, name, steps=6)
    config.eval.every = config.checkpoint.every = 1000
    run, compiled = train.prepare(config, tmp_path, SILENT), []

    def step(state, batch):
        before = counted.programs
        after = run.train_step(state, batch)
        compiled.append((before, counted.programs))
        return after

    step.lower = run.train_step.lower  # the loop compiles the step before it calls it
    # Evaluations are no part of the step: they read what they print.
    watched = dataclasses.replace(run, train_step=step, task=without_evaluators(run.task))
    with compilations() as counted, transfers("disallow"):
        train.loop(watched, SILENT)
    programs, _ = compiled[0]
    assert programs >= 1, "the loop compiles before its first step"
    assert compiled == [(programs, programs)] * 6, "and nothing after that"


def without_evaluators(task):
    task.evaluators = dict
    return task


def test_a_step_that_moves_data_unasked_is_refused_by_the_loop(rows_file, tmp_path):
    run = train.prepare(tiny(rows_file, steps=2), tmp_path, SILENT)

    def step(state, batch):
        return run.train_step(state, jax.device_get(batch))

    step.lower = run.train_step.lower
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train.loop(dataclasses.replace(run, train_step=step), SILENT)


def test_the_log_of_training_tells_utilisation_and_what_it_is_a_share_of(rows_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "reference_matrix_rate", lambda dtype: Rate(1e9, f"a made-up rate of {dtype}"))
    config = tiny(rows_file, steps=3)
    config.eval.every = config.checkpoint.every = 1000
    run = train.prepare(config, tmp_path, SILENT)
    train.loop(dataclasses.replace(run, task=without_evaluators(run.task)), Console(active=True))
    operations = costs.total(run.task.costs().values()).operations
    output = capsys.readouterr().out
    assert (
        f"a step: {operations:.3g} operations; mfu is the share of 1e+09 a second and device, a made-up rate" in output
    )
    lines = [line for line in read_metrics(tmp_path) if "train/mfu" in line]
    assert len(lines) == 2, "not of the step that compiles"
    for line in lines:
        assert line["train/mfu"] == pytest.approx(operations / (8 * 1e9) / line["train/seconds_per_step"])
        assert f"mfu {line['train/mfu']:.1%}" in output


# --- What the tasks say of their costs --------------------------------------------------------


def closed_set(rows_file):
    config = config_lib.pretrain_classes()
    small = tiny(rows_file)
    config.data.sources = small.data.sources
    config.data.update({key: small.data[key] for key in config.data if key in small.data and key != "sources"})
    config.model.update({key: small.model[key] for key in config.model if key in small.model})
    config.classes.number, config.classes.min_mentions, config.eval.rows = 8, 1, 8
    return config


@pytest.mark.parametrize(
    "make", [tiny, closed_set, lambda file: tiny(file, "tagger")], ids=["pretrain", "classes", "ner"]
)
def test_tokens_need_no_more_than_is_computed_and_most_of_it_where_rows_are_full(rows_file, make):
    task = make_task(make(rows_file), sharding.make_mesh(8))
    batch = task.train_batch(0, np.arange)
    computed, useful = task.costs(), task.costs(batch)
    assert computed.keys() == useful.keys()
    for name, part in computed.items():
        assert useful[name].both.operations <= part.both.operations, name
    trained = next(name for name in computed if name.endswith("trained"))
    filled = np.mean(batch["segments"] > 0)
    share = useful[trained].both.operations / computed[trained].both.operations
    assert 0.5 * filled < share < filled, "attention to other segments is of no use, all else is where a token is"


# --- Rates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12)]
    + [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)]
    + [("NVIDIA H200", 989e12)],
)
def test_known_accelerators_have_the_peak_of_their_data_sheet(monkeypatch, kind, peak):
    class Device:
        device_kind = kind

    monkeypatch.setattr(device_rates.jax, "devices", lambda: [Device()])
    rate = device_rates.reference_matrix_rate("bfloat16")
    assert rate.per_second == peak and kind in rate.origin


def test_other_devices_are_measured():
    rate = device_rates.reference_matrix_rate(jnp.float32)
    assert rate.per_second > 1e6 and "float32 products of" in rate.origin
