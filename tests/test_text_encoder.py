"""Encoders by name: what a run started from is found again, to the bit."""

import json
import pathlib

import numpy as np
import pytest

from nuner_jax import config as config_lib
from nuner_jax import text_encoder
from nuner_jax.errors import NunerError
from nuner_jax.fewshot.features import load_frozen
from nuner_jax.models.params import flatten
from nuner_jax.train import prepare, train
from nuner_jax.writers import Console

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def towers(rows_file):
    """The config of the tiny towers, with changes."""

    def make(**changes):
        config = config_lib.load_file(f"{ROOT}/tests/configs/tiny.py:{rows_file}")
        config.data.cache_dir = str(rows_file.parent / "cache")
        config.update_from_flattened_dict({"steps": 1, **changes})
        return config

    return make


@pytest.fixture(scope="module")
def trained(towers, tmp_path_factory):
    """A run from random numbers, with its export."""
    workdir = tmp_path_factory.mktemp("trained")
    train(towers(seed=3, export=True), workdir)
    return workdir


def first_params(config, workdir) -> dict[str, np.ndarray]:
    """The text encoder with which training begins; the workdir is then that of a run killed before its first step."""
    run = prepare(config, workdir, Console(active=False))
    run.checkpoints.close()
    return {path: np.asarray(leaf) for path, leaf in flatten(run.state.params["text"]).items()}


def named_params(name) -> dict[str, np.ndarray]:
    return flatten(load_frozen(str(name)).params)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)


def test_the_start_of_a_run_from_scratch_is_its_step_0(towers, trained, tmp_path):
    start = named_params(f"{trained}@start")
    assert_equal(start, first_params(towers(seed=3), tmp_path))
    assert_equal(start, named_params(f"{tmp_path}@start"))
    top = "layers/1/mlp/up/kernel"  # the layer below it is frozen
    assert np.abs(named_params(trained)[top] - start[top]).max() > 0
    found = text_encoder.find(f"{trained}@start")
    assert found.origin == "random parameters of seed 3"
    assert found.frozen_layers == text_encoder.find(str(trained)).frozen_layers == 1  # "two" layers are the same two


def test_the_start_of_fine_tuning_from_scratch_is_its_step_0(tmp_path):
    config = config_lib.load_file(f"{ROOT}/tests/configs/tagger.py")
    config.seed, config.model.frozen_layers = 4, -1
    first = first_params(config, tmp_path)
    assert_equal(named_params(f"{tmp_path}@start"), first)
    assert text_encoder.find(f"{tmp_path}@start").frozen_layers == config.model.encoder.num_hidden_layers


def test_the_start_of_a_run_from_weights_is_their_folder(towers, trained, tmp_path):
    weights = str(trained / "export")
    config = towers(**{"model.init": "pretrained", "model.text": weights, "model.concept": weights})
    first = first_params(config, tmp_path)
    assert text_encoder.find(f"{tmp_path}@start").origin == weights
    assert_equal(named_params(f"{tmp_path}@start"), first)
    assert_equal(named_params(weights), first)


def test_the_start_of_a_run_from_a_checkpoint_is_that_one(towers, trained, tmp_path):
    first = first_params(towers(**{"checkpoint.init_from": str(trained), "seed": 5}), tmp_path)
    assert_equal(named_params(f"{tmp_path}@start"), first)
    assert_equal(named_params(trained), first)


def test_errors_name_the_run(tmp_path):
    with pytest.raises(NunerError, match=r"nowhere@start: there is no folder .*nowhere; give the workdir of a run"):
        text_encoder.find(f"{tmp_path}/nowhere@start")
    with pytest.raises(NunerError, match=r"config.json does not exist: is .* the workdir of a run\?"):
        text_encoder.find(f"{tmp_path}@start")
    (tmp_path / "config.json").write_text(json.dumps({"task": "fewshot"}))
    with pytest.raises(NunerError, match="a run of the task 'fewshot', not of training"):
        text_encoder.find(f"{tmp_path}@start")
