"""Hugging Face folders: what is read and written without torch, and what is refused and how."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from nuner_jax import pretrained
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import Encoder, EncoderConfig
from nuner_jax.models.params import flatten, split, unflatten
from tests.goldens import tiny

FAMILIES = sorted(tiny.HF_CONFIGS)
HF_CONFIG = tiny.HF_CONFIGS["bert"]
CONFIG = EncoderConfig.from_hf(HF_CONFIG)
QUERY = "encoder.layer.1.attention.self.query.weight"


def shapes(config=CONFIG):
    return split(nnx.eval_shape(lambda: Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))[1]


def load(folder, config=CONFIG):
    return pretrained.load_encoder(folder, config, shapes(config))


def write(folder, tensors=None, **options):
    return tiny.write_folder(folder, HF_CONFIG, tiny.weights("bert") if tensors is None else tensors, **options)


def assert_equal(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == np.float32 and leaf.shape == expected[path].shape, path
        assert leaf.tobytes() == np.asarray(expected[path]).tobytes(), path


def renamed(rename):
    return {rename(name): value for name, value in tiny.weights("bert").items()}


@pytest.fixture
def plain(tmp_path):
    """What the tiny BERT's own folder gives."""
    return load(write(tmp_path / "plain"))


@pytest.fixture
def log():
    """What absl logs: a list of (level, message)."""
    records, handler = [], logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- Reading -----------------------------------------------------------------------------------


def test_kernels_lie_transposed_and_fused(plain):
    weights, leaves = tiny.weights("bert"), flatten(plain)
    np.testing.assert_array_equal(leaves["embeddings/word/embedding"], weights["embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(
        leaves["layers/0/mlp/up/kernel"], weights["encoder.layer.0.intermediate.dense.weight"].T
    )
    for index, name in enumerate(("query", "key", "value")):
        weight = weights[f"encoder.layer.1.attention.self.{name}.weight"]
        np.testing.assert_array_equal(leaves["layers/1/attention/qkv/kernel"][:, index, 2], weight[32:48].T)
        bias = weights[f"encoder.layer.1.attention.self.{name}.bias"]
        np.testing.assert_array_equal(leaves["layers/1/attention/qkv/bias"][index, 2], bias[32:48])


@pytest.mark.parametrize("prefix", ["bert.", "roberta.", "xlm_roberta.", "model.", "0.auto_model.", "a.b.encoder."])
def test_a_prefix_before_the_names_makes_no_difference(prefix, plain, tmp_path):
    assert_equal(load(write(tmp_path, renamed(lambda name: prefix + name))), plain)


def test_legacy_names_of_layer_norm_are_understood(plain, tmp_path):
    def legacy(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    assert_equal(load(write(tmp_path, renamed(legacy))), plain)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_dtypes_become_float32(dtype, tmp_path):
    tensors = {name: value.astype(dtype) for name, value in tiny.weights("bert").items()}
    found = flatten(load(write(tmp_path, tensors)))
    expected = tensors["encoder.layer.0.output.dense.weight"].astype(np.float32).T
    assert found["layers/0/mlp/down/kernel"].dtype == np.float32
    np.testing.assert_array_equal(found["layers/0/mlp/down/kernel"], expected)


def write_shards(folder):
    """The tiny BERT in two files and an index."""
    weights = tiny.weights("bert")
    write(folder, {}).joinpath("model.safetensors").unlink()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(places.values()):
        part = {name: weights[name] for name in weights if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards_are_read_through_their_index(plain, tmp_path):
    assert_equal(load(write_shards(tmp_path)), plain)


def test_leftovers_are_logged_by_name_and_surprising_ones_as_a_warning(plain, tmp_path, log):
    extra = {
        "bert.pooler.dense.weight": np.zeros((64, 64), np.float32),
        "bert.embeddings.position_ids": np.arange(32)[None],
        "cls.predictions.bias": np.zeros(80, np.float32),
        "lm_head.bias": np.zeros(80, np.float32),
        "bert.encoder.layer.2.output.dense.bias": np.zeros(64, np.float32),
        "adapter.gate": np.zeros(1, np.float32),
    }
    found = load(write(tmp_path / "extra", renamed(lambda name: f"bert.{name}") | extra))
    assert_equal(found, plain)
    ((_, expected),) = [entry for entry in log if entry[0] == "INFO"]
    ((_, surprising),) = [entry for entry in log if entry[0] == "WARNING"]
    assert str(tmp_path / "extra") in expected and str(tmp_path / "extra") in surprising
    assert {name for name in extra if name in expected} == set(extra) - {name for name in extra if name in surprising}
    assert {name for name in extra if name in surprising} == {"bert.encoder.layer.2.output.dense.bias", "adapter.gate"}


def test_nothing_is_logged_where_nothing_is_left_over(tmp_path, log):
    load(write(tmp_path))
    assert not log


# --- Weights that do not fit -------------------------------------------------------------------


def test_all_missing_misshaped_and_non_float_weights_are_listed_at_once(tmp_path):
    tensors = renamed(lambda name: f"bert.{name}")
    del tensors["bert.embeddings.LayerNorm.bias"], tensors[f"bert.{QUERY}"]
    tensors["bert.embeddings.word_embeddings.weight"] = np.zeros((90, 64), np.float32)
    tensors["bert.encoder.layer.0.output.dense.bias"] = np.zeros((64, 1), np.float32)
    tensors["bert.encoder.layer.0.output.dense.weight"] = np.zeros((64, 96), np.int8)
    with pytest.raises(NunerError) as error:
        load(write(tmp_path, tensors))
    message = str(error.value)
    assert f"{tmp_path}: 5 weights do not fit a bert encoder of 2 layers and width 64" in message
    for line in (
        f"embeddings.LayerNorm.bias is missing in {tmp_path}, expected shape [64]",
        f"{QUERY} is missing in {tmp_path}, expected shape [64, 64]",
        "bert.embeddings.word_embeddings.weight in model.safetensors has shape [90, 64], expected [80, 64]",
        "bert.encoder.layer.0.output.dense.bias in model.safetensors has shape [64, 1], expected [64]",
        "bert.encoder.layer.0.output.dense.weight in model.safetensors has dtype I8, expected one of F16",
    ):
        assert f"\n  {line}" in message


def test_weights_of_a_smaller_model_name_the_layers_it_lacks(tmp_path):
    larger = dataclasses.replace(CONFIG, num_layers=3)
    with pytest.raises(NunerError) as error:
        load(write(tmp_path), larger)
    assert str(error.value).count("\n  encoder.layer.2.") == 16


def test_reference_parameters_of_another_config_are_refused(tmp_path):
    tree = flatten(shapes())
    tree["embeddings/norm/scale"] = jax.ShapeDtypeStruct((65,), jnp.float32)
    tree["layers/9/x"] = tree.pop("layers/1/mlp/up/bias")
    with pytest.raises(NunerError) as error:
        pretrained.load_encoder(write(tmp_path), CONFIG, unflatten(tree))
    for line in (
        "layers/1/mlp/up/bias is missing",
        "layers/9/x is unknown",
        "embeddings/norm/scale has shape [65], its config says [64]",
    ):
        assert line in str(error.value)


def test_a_folder_of_two_encoders_is_ambiguous(tmp_path):
    tensors = renamed(lambda name: f"text.{name}") | renamed(lambda name: f"concept.{name}")
    with pytest.raises(NunerError, match=r"holds two encoders \(concept\. and text\.\)"):
        load(write(tmp_path, tensors))


def test_a_model_of_another_kind_is_told_by_its_names(tmp_path):
    tensors = {"wte.weight": np.zeros(3, np.float32), "h.0.attn.weight": np.zeros(3, np.float32)}
    with pytest.raises(NunerError, match=r"holds no encoder like BERT's.*h\.0\.attn\.weight, wte\.weight"):
        load(write(tmp_path, tensors))


# --- Files that are missing or corrupt ---------------------------------------------------------


def test_weights_of_torch_alone_are_refused_with_the_way_to_convert_them(tmp_path):
    write(tmp_path).joinpath("model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(NunerError) as error:
        load(tmp_path)
    for part in (f"{tmp_path} has no model.safetensors", "pytorch_model.bin is there", "save_pretrained"):
        assert part in str(error.value)


def test_a_folder_without_weights_says_so(tmp_path):
    write(tmp_path).joinpath("model.safetensors").unlink()
    with pytest.raises(NunerError, match="has no model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    {
        "truncated": lambda content: content[:-5],
        "truncated in the header": lambda content: content[:40],
        "empty": lambda content: b"",
        "pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 90\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_corrupt_file_is_named(damage, tmp_path):
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(damage[1](file.read_bytes()))
    with pytest.raises(NunerError) as error:
        load(tmp_path)
    assert f"{file} is corrupt or incomplete" in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    missing = write_shards(tmp_path) / "model-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(NunerError) as error:
        load(tmp_path)
    assert f"{missing} is missing, but model.safetensors.index.json names it" in str(error.value)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": []}', '{"weight_map": {}}']
)
def test_a_bad_index_is_named(content, tmp_path):
    index = write_shards(tmp_path) / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(NunerError) as error:
        load(tmp_path)
    assert str(index) in str(error.value)


def test_a_config_is_read_from_its_folder(tmp_path):
    assert pretrained.load_encoder_config(write(tmp_path)) == CONFIG


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{folder} has no config.json"),
        ("{", "{folder}/config.json cannot be read"),
        (b"\xff\xfe", "{folder}/config.json cannot be read"),
        ("[]", "{folder}/config.json holds no JSON object"),
        ('{"model_type": "t5"}', "{folder}/config.json: encoder config: model_type 't5' is not supported"),
    ],
)
def test_a_bad_config_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(NunerError) as error:
        pretrained.load_encoder_config(tmp_path)
    assert message.format(folder=tmp_path) in str(error.value)


# --- Writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_gives_identical_parameters(family, tmp_path):
    config = EncoderConfig.from_hf(tiny.HF_CONFIGS[family])
    params = split(Encoder(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(4)))[1]
    pretrained.save_encoder(tmp_path / "new" / "folder", config, params)
    assert pretrained.load_encoder_config(tmp_path / "new" / "folder") == config
    assert_equal(load(tmp_path / "new" / "folder", config), params)


def test_saving_leaves_other_files_and_replaces_an_earlier_model(plain, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    zeros = jax.tree.map(np.zeros_like, plain)
    pretrained.save_encoder(tmp_path, CONFIG, zeros)
    pretrained.save_encoder(tmp_path, CONFIG, plain)
    assert_equal(load(tmp_path), plain)
    files = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert files == {"tokenizer.json", "config.json", "model.safetensors"}


@pytest.mark.live
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_saved_and_gives_the_same_vectors(family, tmp_path):
    pytest.importorskip("torch")
    import transformers

    from tests.goldens import make

    hf_config = tiny.HF_CONFIGS[family]
    config = EncoderConfig.from_hf(hf_config)
    source = tiny.write_folder(tmp_path / "source", hf_config, tiny.weights(family))
    pretrained.save_encoder(tmp_path / "saved", config, load(source, config))
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert all("pooler" in name for name in report["missing_keys"])
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(model).__name__ == json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"][0]
    with np.load(tiny.FOLDER / f"{family}.npz") as golden:
        expected = golden["hidden_TxD"]
    found = make.torch_hidden(model.eval(), *tiny.padded(tiny.sentences(), config.pad_token_id))
    assert np.abs(found - expected).max() < 1e-5


def test_parameters_of_another_encoder_are_not_saved(plain, tmp_path):
    del plain["layers"]["1"]["mlp"]["up"]["bias"]
    with pytest.raises(NunerError, match="layers/1/mlp/up/bias is missing"):
        pretrained.save_encoder(tmp_path / "out", CONFIG, plain)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(plain, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NunerError, match="cannot write the model to .*file"):
        pretrained.save_encoder(tmp_path / "file", CONFIG, plain)


def test_a_full_disk_is_told_and_leaves_no_half_written_model(plain, tmp_path, monkeypatch):
    import safetensors.numpy

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    pretrained.save_encoder(tmp_path, CONFIG, plain)
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(NunerError, match=f"cannot write the model to {tmp_path}: .*No space left"):
        pretrained.save_encoder(tmp_path, CONFIG, jax.tree.map(np.zeros_like, plain))
    assert_equal(load(tmp_path), plain)
    assert not list(tmp_path.glob("*.partial"))


# --- What it costs -----------------------------------------------------------------------------

PROGRAM = """
import pathlib, sys
import jax.numpy as jnp
from flax import nnx
from nuner_jax import pretrained
from nuner_jax.models.encoder import Encoder
from nuner_jax.models.params import split

folder = pathlib.Path(sys.argv[1])
config = pretrained.load_encoder_config(pretrained.resolve(folder))
shapes = split(nnx.eval_shape(lambda: Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))[1]
pretrained.save_encoder(folder / "again", config, pretrained.load_encoder(folder, config, shapes))
print([name for name in ("torch", "tensorflow", "transformers") if name in sys.modules])
"""


def test_weights_are_read_and_written_without_torch_and_transformers(tmp_path, run_python):
    assert run_python("-c", PROGRAM, write(tmp_path)).stdout.strip() == "[]"
    assert (tmp_path / "again" / "model.safetensors").exists()
