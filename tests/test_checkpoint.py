"""Checkpoints as files: cut off, missing, of another model, too large for the disk, read on other devices."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from nuner_jax import checkpoint, evaluate, export
from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError
from nuner_jax.folders import local_path, writing
from nuner_jax.state import TrainState
from nuner_jax.train import train
from nuner_jax.writers import read_metrics
from tests.full_disk import file_size_limit


@pytest.fixture(scope="module")
def make_config(rows_file, root):
    """Makes the tiny config, with a checkpoint at every step."""

    def make(steps: int):
        config = config_lib.load_file(f"{root}/tests/configs/tiny.py:{rows_file}")
        config.data.cache_dir = str(rows_file.parent / "cache")
        config.steps, config.checkpoint.every, config.eval.every = steps, 1, 100
        return config

    return make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A run with the checkpoints of steps 1 and 2; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    train(make_config(2), workdir)
    assert steps_of(workdir) == [1, 2]
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


def steps_of(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def cut(folder, name):
    """Cuts a file of a checkpoint to half; of several of this name pattern, the largest."""
    path = max(folder.glob(name), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = ["params/ocdbt.process_0/d/*", "params/manifest.ocdbt", "params/_METADATA", "opt_state/_METADATA"]


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_told_in_a_line_and_deleting_it_resumes_from_the_one_before(
    make_config, run, name, capsys
):
    folder = run / "checkpoints" / "2"
    cut(folder, name)
    with pytest.raises(NunerError) as error:
        train(make_config(2), run)
    message = str(error.value)
    assert message.startswith(f"cannot read the checkpoint {folder}: ")
    assert message.endswith(f"; delete {folder} to resume from step 1")
    assert len(message) < 400 + 2 * len(str(folder)) and "\n" not in message and "registry" not in message
    if name == DAMAGE[0]:
        shutil.rmtree(folder)
        train(make_config(2), run)
        assert "resumed at step 1" in capsys.readouterr().out
        assert [line["step"] for line in read_metrics(run) if "train/loss" in line] == [1, 2]


def test_a_damaged_checkpoint_that_is_the_only_one_is_to_be_deleted_too(make_config, run):
    shutil.rmtree(run / "checkpoints" / "1")
    cut(run / "checkpoints" / "2", "params/manifest.ocdbt")
    with pytest.raises(NunerError, match=r"; delete .*/checkpoints/2 to start afresh$"):
        train(make_config(2), run)


def test_reading_a_damaged_checkpoint_names_the_others(run):
    folder = run / "checkpoints" / "2"
    cut(folder, "params/_METADATA")
    with pytest.raises(NunerError, match=r"the sizes of its params cannot be read; .*/checkpoints/1$"):
        checkpoint.load_params(folder)
    cut(folder, "_CHECKPOINT_METADATA")
    with pytest.raises(NunerError, match=r"what model it holds .*/checkpoints/1$"):
        export.export(folder, run / "out")
    assert not (run / "out").exists()


def test_metrics_of_a_checkpoint_that_are_damaged_are_told_by_training_and_export(make_config, run):
    cut(run / "checkpoints" / "2", "metrics/*")
    for use in (lambda: train(make_config(2), run), lambda: checkpoint.resolve(str(run))):
        with pytest.raises(NunerError, match=f"cannot open the checkpoints {run}/checkpoints: .*delete that step"):
            use()


def test_a_start_from_another_model_hints_at_init_from(make_config, finished, tmp_path):
    config = make_config(1)
    config.checkpoint.init_from, config.model.encoder.intermediate_size = str(finished), 96
    with pytest.raises(NunerError, match="config.checkpoint.init_from") as error:
        train(config, tmp_path)
    assert "--workdir" not in str(error.value) and "leaves differ" in str(error.value)


def test_parameters_from_another_run_are_those_that_training_starts_from(make_config, finished, tmp_path):
    config = make_config(0)
    config.checkpoint.init_from = str(finished / "checkpoints" / "1")
    train(config, tmp_path)
    theirs, ours = (checkpoint.load_params(path / "checkpoints" / step) for path, step in
                    ((finished, "1"), (tmp_path, "0")))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("limit", [100_000, 1_000_000], ids=["tokenizer", "weights"])
def test_an_export_to_a_full_disk_leaves_the_earlier_one_whole(finished, tmp_path, limit):
    folder, out = finished / "checkpoints" / "2", tmp_path / "model"
    export.export(folder, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with file_size_limit(limit), pytest.raises(NunerError, match="cannot write the .*model"):
        export.export(folder, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_an_export_without_the_runs_tokenizer_says_so(run):
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(NunerError, match=r"run/tokenizer does not exist"):
        export.export(run / "checkpoints" / "2", run / "out")


MB = 10**6
STATE = TrainState(None, {"kernel": jax.ShapeDtypeStruct((MB // 4,), np.float32)}, None)


def free_space(monkeypatch, count):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100 * MB, 100 * MB - count, count))


def test_a_run_that_began_needs_space_only_for_the_checkpoints_to_come(tmp_path, monkeypatch):
    free_space(monkeypatch, 3 * MB)
    with pytest.raises(NunerError, match=r"3\.0 MB are free, and 4\.0 MB are needed for 4 checkpoints of 1\.0 MB"):
        checkpoint.check_space(tmp_path, STATE, keep=2)
    for step in ("5", "10", "15"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    free_space(monkeypatch, MB)
    checkpoint.check_space(tmp_path, STATE, keep=2)
    free_space(monkeypatch, MB // 2)
    with pytest.raises(
        NunerError, match=r"500\.0 kB are free, and 1\.0 MB are needed for 1 more checkpoint of 1\.0 MB"
    ):
        checkpoint.check_space(tmp_path, STATE, keep=2)
    partial = tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp" / "params"
    partial.mkdir(parents=True)
    (partial / "data").write_bytes(bytes(MB // 2))  # Orbax deletes what an interrupted save left
    checkpoint.check_space(tmp_path, STATE, keep=2)


def test_a_run_on_more_devices_than_there_are_is_evaluated_with_the_same_numbers(run):
    trained = next(line for line in reversed(read_metrics(run)) if "retrieval/mrr" in line)
    config = json.loads((run / "config.json").read_text())
    config["mesh"] |= {"data": 4, "fsdp": 4}
    (run / "config.json").write_text(json.dumps(config))
    metrics = evaluate.evaluate(str(run))
    assert metrics["step"] == trained["step"] == 2
    for name in ("validation/loss", "retrieval/mrr"):
        assert metrics[name] == pytest.approx(trained[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("mesh", "rows", "expected"),
    [
        ((-1, 1, 1), (16, 8, 8), (8, 1, 1)),
        ((2, 2, 2), (4, 4, 4), (2, 2, 2)),
        ((4, 1, 1), (16, 8, 8), (8, 1, 1)),
        ((2, 1, 1), (16, 2, 4), (2, 1, 1)),
        ((-1, 1, 1), (12, 4, 8), (4, 1, 1)),
        ((-1, 1, 1), (8, 8, 9), (1, 1, 1)),
    ],
    ids=str,
)
def test_evaluation_takes_the_runs_mesh_or_as_many_devices_as_its_rows_split_over(make_config, mesh, rows, expected):
    config = make_config(1)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    config.eval.rows, config.data.row_multiple, config.data.rows = rows
    assert tuple(evaluate._mesh(config).shape.values()) == expected


def test_a_config_cut_off_is_named(run):
    path = run / "config.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(NunerError, match=r"run/config\.json cannot be read"):
        evaluate.evaluate(str(run))


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run"])
def test_the_address_of_a_bucket_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (local_path, checkpoint.resolve, evaluate.evaluate):
        with pytest.raises(NunerError, match=f"{address}: .*mount the bucket"):
            use(address)
    assert os.listdir(tmp_path) == []
    assert local_path("run") == tmp_path / "run"


def raising(error):
    def fail(_):
        raise error

    return fail


def write_below_a_file(folder):
    (folder / "file").write_text("")
    (folder / "file" / "below").mkdir(parents=True)


def write_too_much(folder):
    with file_size_limit(1000):
        (folder / "large").write_bytes(bytes(2000))


@pytest.mark.parametrize(
    ("fail", "hint"),
    [
        (write_below_a_file, "Not a directory: .*/file/below"),
        (write_too_much, "File too large"),
        (raising(OSError(errno.ENOSPC, "No space left on device", "/x/shard")), "No space left on device: /x/shard"),
        (raising(OSError(errno.EMFILE, "Too many open files")), "ulimit -n"),
        (raising(OSError("array_record: disk full")), "array_record: disk full"),
        (raising(shutil.Error([("a", "b", "[Errno 28] No space left on device")])), "No space left"),
    ],
    ids=["below a file", "too large", "full", "too many files", "no number", "copytree"],
)
def test_what_fails_in_writing_is_told_with_its_folder(tmp_path, fail, hint):
    with pytest.raises(NunerError, match=f"^{tmp_path}: cannot be written .*{hint}"), writing(tmp_path):
        fail(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "input.jsonl"),
        TimeoutError("timed out"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_about_writing_passes(tmp_path, error):
    with pytest.raises(type(error)) as raised, writing(tmp_path):
        raise error
    assert raised.value is error
