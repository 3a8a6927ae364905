"""The training loop as its users meet it: processes that run, die, resume, and agree with each other."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nuner_jax import checkpoint
from nuner_jax.sharding import tree_paths
from nuner_jax.writers import read_metrics
from tests.free_port import free_port

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOPPED = 75  # the exit status of a run that was asked to stop, which the launch scripts start again


class Launcher:
    """Starts `python -m nuner_jax.train` on the tiny config, as a process of its own."""

    def __init__(self, rows_file, tmp_path):
        self.rows_file, self.tmp_path = rows_file, tmp_path

    def start(self, workdir, *flags, devices=1, config="tests/configs/tiny.py", env=None) -> subprocess.Popen:
        command = [sys.executable, "-m", "nuner_jax.train", f"--config={config}:{self.rows_file}"]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}", f"--config.data.cache_dir={self.rows_file.parent}/cache", *flags],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, workdir, *flags, code=0, **options) -> str:
        process = self.start(workdir, *flags, **options)
        output, _ = process.communicate(timeout=180)
        assert process.returncode == code, output
        return output


@pytest.fixture
def launch(rows_file, tmp_path):
    return Launcher(rows_file, tmp_path)


def final_state(workdir, name="params") -> dict[str, np.ndarray]:
    """The leaves of the latest checkpoint, by path."""
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    tree = checkpoint.load_params(workdir / "checkpoints" / str(max(steps)), name=name)
    return {path: np.asarray(leaf) for path, leaf in tree_paths(tree).items()}


def losses(workdir) -> np.ndarray:
    lines = [line for line in read_metrics(workdir) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step stands once"
    return np.array([line["train/loss"] for line in lines])


def wait_for_step(process, workdir, step):
    """Returns when the metrics of a step are on disk."""
    deadline = time.time() + 120
    while time.time() < deadline:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(workdir)):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise TimeoutError(f"no step {step} in {workdir}")


@pytest.fixture(scope="module")
def undisturbed(rows_file, tmp_path_factory):
    """A run of 20 steps on one device that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    output = Launcher(rows_file, workdir).run(workdir)
    return workdir, output


def test_a_run_learns_logs_and_keeps_its_config(undisturbed):
    workdir, output = undisturbed
    curve = losses(workdir)
    assert len(curve) == 20
    assert curve[-3:].mean() < curve[:3].mean() - 0.2
    evaluations = [line for line in read_metrics(workdir) if "retrieval/mrr" in line]
    assert [line["step"] for line in evaluations] == [0, 10, 20]
    assert evaluations[-1]["validation/loss"] < evaluations[0]["validation/loss"]
    assert "initialisation: random parameters of seed 0" in output
    assert json.loads((workdir / "config.json").read_text())["lr"] == 1e-3
    result = json.loads((workdir / "result.json").read_text())
    best = max(evaluations[1:], key=lambda line: line["retrieval/mrr"])
    assert result["step"] == best["step"]
    assert result["metrics"]["validation/loss"] == best["validation/loss"]
    assert set(result) >= {"command", "config", "seed", "data_fingerprint", "versions", "devices"}
    assert list((workdir / "tensorboard").iterdir())


def test_frozen_layers_do_not_change_and_take_no_optimizer_memory(undisturbed):
    workdir, _ = undisturbed
    first = checkpoint.load_params(workdir / "checkpoints" / "20")
    initial = initial_params(workdir)
    moments = final_state(workdir, "opt_state")
    frozen = [path for path in initial if path.startswith(("text/embeddings/", "text/layers/0/"))]
    trained = [path for path in initial if path.startswith(("text/layers/1/", "concept/"))]
    assert frozen and trained
    final = tree_paths(first)
    for path in frozen:
        np.testing.assert_array_equal(final[path], initial[path], err_msg=path)
        assert not any(path in moment for moment in moments), path
    for path in trained:
        assert not np.array_equal(final[path], initial[path]), path
        assert any(f"mu/{path}" in moment for moment in moments), path


def initial_params(workdir):
    """What the run's seed gives before the first step."""
    from nuner_jax import sharding
    from nuner_jax import workdir as workdir_lib
    from nuner_jax.tasks import make_task

    config = workdir_lib.read_config(workdir)
    config.mesh.data = 8
    task = make_task(config, sharding.make_mesh(8))
    return tree_paths(jax.jit(task.init_params)(jax.random.key(config.seed)))


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [3, 13])
def test_kill_9_at_any_step_then_resume_is_bit_identical(launch, undisturbed, tmp_path, kill_at):
    process = launch.start(tmp_path)
    wait_for_step(process, tmp_path, kill_at)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = launch.run(tmp_path)
    resumed = re.search(r"resumed at step (\d+)", output)
    assert (int(resumed[1]) if resumed else 0) <= kill_at + 2
    assert resumed or kill_at < 5, output
    for name in ("params", "opt_state"):
        expected, actual = final_state(undisturbed[0], name), final_state(tmp_path, name)
        assert expected.keys() == actual.keys()
        for path in expected:
            np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)
    np.testing.assert_array_equal(losses(tmp_path), losses(undisturbed[0]))


@pytest.mark.slow
def test_sigterm_saves_asks_for_a_new_start_and_resumes_on_another_mesh(launch, undisturbed, tmp_path):
    process = launch.start(tmp_path, "--config.checkpoint.every=1000")
    wait_for_step(process, tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == STOPPED, output
    assert re.search(r"SIGTERM: saved at step (\d+)", output)
    output = launch.run(tmp_path, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=8)
    assert "resumed at step" in output and "config changed since the last start: mesh.fsdp: 1 -> 2" in output
    expected, actual = final_state(undisturbed[0]), final_state(tmp_path)
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], atol=1e-5, rtol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_the_loss_curve_does_not_depend_on_the_mesh(launch, undisturbed, tmp_path, mesh):
    axes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    launch.run(tmp_path, *(f"--config.mesh.{axis}={size}" for axis, size in axes), devices=8)
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed[0]), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_as_one_and_stop_together(launch, undisturbed, tmp_path):
    port = free_port()
    workdir = tmp_path / "both"

    def start(*flags):
        cluster = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--config.mesh.fsdp=2"]
        return [launch.start(workdir, *cluster, f"--process_id={i}", *flags, devices=2) for i in range(2)]

    processes = start()
    wait_for_step(processes[0], workdir, 6)
    processes[1].send_signal(signal.SIGTERM)  # the notice reaches one host; both stop at the same step
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [STOPPED, STOPPED], outputs
    assert "SIGTERM: saved at step" in outputs[0]
    assert "training from step" in outputs[0] and "training from step" not in outputs[1], "only the first one tells"
    processes = start("--config.export=True")
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resumed at step" in outputs[0]
    assert (workdir / "export" / "model.safetensors").exists(), "the first process exports while the others have ended"
    np.testing.assert_allclose(losses(workdir), losses(undisturbed[0]), rtol=1e-4)
    expected, actual = final_state(undisturbed[0]), final_state(workdir)
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], atol=1e-5, rtol=1e-5, err_msg=path)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(launch, tmp_path):
    launch.run(tmp_path, "--config.steps=5")
    output = launch.run(tmp_path, "--config.steps=20", "--config.lr=1e30", "--config.optim.schedule=constant", code=2)
    assert re.search(r"error: (loss|grad_norm|param_norm) is (nan|inf) at step \d+: training stops", output), output
    assert f"The last good checkpoint is {tmp_path}/checkpoints/5" in output
    assert all(np.isfinite(leaf).all() for leaf in final_state(tmp_path).values())


def test_micro_batches_add_up_to_one_update(launch, tmp_path):
    output = launch.run(tmp_path, "--config.steps=4", "--config.optim.accumulate=4", "--config.eval.every=100")
    assert "batch: rows 2, " in output
    lines = [line for line in read_metrics(tmp_path) if "train/loss" in line]
    assert len(lines) == 4
    sequences = [line["train/sequences"] for line in lines]
    assert min(sequences) >= 8 and max(sequences) > 8, "the four micro-batches of a step are counted together"


def test_another_runs_checkpoint_is_a_start_without_its_optimizer(launch, undisturbed, tmp_path):
    output = launch.run(tmp_path, f"--config.checkpoint.init_from={undisturbed[0]}", "--config.steps=1")
    assert "initialisation: parameters of the checkpoint" in output
    first = read_metrics(tmp_path)[0]
    assert first["step"] == 0
    evaluations = [line for line in read_metrics(undisturbed[0]) if "retrieval/mrr" in line and line["step"]]
    best = max(evaluations, key=lambda line: line["retrieval/mrr"])
    for name in ("validation/loss", "retrieval/mrr"):
        assert first[name] == pytest.approx(best[name], rel=1e-5), name


def test_evaluate_repeats_the_numbers_of_training(undisturbed, run_python):
    workdir, _ = undisturbed
    done = run_python("-m", "nuner_jax.evaluate", f"--checkpoint={workdir}/checkpoints/20")
    metrics = json.loads(done.stdout.splitlines()[-1])
    trained = next(line for line in reversed(read_metrics(workdir)) if "retrieval/mrr" in line and line.pop("time"))
    for name, value in trained.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
