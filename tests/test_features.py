"""Frozen features: packed or alone, a word's vector is the same; nothing is cut off."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nuner_jax import config as config_lib
from nuner_jax import pretrained, sharding
from nuner_jax import workdir as workdir_lib
from nuner_jax.checkpoint import Checkpoints
from nuner_jax.data.ner.words import word_spans
from nuner_jax.data.tokens import special_tokens
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import features
from nuner_jax.models.encoder import Encoder, EncoderConfig
from nuner_jax.models.params import merge, split
from nuner_jax.state import TrainState

TINY = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "intermediate_size": 48}
TEXTS = [
    "Ann",
    "",
    "Zeytoun, on Malcolm Street, pours arak until late.",
    "the nuclear receptor PPARγ binds 15-deoxy-Δ12,14-prostaglandin J2",
    "Ann met Bob . " * 7,
    "Divers from the Roscoff station recorded a bloom in late May.",
]


def save_random(folder, config, tokenizer):
    """A random encoder as a Hugging Face folder."""
    params = split(Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))[1]
    # The initial deviation of 0.02 makes all vectors alike; no test could tell one word from another.
    params = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, params)
    pretrained.save_encoder(folder, config, params)
    pretrained.load_tokenizer(pretrained.resolve(str(tokenizer))).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A RoBERTa of width 32 that reads 120 tokens, with byte pairs."""
    sizes = {"vocab_size": 8192, "max_positions": 122, "position_offset": 2, "type_vocab_size": 1, "pad_token_id": 1}
    config = EncoderConfig(model_type="roberta", **sizes, **TINY)
    return save_random(tmp_path_factory.mktemp("tiny") / "roberta", config, config_lib.SAMPLE_TOKENIZER)


@pytest.fixture(scope="module")
def bert(tmp_path_factory, minilm_folder):
    """A BERT of width 32 that reads 120 tokens, with the word pieces of MiniLM."""
    sizes = {"vocab_size": 30522, "max_positions": 120, "position_offset": 0, "type_vocab_size": 2, "pad_token_id": 0}
    config = EncoderConfig(model_type="bert", **sizes, **TINY)
    return save_random(tmp_path_factory.mktemp("tiny") / "bert", config, minilm_folder)


def words_of(texts, split_on_space=False):
    return [word_spans(text, split_on_space) for text in texts]


def alone(frozen, text, words, layers, tokens=slice(None)):
    """The vectors of a text's words, its tokens (or some of them) encoded in a row of their own, on one device."""
    encoding = frozen.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
    begin, end = special_tokens(frozen.tokenizer)
    ids = [begin, *encoding["input_ids"][tokens], end]
    row = np.full((1, frozen.config.max_length), frozen.config.pad_token_id, np.int32)
    row[0, : len(ids)] = ids
    hidden_LxD = encode_alone(frozen.config)(frozen.params, row, np.arange(row.size)[None] < len(ids), layers)[0]
    first = tokens.start or 0
    return np.array([hidden_LxD[encoding.char_to_token(int(start)) + 1 - first] for start, _ in words])


@functools.cache
def encode_alone(config):
    graphdef = split(nnx.eval_shape(lambda: Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))[0]
    apply = lambda params, row, is_token, layers: merge(graphdef, params)(row, is_token.astype(int), layers=layers)  # noqa: E731
    return jax.jit(apply, static_argnums=3)


@pytest.mark.parametrize("which", ["last", "two"])
@pytest.mark.parametrize("model", ["tiny", "bert"])
def test_packed_vectors_equal_those_of_each_sentence_alone(model, which, request):
    frozen = features.load_frozen(str(request.getfixturevalue(model)))
    layers, words = frozen.hidden_layers(which), words_of(TEXTS)
    assert layers == {"last": (3,), "two": (3, 2)}[which]  # the bottom one counts as frozen
    found = features.word_features(frozen, TEXTS, words, layers)
    assert found.features_WxD.shape == (sum(map(len, words)), len(layers) * frozen.config.hidden_size)
    assert found.features_WxD.dtype == np.float32 and found.silent_V.size == 0
    for number, (text, spans) in enumerate(zip(TEXTS, words, strict=True)):
        here = found.features_WxD[slice(*found.sentence_offsets_S1[number : number + 2])]
        assert len(here) == len(spans)
        if len(spans):
            np.testing.assert_allclose(here, alone(frozen, text, spans, layers), atol=1e-4)


def test_one_device_gives_what_eight_give(tiny, monkeypatch):
    frozen, words = features.load_frozen(str(tiny)), words_of(TEXTS * 40)
    eight = features.word_features(frozen, TEXTS * 40, words)
    axes = {"axis_types": (jax.sharding.AxisType.Auto,) * 3, "devices": jax.devices()[:1]}
    monkeypatch.setattr(features.sharding, "local_mesh", lambda: jax.make_mesh((1, 1, 1), sharding.AXES, **axes))
    one = features.word_features(frozen, TEXTS * 40, words)
    np.testing.assert_allclose(one.features_WxD, eight.features_WxD, atol=1e-5)


@pytest.mark.live
def test_vectors_equal_those_of_transformers(bert):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    texts = [text for text in TEXTS if text]
    words = words_of(texts)
    found = features.word_features(features.load_frozen(str(bert)), texts, words)
    wanted = []
    for text, spans in zip(texts, words, strict=True):
        encoding = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**encoding).last_hidden_state[0].numpy()
        wanted += [hidden[encoding.char_to_token(int(start))] for start, _ in spans]
    np.testing.assert_allclose(found.features_WxD, np.array(wanted), atol=1e-4)


def test_a_text_longer_than_the_encoder_is_read_whole(tiny):
    frozen = features.load_frozen(str(tiny))
    text = " ".join(f"station {number} recorded a bloom ;" for number in range(80))
    words = word_spans(text, True)
    found = features.word_features(frozen, [text], [words])
    tokens = frozen.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    capacity = frozen.config.max_length - 2
    assert len(tokens) > 3 * capacity
    assert np.abs(found.features_WxD).sum(axis=1).min() > 0
    quarter = capacity // 4  # the words that near an end of the text stand nearest to the middle of no other window
    firsts, lasts = words[: quarter // 3], words[-quarter // 3 :]
    ends = (
        alone(frozen, text, firsts, (3,), slice(0, capacity)),
        alone(frozen, text, lasts, (3,), slice(len(tokens) - capacity, None)),
    )
    np.testing.assert_allclose(found.features_WxD[: len(firsts)], ends[0], atol=1e-4)
    np.testing.assert_allclose(found.features_WxD[-len(lasts) :], ends[1], atol=1e-4)


def test_a_word_that_the_tokenizer_leaves_out_is_told_and_zero(bert):
    text = "Ann \x07 met Bob"
    found = features.word_features(features.load_frozen(str(bert)), [text], words_of([text], True))
    assert found.silent_V.tolist() == [1]
    assert [bool(vector.any()) for vector in found.features_WxD] == [True, False, True, True]


def test_vectors_in_a_mapped_file_are_the_same(tiny, tmp_path):
    frozen, words = features.load_frozen(str(tiny)), words_of(TEXTS)
    mapped = features.word_features(frozen, TEXTS, words, file=tmp_path / "vectors.npy")
    assert isinstance(mapped.features_WxD, np.memmap)
    np.testing.assert_array_equal(mapped.features_WxD, features.word_features(frozen, TEXTS, words).features_WxD)


def test_texts_without_a_word_have_no_vectors(tiny):
    found = features.word_features(features.load_frozen(str(tiny)), ["", " "], words_of(["", " "]))
    assert found.features_WxD.shape == (0, 32) and found.sentence_offsets_S1.tolist() == [0, 0, 0]


def test_there_is_one_program_for_each_row_length_whatever_the_texts(tiny):
    frozen = features.load_frozen(str(tiny))
    features._encode.clear_cache()
    for count in (1, 3, 40):
        texts = [*TEXTS * count, "a longer one " * 30]  # rows of 64 and of 120
        features.word_features(frozen, texts, words_of(texts))
    again = dataclasses.replace(frozen, params=jax.tree.map(lambda leaf: leaf + 1, frozen.params))
    features.word_features(again, TEXTS, words_of(TEXTS))  # another encoder of the same sizes
    assert features._encode._cache_size() == 2


def test_progress_ends_with_all_of_it(tiny):
    shares = []
    texts = TEXTS * 200
    features.word_features(features.load_frozen(str(tiny)), texts, words_of(texts), advance=shares.append)
    assert len(shares) > 1 and shares == sorted(shares) and shares[-1] == 1.0


def test_a_checkpoint_of_this_project_is_read_like_its_export(tiny, tmp_path):
    export = features.load_frozen(str(tiny))
    workdir_lib.write_config(config_lib.load_file("tests/configs/tiny.py"), tmp_path, resumed=False)
    export.tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    checkpoints = Checkpoints(tmp_path, keep=1, best_metric="loss", best_is_lower=True)
    state = TrainState(jnp.int32(7), {"text": export.params}, {"count": jnp.zeros(1)})
    checkpoints.save(state, {"loss": 1.0}, {"task": "pretrain", "text": export.config.to_hf()})
    checkpoints.close()
    for name in (tmp_path, tmp_path / "checkpoints" / "7"):
        run = features.load_frozen(str(name))
        assert run.fingerprint == export.fingerprint  # of parameters and tokenizer
        assert run.frozen_layers == 1  # as the run's config says


def test_the_fingerprint_tells_weights_apart(tiny, tmp_path):
    frozen = features.load_frozen(str(tiny))
    assert features.load_frozen(str(tiny)).fingerprint == frozen.fingerprint
    changed = jax.tree.map(np.array, frozen.params)
    changed["layers"]["2"]["mlp"]["up"]["bias"][0] += 1e-3
    pretrained.save_encoder(tmp_path, frozen.config, changed)
    frozen.tokenizer.save_pretrained(str(tmp_path))
    assert features.load_frozen(str(tmp_path)).fingerprint != frozen.fingerprint


def test_errors_name_the_thing(tiny, tmp_path):
    with pytest.raises(NunerError, match="no model"):
        features.load_frozen(str(tmp_path / "nowhere"))
    with pytest.raises(NunerError, match="4"):
        features.word_features(features.load_frozen(str(tiny)), ["Ann"], words_of(["Ann"]), layers=(4,))
