"""Bad input to training: each a clear error that names the thing, before anything is compiled or trained."""

import os
import re
import shutil
import stat

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nuner_jax import config as config_lib
from nuner_jax import pretrained
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import EncoderConfig
from nuner_jax.train import train
from nuner_jax.writers import read_metrics


@pytest.fixture
def config(rows_file, root):
    """The tiny config on eight devices."""
    config = config_lib.load_file(f"{root}/tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    return config


@pytest.fixture(scope="module")
def one_step(rows_file, root, tmp_path_factory):
    """The workdir of a run of one step; tests take copies of it."""
    config = config_lib.load_file(f"{root}/tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    config.steps = 1
    workdir = tmp_path_factory.mktemp("one_step")
    train(config, workdir)
    return workdir


@pytest.fixture
def trained(one_step, tmp_path):
    """A workdir of one's own with a checkpoint of step 1."""
    return shutil.copytree(one_step, tmp_path / "run")


def refused(config, workdir, monkeypatch) -> str:
    """The message with which training is refused; a train step that gets as far as being called fails the test."""

    def no_step(*_):
        raise AssertionError("the loop was reached")

    monkeypatch.setattr("nuner_jax.train.loop", no_step)
    with pytest.raises(NunerError) as error:
        train(config, workdir)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"data.sources.rows.path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data.rows": 12}, "config.data.rows / config.optim.accumulate = 12 cannot be split over the 8 devices"),
        (
            {"data.rows": 8, "optim.accumulate": 3},
            "config.data.rows = 8 is not a multiple of config.optim.accumulate = 3",
        ),
        ({"eval.rows": 4}, "config.eval.rows = 4 cannot be split over the 8 devices"),
        ({"data.row_multiple": 2}, "config.data.row_multiple = 2 cannot be split over the 8 devices"),
        ({"mesh.data": 3}, "does not fit 8 device(s)"),
        ({"mesh.tensor": 8}, "heads"),
        ({"model.frozen_layers": 3}, "config.model.frozen_layers: 3 of 2 layers"),
        ({"model.concept_pooling": "max"}, "config.model.concept_pooling: unknown 'max'; choose one of mean, first"),
        ({"model.tokenizer": "no/such/folder"}, "no/such/folder"),
        ({"model.encoder.vocab_size": 5000}, "5000"),
        ({"model.encoder.num_attention_heads": 5}, "num_heads"),
        ({"model.encoder.model_type": "gpt2"}, "gpt2"),
        ({"optim.schedule": "cosin"}, "config.optim.schedule: unknown 'cosin'; choose one of cosine"),
        ({"model.attention": "cudnn"}, "config.model.attention = 'cudnn' needs an NVIDIA GPU, and this is cpu"),
        ({"model.attention": "splash"}, "config.model.attention = 'splash' needs a TPU, and this is cpu"),
        ({"task": "pretraining"}, "config.task: unknown 'pretraining'; choose one of pretrain"),
        ({"checkpoint.init_from": "no/such/run"}, "no/such/run: no checkpoint there"),
        ({"mesh.rules": ((r"mlp/up/kernel$", ("data",)),)}, "mlp/up/kernel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_work_is_refused_by_name(config, tmp_path, monkeypatch, changes, hint):
    config.update_from_flattened_dict(changes)
    message = refused(config, tmp_path, monkeypatch)
    if hint == "heads":
        assert "layers/0/attention/out/kernel of shape (2, 32, 64) cannot be split into 8" in message
    else:
        assert hint in message


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "no"),
        (b'{"text": "Ann", "completion"', "invalid_json 1 (mine.jsonl:1)"),
        (b'{"some": "thing"}\n', "format"),
        (b'{"text": "Nothing here.", "completion": ""}\n' * 3, "entity"),
        (b"\x80\x81\n", "UTF-8"),
    ],
    ids=["empty", "cut off", "unknown format", "no entity", "not text"],
)
def test_a_data_file_that_cannot_be_used_is_named(config, tmp_path, monkeypatch, content, hint):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    config.data.sources.rows.path = str(path)
    message = refused(config, tmp_path / "run", monkeypatch)
    assert str(path) in message and hint.lower() in message.lower(), message


def write_encoder(folder, root, **sizes):
    """A random encoder with the sample's tokenizer, in Hugging Face form."""
    import jax
    from flax import nnx

    from nuner_jax.models.encoder import Encoder
    from nuner_jax.models.params import split

    shutil.copytree(root / config_lib.SAMPLE_TOKENIZER, folder)
    options = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64} | sizes
    encoder = EncoderConfig(
        model_type="roberta", vocab_size=8192, max_positions=66, position_offset=2, type_vocab_size=1, pad_token_id=1,
        **options,
    )  # fmt: skip
    _, params = split(Encoder(encoder, dtype=np.float32, rngs=nnx.Rngs(0)))
    pretrained.save_encoder(folder, encoder, jax.device_get(params))
    return folder


@pytest.fixture
def encoders(config, root, tmp_path):
    """The config with pretrained towers: two folders of this machine."""
    config.model.init = "pretrained"
    config.model.text = str(write_encoder(tmp_path / "text", root))
    config.model.concept = str(write_encoder(tmp_path / "concept", root))
    config.model.tokenizer = None
    return config


def test_weights_of_another_shape_missing_and_unused_ones_are_all_named(encoders, tmp_path, monkeypatch):
    path = tmp_path / "concept" / "model.safetensors"
    weights = load_file(path)
    weights["encoder.layer.0.attention.self.query.weight"] = np.zeros((16, 32), np.float32)
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    message = refused(encoders, tmp_path / "run", monkeypatch)
    assert str(path.parent) in message
    assert "encoder.layer.0.attention.self.query.weight" in message and "[16, 32]" in message
    assert "encoder.layer.1.output.dense.bias" in message


def test_towers_of_different_width_are_refused(encoders, root, tmp_path, monkeypatch):
    encoders.model.concept = str(write_encoder(tmp_path / "wide", root, hidden_size=64))
    assert "the text tower is 32 wide and the concept tower 64" in refused(encoders, tmp_path / "run", monkeypatch)


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(encoders, minilm_folder, tmp_path, monkeypatch):
    encoders.model.tokenizer = str(minilm_folder)
    message = refused(encoders, tmp_path / "run", monkeypatch)
    assert "30,522" in message.replace("30522", "30,522") or "pad" in message


def test_towers_with_different_tokenizers_are_refused(encoders, root, tmp_path, monkeypatch):
    from nuner_jax.data.tokenizer import train_tokenizer

    train_tokenizer(["sample"], tmp_path / "concept", 600)
    message = refused(encoders, tmp_path / "run", monkeypatch)
    assert f"{tmp_path}/text and {tmp_path}/concept have different tokenizers" in message


def test_data_that_changed_since_the_checkpoint_is_refused(config, trained, rows_file, tmp_path, monkeypatch):
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:300]))
    config.data.sources.rows.path = str(fewer)
    message = refused(config, trained, monkeypatch)
    assert f"the training data is not that of the checkpoint {trained}/checkpoints/1" in message
    assert "init_from" in message


def test_a_weights_file_cut_off_is_named(encoders, tmp_path, monkeypatch):
    path = tmp_path / "text" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused(encoders, tmp_path / "run", monkeypatch)


def test_a_checkpoint_of_another_model_names_every_leaf_that_differs(config, trained, monkeypatch):
    config.model.encoder.intermediate_size = 96
    message = refused(config, trained, monkeypatch)
    assert f"{trained}/checkpoints/1 is a checkpoint of another model (params: 12 leaves differ)" in message
    assert "text/layers/0/mlp/up/kernel: (64, 128) in the checkpoint, (64, 96) in the model" in message
    config.model.encoder.intermediate_size = 128
    config.model.encoder.num_hidden_layers = 1
    assert "concept/layers/1/attention_norm/bias: in the checkpoint (64,), not in the model" in refused(
        config, trained, monkeypatch
    )


def test_a_workdir_that_cannot_be_written_is_refused(config, tmp_path, monkeypatch):
    place = tmp_path / "file"
    place.write_text("a file where a folder should be")
    assert f"--workdir={place}/run cannot be written" in refused(config, place / "run", monkeypatch)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if not os.access(locked, os.W_OK):  # root writes everywhere
        assert f"--workdir={locked} cannot be written" in refused(config, locked, monkeypatch)


def test_too_little_disk_space_is_told_before_training(config, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    message = refused(config, tmp_path, monkeypatch)
    assert re.search(r"1\.0 MB are free, and \d+\.\d MB are needed for 4 checkpoints of \d\.\d MB; free", message), (
        message
    )


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_was_saved(config, tmp_path, rows_file, run_python):
    """A limit on file size stands for the full disk: the write fails in the same place, with any user's rights."""
    flags = [
        "-m", "nuner_jax.train", f"--config=tests/configs/tiny.py:{rows_file}", f"--workdir={tmp_path}",
        f"--config.data.cache_dir={rows_file.parent}/cache",
    ]  # fmt: skip
    one_device = {"XLA_FLAGS": ""}
    run_python(*flags, "--config.steps=5", env=one_device)
    limited = (
        "import resource, runpy, sys;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)); sys.argv = ['train', *sys.argv[1:]];"
        "runpy.run_module('nuner_jax.train', run_name='__main__')"
    )
    done = run_python("-c", limited, *flags[2:], "--config.steps=10", check=False, env=one_device)
    assert done.returncode == 2, done.stderr
    assert f"cannot write a checkpoint to {tmp_path}/checkpoints" in done.stderr
    assert "the checkpoint of step 5 is whole" in done.stderr
    run_python(*flags, "--config.steps=10", env=one_device)
    assert [line["step"] for line in read_metrics(tmp_path) if "train/loss" in line] == list(range(1, 11))


def test_export_refuses_what_is_no_checkpoint_and_never_overwrites_other_things(trained, tmp_path, run_python):
    precious = tmp_path / "precious"
    precious.mkdir()
    done = run_python("-m", "nuner_jax.export", f"--checkpoint={precious}", "--out=x", check=False)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True)
    assert f"{precious}: no checkpoint there" in done.stderr
    (precious / "thesis.tex").write_text("years of work")
    done = run_python("-m", "nuner_jax.export", f"--checkpoint={trained}", f"--out={precious}", check=False)
    assert done.returncode == 2 and "exists and is not an export" in done.stderr
    assert (precious / "thesis.tex").read_text() == "years of work"
