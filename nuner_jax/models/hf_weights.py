"""The parameters of an encoder under their Hugging Face names: one table, read in both directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nuner_jax.errors import NunerError
from nuner_jax.models.encoder_config import EncoderConfig
from nuner_jax.models.params import flatten


@dataclasses.dataclass(frozen=True)
class HfWeight:
    """One parameter, and the Hugging Face weights that it is made of (three for a fused QKV)."""

    path: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shape: tuple[int, ...]  # Of each.
    transposed: bool = False  # torch keeps dense kernels as [outputs, inputs].

    def from_hf(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Joins the parts along a new axis before the last one, which `shape` may then split."""
        blocks = [part.T if self.transposed else part for part in parts]
        return np.stack(blocks, axis=-2).reshape(self.shape)

    def to_hf(self, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The inverse of `from_hf`, with names."""
        block = self.hf_shape[::-1] if self.transposed else self.hf_shape
        parts = value.reshape(*block[:-1], len(self.hf_names), block[-1])
        for number, name in enumerate(self.hf_names):
            part = parts[..., number, :]
            yield name, np.ascontiguousarray(part.T if self.transposed else part)


def hf_weights(config: EncoderConfig) -> list[HfWeight]:
    """Every parameter of an encoder with its Hugging Face names, prefix left out."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = (config.num_heads, width // config.num_heads)
    weights = [
        _table("embeddings/word", "embeddings.word_embeddings", config.vocab_size, width),
        _table("embeddings/position", "embeddings.position_embeddings", config.max_positions, width),
        _table("embeddings/type", "embeddings.token_type_embeddings", config.type_vocab_size, width),
        *_norm("embeddings/norm", "embeddings.LayerNorm", width),
    ]
    for number in range(config.num_layers):
        ours, theirs = f"layers/{number}", f"encoder.layer.{number}"
        qkv = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
        weights += [
            *_dense(f"{ours}/attention/qkv", qkv, (width,), (3, *heads)),
            *_dense(f"{ours}/attention/out", [f"{theirs}.attention.output.dense"], heads, (width,)),
            *_norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm", width),
            *_dense(f"{ours}/mlp/up", [f"{theirs}.intermediate.dense"], (width,), (inner,)),
            *_dense(f"{ours}/mlp/down", [f"{theirs}.output.dense"], (inner,), (width,)),
            *_norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm", width),
        ]
    return weights


def _table(path: str, name: str, rows: int, width: int) -> HfWeight:
    return HfWeight(f"{path}/embedding", (rows, width), (f"{name}.weight",), (rows, width))


def _norm(path: str, name: str, width: int) -> Iterator[HfWeight]:
    yield HfWeight(f"{path}/scale", (width,), (f"{name}.weight",), (width,))
    yield HfWeight(f"{path}/bias", (width,), (f"{name}.bias",), (width,))


def _dense(path: str, names: Sequence[str], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Iterator[HfWeight]:
    rows, columns = math.prod(inputs), math.prod(outputs) // len(names)
    kernels, biases = ([f"{name}.{kind}" for name in names] for kind in ("weight", "bias"))
    yield HfWeight(f"{path}/kernel", (*inputs, *outputs), (*kernels,), (columns, rows), True)
    yield HfWeight(f"{path}/bias", outputs, (*biases,), (columns,))


def check_params(weights: Sequence[HfWeight], params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves by path; NunerError if they are not those of an encoder of this config."""
    leaves, shapes = flatten(params), {weight.path: weight.shape for weight in weights}
    problems = [f"{path} is missing" for path in sorted(shapes.keys() - leaves.keys())]
    problems += [f"{path} is unknown" for path in sorted(leaves.keys() - shapes.keys())]
    problems += [
        f"{path} has shape {[*leaves[path].shape]}, its config says {[*shape]}"
        for path, shape in shapes.items()
        if path in leaves and tuple(leaves[path].shape) != shape
    ]
    if problems:
        raise NunerError("parameters of another encoder:" + listed(problems))
    return leaves


def listed(problems: Sequence[str]) -> str:
    """One indented line per problem, each after a line break."""
    return "".join(f"\n  {problem}" for problem in problems)
