"""Encoder configs: to Hugging Face and back, and what is refused by name."""

import dataclasses

import pytest

from nuner_jax.errors import NunerError
from nuner_jax.models.encoder_config import EncoderConfig
from tests.goldens import tiny

FAMILIES = sorted(tiny.HF_CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_the_way_to_hugging_face_and_back(family):
    config = EncoderConfig.from_hf(tiny.HF_CONFIGS[family])
    assert EncoderConfig.from_hf(config.to_hf()) == config
    given = {name: value for name, value in tiny.HF_CONFIGS[family].items() if name in config.to_hf()}
    assert given.items() <= config.to_hf().items()


def test_what_a_config_json_may_leave_out_is_what_transformers_assumes():
    pytest.importorskip("torch")
    import transformers

    for family in FAMILIES:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        short = {name: tiny.HF_CONFIGS[family][name] for name in (*sizes, "max_position_embeddings", "model_type")}
        filled = transformers.AutoConfig.for_model(**short)
        found = EncoderConfig.from_hf(short).to_hf()
        assert {name: getattr(filled, name) for name in found if name != "architectures"} == {
            name: value for name, value in found.items() if name != "architectures"
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are bert, roberta, xlm-roberta"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only 'gelu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not supported"),
        ({"vocab_size": "80"}, "vocab_size must be a whole number of at least 1, found '80'"),
        ({"num_hidden_layers": 0}, "num_layers must be a whole number of at least 1, found 0"),
        ({"pad_token_id": None}, "pad_token_id must be a whole number"),
        ({"hidden_dropout_prob": 1.0}, "dropout must be at least 0 and below 1, found 1.0"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps must be a number above 0, found '1e-5'"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not divisible by num_heads 5"),
        ({"pad_token_id": 80}, "pad_token_id 80 is outside of vocab_size 80"),
        ({"max_position_embeddings": 2}, "max_positions 2 leaves no row above position_offset 2"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(NunerError) as error:
        EncoderConfig.from_hf({**tiny.HF_CONFIGS["roberta"], **change})
    assert message in str(error.value)


def test_a_config_without_its_sizes_names_all_that_is_missing():
    with pytest.raises(NunerError, match="vocab_size, hidden_size, .* missing"):
        EncoderConfig.from_hf({"model_type": "bert"})


def test_a_position_offset_of_another_family_is_refused():
    with pytest.raises(NunerError, match="position_offset is 0, but positions of roberta .* start at row 2"):
        dataclasses.replace(EncoderConfig.from_hf(tiny.HF_CONFIGS["roberta"]), position_offset=0)
