"""The sizes and constants of an encoder, and their form in a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from nuner_jax.errors import NunerError


class _Family(NamedTuple):
    architecture: str  # The class of `transformers` that holds the bare encoder.
    base_name: str  # What its classes with a head call the encoder.
    positions_after_padding: bool  # Does row pad_token_id + 1 of the table hold position 0?
    pad_token_id: int  # What `transformers` assumes where config.json does not say.


_FAMILIES = {
    "bert": _Family("BertModel", "bert", positions_after_padding=False, pad_token_id=0),
    "roberta": _Family("RobertaModel", "roberta", positions_after_padding=True, pad_token_id=1),
    "xlm-roberta": _Family("XLMRobertaModel", "roberta", positions_after_padding=True, pad_token_id=1),
}

# Our field -> its name in config.json, where the value is the same on both sides.
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
    "hidden_act": "hidden_act",
    "dropout": "hidden_dropout_prob",
}

# The least value of every field that counts something.
_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_layers": 1,
    "num_heads": 1,
    "intermediate_size": 1,
    "max_positions": 1,
    "position_offset": 0,
    "type_vocab_size": 1,
    "pad_token_id": 0,
}

# What a config.json may leave out, with the value that `transformers` then assumes in every family.
_HF_DEFAULTS = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
}

# Fields of config.json that change what a model computes, with the one value implemented here.
_HF_REQUIRED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and constants of one encoder.

    Raises NunerError that names every field out of range, and sizes that contradict one another.
    """

    model_type: str  # "roberta", "bert" or "xlm-roberta": what an export declares itself to be.
    vocab_size: int
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # H, a divisor of D
    intermediate_size: int  # F
    max_positions: int  # Rows of the position table.
    position_offset: int  # Row of position 0: pad_token_id + 1 in RoBERTa and XLM-R, 0 in BERT.
    type_vocab_size: int  # Rows of the token type table, of which row 0 is added to every token.
    pad_token_id: int
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"  # The exact (erf) GELU, the only one implemented.
    dropout: float = 0.1  # Rate on embeddings and block outputs.

    def __post_init__(self):
        problems = [*self._field_problems()] or [*self._relation_problems()]
        if problems:
            raise NunerError("encoder config: " + "; ".join(problems))

    @property
    def max_length(self) -> int:
        """The longest segment in tokens, special tokens included."""
        return self.max_positions - self.position_offset

    @property
    def base_name(self) -> str:
        """What stands before the encoder's weights in a Hugging Face model with a head."""
        return _FAMILIES[self.model_type].base_name

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> EncoderConfig:
        """Reads the content of a Hugging Face config.json.

        Raises NunerError that names the field: a family or feature that is not supported, a size
        that is missing or out of range.
        """
        family = _family(hf_config.get("model_type"))
        for name, required in _HF_REQUIRED.items():
            if hf_config.get(name, required) != required:
                raise NunerError(
                    f"encoder config: {name} = {hf_config[name]!r} is not supported, "
                    f"only {required!r} is; choose another model"
                )
        values = {"pad_token_id": family.pad_token_id, **_HF_DEFAULTS, **hf_config}
        missing = [name for name in _HF_NAMES.values() if name not in values]
        if missing:
            raise NunerError(f"encoder config: {', '.join(missing)} missing; is it a complete config.json?")
        fields = {ours: values[theirs] for ours, theirs in _HF_NAMES.items()}
        position_offset = _position_offset(family, fields["pad_token_id"])
        return cls(model_type=hf_config["model_type"], position_offset=position_offset, **fields)

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face config.json, the inverse of `from_hf`.

        The dropout of attention probabilities is left out, so that its reader's default holds:
        this encoder has none to report.
        """
        head = {
            "architectures": [_FAMILIES[self.model_type].architecture],
            "model_type": self.model_type,
        }
        return head | {theirs: getattr(self, ours) for ours, theirs in _HF_NAMES.items()}

    def _field_problems(self):
        if self.model_type not in _FAMILIES:
            yield _unknown_family(self.model_type)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                yield f"{name} must be a whole number of at least {least}, found {value!r}"
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            yield f"dropout must be at least 0 and below 1, found {self.dropout!r}"
        if not _is_number(self.layer_norm_eps) or self.layer_norm_eps <= 0:
            yield f"layer_norm_eps must be a number above 0, found {self.layer_norm_eps!r}"
        if self.hidden_act != "gelu":
            yield f"hidden_act {self.hidden_act!r} is not supported, only 'gelu' (exact) is"

    def _relation_problems(self):
        if self.hidden_size % self.num_heads:
            yield f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
        if self.pad_token_id >= self.vocab_size:
            yield f"pad_token_id {self.pad_token_id} is outside of vocab_size {self.vocab_size}"
        offset = _position_offset(_FAMILIES[self.model_type], self.pad_token_id)
        if self.position_offset != offset:
            yield (
                f"position_offset is {self.position_offset}, but positions of {self.model_type} "
                f"with pad_token_id {self.pad_token_id} start at row {offset}"
            )
        if self.max_length < 1:
            yield (f"max_positions {self.max_positions} leaves no row above position_offset {self.position_offset}")


def _family(model_type: Any) -> _Family:
    if model_type not in _FAMILIES:
        raise NunerError(f"encoder config: {_unknown_family(model_type)}")
    return _FAMILIES[model_type]


def _unknown_family(model_type: Any) -> str:
    return f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}"


def _position_offset(family: _Family, pad_token_id: Any) -> int:
    after_padding = family.positions_after_padding and type(pad_token_id) is int
    return pad_token_id + 1 if after_padding else 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
