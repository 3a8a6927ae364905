"""The frozen half, once: the same step with less to compute, and a file that is there only when it is whole."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuner_jax import checkpoint, sharding, train
from nuner_jax import config as config_lib
from nuner_jax.aot import compile as aot_compile
from nuner_jax.aot import sizing
from nuner_jax.config import pretrain_classes
from nuner_jax.errors import NunerError
from nuner_jax.models import params as params_lib
from nuner_jax.sharding import tree_paths
from nuner_jax.state import combine, partition
from nuner_jax.tasks import frozen_half, make_task
from nuner_jax.writers import Console
from tests.free_port import free_port
from tests.full_disk import file_size_limit


class Said(Console):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(False)
        self.lines = []

    def say(self, line=""):
        self.lines.append(line)

    def frozen(self) -> str:
        """The one line about frozen layers."""
        (line,) = [line for line in self.lines if line.startswith("frozen layers:")]
        return line


def tiny(rows_file, cache):
    config = config_lib.load_file(f"tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(cache)
    config.model.keep_frozen = True
    return config


@pytest.fixture(scope="module")
def tokenised(rows_file, tmp_path_factory):
    """A cache with the tokenised rows, and nothing frozen in it."""
    cache = tmp_path_factory.mktemp("tokenised")
    make_task(tiny(rows_file, cache), sharding.make_mesh(8))
    return cache


@pytest.fixture
def config(rows_file, tokenised, tmp_path):
    """The tiny config, its frozen layers kept in a cache of its own."""
    return tiny(rows_file, shutil.copytree(tokenised, tmp_path / "cache"))


@pytest.fixture(scope="module")
def first(rows_file, tokenised, tmp_path_factory):
    """(config, run, what was said of it) of a run that has not begun; its state and its cache are left alone."""
    folder = tmp_path_factory.mktemp("first")
    config = tiny(rows_file, shutil.copytree(tokenised, folder / "cache"))
    return config, *prepared(config, folder / "run")


@pytest.fixture
def copied(first, tmp_path):
    """The same config with a copy of that cache."""
    return changed(first[0], data__cache_dir=str(shutil.copytree(first[0].data.cache_dir, tmp_path / "copied")))


def changed(config, **changes):
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return other


def prepared(config, workdir):
    """A run that has not begun, and what was said of it."""
    said = Said()
    return train.prepare(config, workdir, said), said


def vectors_of(run):
    """What is kept of all tokens: float32 [T, D]."""
    return np.array(run.task.loader.frozen_TxD, np.float32)


def kept_files(config):
    return {path.name: path for path in frozen_folder(config).iterdir() if path.suffix == ".bfloat16"}


def frozen_folder(config):
    return pathlib.Path(config.data.cache_dir) / "frozen"


# --- The same step ------------------------------------------------------------------------------


def first_batch(run):
    """The only micro-batch of the first step."""
    return jax.tree.map(lambda x: x[0], train.global_batch(run, 0))


def test_a_step_with_kept_vectors_is_the_step_computed_whole(first):
    _, run, _ = first
    trained, frozen = partition(run.state.params, run.task.is_frozen)

    @jax.jit
    def loss_and_gradients(batch):
        return jax.value_and_grad(lambda part: run.task.sums(combine(part, frozen), batch, None)["loss"])(trained)

    batch = first_batch(run)
    kept = batch.pop("frozen")
    assert kept.dtype == jnp.bfloat16 and kept.shape == (8, 64, 64)
    assert not np.any(np.asarray(kept)[np.asarray(batch["segments"]) == 0])
    towers = params_lib.merge(run.task._graphdef, run.state.params)
    exact = towers.frozen_vectors(batch["tokens"], batch["segments"])
    loss, gradients = loss_and_gradients(batch)
    # The path itself changes nothing; what is kept is rounded, each number by 2**-9 of itself at most.
    for given, tolerance in ((exact, 1e-4), (kept, 2e-2)):
        near, nearly = loss_and_gradients(batch | {"frozen": given})
        assert float(near) == pytest.approx(float(loss), rel=tolerance / 10)
        for path, gradient in gradients.items():
            error = np.linalg.norm(nearly[path] - gradient)
            assert error <= tolerance * np.linalg.norm(gradient) + 1e-5, path


def test_the_layers_above_keep_their_dropout(first):
    _, run, _ = first
    batch = first_batch(run)
    vectors = jax.jit(lambda key: run.task.vectors(run.state.params, batch, key)[0])
    one, same, other = (np.asarray(vectors(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)


def test_another_mesh_makes_the_same_vectors_and_the_same_loss(first, config, tmp_path):
    _, here, _ = first
    split, said = prepared(changed(config, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), tmp_path / "run")
    assert "computed in" in said.frozen()
    np.testing.assert_allclose(vectors_of(split), vectors_of(here), rtol=2**-7, atol=1e-5)
    losses = [jax.jit(run.task.sums)(run.state.params, first_batch(run), None)["loss"] for run in (here, split)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(config, tmp_path):
    config, finals = changed(config, steps=8, checkpoint__every=3), []
    for name, cut_at in (("whole", None), ("cut", 5)):
        with contextlib.suppress(KeyboardInterrupt):
            looped(config, tmp_path / name, cut_at)
        if cut_at:
            said = looped(config, tmp_path / name, None)
            assert "found there" in said.frozen() and "initialisation: resumed at step 3" in "\n".join(said.lines)
        finals.append(tree_paths(checkpoint.load_params(tmp_path / name / "checkpoints" / "8")))
    for path, leaf in finals[0].items():
        np.testing.assert_array_equal(finals[1][path], leaf, err_msg=path)


def looped(config, workdir, cut_at):
    """Trains without evaluations; with `cut_at`, as if Ctrl-C was pressed at this step."""
    run, said = prepared(config, workdir)
    run.task.evaluators = dict
    steps = []

    def step(state, batch):
        steps.append(batch)
        if len(steps) == cut_at:
            raise KeyboardInterrupt
        return run.train_step(state, batch)

    step.lower = run.train_step.lower
    train.loop(dataclasses.replace(run, train_step=step), said)
    return said


# --- Less to compute ----------------------------------------------------------------------------


def test_what_is_kept_costs_nothing_and_is_compiled_into_nothing(config):
    figures, said = [], []
    for keep in (False, True):
        config.model.keep_frozen = keep
        figures += aot_compile.compile_all(config, ["cpu:8"], {}, None, said.append)
    whole, kept = (one["operations"] for one in figures)
    assert whole["parts"].pop("text tower, frozen") > 0
    assert kept["parts"].pop("text tower, frozen") == 0
    assert kept["parts"] == whole["parts"]
    assert kept["compiled"] < whole["compiled"]
    saved = (whole["model"] - kept["model"]) / 8
    assert whole["compiled"] - kept["compiled"] == pytest.approx(saved, rel=0.2)
    assert figures[1]["batch"]["frozen"] == [1, 8, 64, 64] and "frozen" not in figures[0]["batch"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_as_stated_is_the_one_that_training_has(config, accumulate):
    config.data.rows, config.optim.accumulate = 8 * accumulate, accumulate
    mesh = sharding.make_mesh(8)
    task = make_task(config, mesh)
    stated = {key: getattr(task.loader.shapes, key) for key in sizing.STATED}
    sized = sizing.Sized(config, mesh, stated)
    assert sized.abstract_batch() == sizing.batch_shapes(task, mesh)
    assert sized.costs() == task.costs()
    assert task.costs()["embeddings"].both.activation_bytes > 0, "of the concept tower"
    assert not frozen_folder(config).exists(), "to look at shapes computes nothing"


def test_a_step_without_the_vectors_does_not_go_unnoticed(config):
    task = make_task(config, sharding.make_mesh(8))
    batch = task.train_batch(0, np.arange)
    assert np.isnan(batch["frozen"][batch["segments"] > 0].astype(np.float32)).all()


# --- The file -----------------------------------------------------------------------------------


def test_a_second_start_finds_what_the_first_one_computed(first, copied, tmp_path):
    config, run, said = first
    ((name, path),) = kept_files(config).items()
    tokens = run.task.corpus.tokens_T.size
    assert f"the vectors of {tokens:,} tokens, " in said.frozen()
    assert "computed in" in said.frozen() and str(path) in said.frozen()
    assert path.stat().st_size == tokens * 64 * 2
    before = {name: path.stat().st_mtime_ns for name, path in kept_files(copied).items()}
    _, said = prepared(changed(copied, model__dropout=0.3, lr=0.1), tmp_path / "run")
    assert "found there" in said.frozen()
    assert {name: path.stat().st_mtime_ns for name, path in kept_files(copied).items()} == before


def test_other_parameters_or_layers_or_data_have_a_file_of_their_own(copied, rows_file, tmp_path):
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:200]))
    (before,) = kept_files(copied).values()
    content = before.read_bytes()
    others = {"seed": 1, "model__frozen_layers": 2, "data__sources__rows__path": str(fewer)}
    for count, (key, value) in enumerate(others.items(), start=2):
        _, said = prepared(changed(copied, **{key: value}), tmp_path / key)
        assert "computed in" in said.frozen(), key
        assert len(kept_files(copied)) == count, key
    assert before.read_bytes() == content, "older ones are left alone"


KILLED = """
import os, pathlib, signal, sys
from nuner_jax import config, train
from nuner_jax.tasks import frozen_half
from nuner_jax.writers import Console
frozen_half._TOKENS_AT_ONCE, real, pieces = 1000, frozen_half._piece, []
def piece(*args):
    pieces.append(args)
    if len(pieces) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
frozen_half._piece = piece
rows, cache, workdir = sys.argv[1:]
config = config.load_file(f"tests/configs/tiny.py:{rows}")
config.data.cache_dir = cache
config.model.keep_frozen = True
train.prepare(config, pathlib.Path(workdir), Console(False))
"""


def test_a_filling_that_was_killed_does_not_count(config, rows_file, tmp_path):
    command = [sys.executable, "-c", KILLED, str(rows_file), config.data.cache_dir, str(tmp_path / "killed")]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=180, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not kept_files(config) and list(frozen_folder(config).glob("*.partial"))
    run, said = prepared(config, tmp_path / "run")
    assert "computed in" in said.frozen()
    assert len(kept_files(config)) == 1 and not list(frozen_folder(config).glob("*.partial"))
    assert np.isfinite(vectors_of(run)).all()


def test_a_file_that_was_cut_off_is_filled_anew_and_many_pieces_give_the_vectors_of_one(
    first, copied, tmp_path, monkeypatch
):
    (path,) = kept_files(copied).values()
    os.truncate(path, path.stat().st_size - 1)
    monkeypatch.setattr(frozen_half, "_TOKENS_AT_ONCE", 1000)
    run, said = prepared(copied, tmp_path / "run")
    assert "computed in" in said.frozen()
    np.testing.assert_allclose(vectors_of(run), vectors_of(first[1]), rtol=2**-7, atol=1e-5)


def test_a_disk_that_fills_up_meanwhile_is_named_and_nothing_is_left(config, tmp_path):
    with file_size_limit(1_000_000), pytest.raises(NunerError, match=r"\.bfloat16: cannot be written"):
        prepared(config, tmp_path / "run")
    assert [file.suffix for file in frozen_folder(config).iterdir()] == [".lock"]


# --- Refusals -----------------------------------------------------------------------------------


def test_too_little_free_space_is_told_before_anything_is_computed(config, tmp_path, monkeypatch):
    space = shutil._ntuple_diskusage
    monkeypatch.setattr("shutil.disk_usage", lambda path: space(10**12, 0, 1000 if path.name == "frozen" else 10**12))
    with pytest.raises(NunerError) as refused:
        prepared(config, tmp_path / "run")
    assert (
        "cache/frozen: 1.0 kB are free, and 1.9 MB are needed for what config.model.keep_frozen keeps; free some"
        in (str(refused.value))
    )
    assert "move config.data.cache_dir to another disk, or set config.model.keep_frozen to False" in str(refused.value)


def test_nothing_frozen_is_refused_before_the_data_is_opened(config, tmp_path):
    config.model.frozen_layers = 0
    config.data.sources.rows.path = "nowhere.jsonl"
    with pytest.raises(NunerError, match=r"config\.model\.keep_frozen = True with config\.model\.frozen_layers = 0"):
        prepared(config, tmp_path / "run")


def test_other_tasks_do_not_have_the_key():
    assert "keep_frozen" not in pretrain_classes().model
    assert "keep_frozen" not in config_lib.finetune().model


@pytest.mark.slow
@pytest.mark.multiprocess
def test_several_processes_are_refused(config, rows_file, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "nuner_jax.train", f"--config=tests/configs/tiny.py:{rows_file}"]
    command += [f"--workdir={tmp_path}/run", f"--config.data.cache_dir={config.data.cache_dir}"]
    command += ["--config.model.keep_frozen", "--config.data.rows=16", "--config.eval.rows=16"]
    command += ["--config.data.row_multiple=16", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen([*command, f"--process_id={i}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert "config.model.keep_frozen = True needs one process, and these are 2: set it to False" in output
