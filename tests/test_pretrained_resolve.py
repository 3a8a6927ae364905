"""Where a model is looked for, what is fetched of it, and what is said if it is nowhere."""

import fnmatch
import pathlib
import time

import pytest

from nuner_jax import pretrained
from nuner_jax.errors import NunerError


def test_a_local_folder_is_itself(tmp_path, monkeypatch):
    assert pretrained.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert pretrained.resolve(f"~/{tmp_path.name}") == tmp_path


def test_a_file_in_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NunerError, match="is a file: pass the folder"):
        pretrained.resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["no-such/model", "models/that/never/were", "/nowhere/model"])
def test_what_is_neither_local_nor_to_be_fetched_is_told_both_ways_and_quickly(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(NunerError) as error:
        pretrained.resolve(name)
    assert time.monotonic() - start < 10
    message = str(error.value)
    assert repr(name) in message and str(pathlib.Path(name).absolute()) in message
    assert "Hugging Face hub" in message and "hf download" in message


def test_of_a_hub_model_only_the_files_in_use_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert pretrained.resolve("FacebookAI/roberta-base") == tmp_path
    assert pretrained.resolve("other", files=pretrained.TOKENIZER_FILES) == tmp_path

    def fetched(name, files):
        return [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in asked[name])]

    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "vocab.json"]
    unwanted = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "2_Dense/model.safetensors", "README.md"]
    assert fetched("FacebookAI/roberta-base", wanted + unwanted) == wanted
    assert fetched("other", wanted + unwanted) == ["tokenizer.json", "vocab.json"]
