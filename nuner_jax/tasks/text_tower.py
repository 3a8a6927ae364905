"""What tasks have in common: whether a batch can be split; of an encoder, its sizes, tokenizer and frozen part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import pretrained, sharding
from nuner_jax.errors import NunerError
from nuner_jax.models.attention import NEEDS, fastest
from nuner_jax.models.encoder import EncoderConfig
from nuner_jax.text_encoder import TextEncoder


def check_platform(config: ConfigDict, mesh: Mesh, more_rows: Mapping[str, int] | None = None) -> None:
    """Rows are split evenly over the devices, and the attention exists here; else NunerError names the key.

    `more_rows` are those that a task has besides, by their key.
    """
    asked, platform = config.model.attention, _platform(mesh)
    needed, name = NEEDS.get(asked, (platform, ""))
    if needed != platform:
        raise NunerError(f"config.model.attention = {asked!r} needs {name}, and this is {platform}: take 'auto'")
    if config.data.rows % config.optim.accumulate:
        raise NunerError(
            f"config.data.rows = {config.data.rows} is not a multiple of "
            f"config.optim.accumulate = {config.optim.accumulate}"
        )
    parts = sharding.batch_devices(mesh)
    rows = {
        "config.data.rows / config.optim.accumulate": config.data.rows // config.optim.accumulate,
        "config.eval.rows": config.eval.rows,
        **(more_rows or {}),
    }
    for name, number in rows.items():
        if number < 1 or number % parts:
            raise NunerError(
                f"{name} = {number} cannot be split over the {parts} devices of the mesh's axes "
                f"{' x '.join(sharding.BATCH_AXES)}: choose a multiple of {parts}"
            )


def attention(model: ConfigDict, mesh: Mesh) -> str:
    """The implementation of the attention that `config.model` asks for on these devices."""
    return fastest(_platform(mesh)) if model.attention == "auto" else model.attention


def remat(model: ConfigDict) -> str:
    """What `config.model` has the backward pass compute again; a run from before this was a choice kept all."""
    return model.get("remat", "none")


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def encoder_config(model: ConfigDict, encoder: TextEncoder | None) -> EncoderConfig:
    """The sizes of the encoder, or of `config.model` where training starts from scratch."""
    config = encoder.config if encoder else EncoderConfig.from_hf(model.encoder.to_dict())
    return dataclasses.replace(config, dropout=model.dropout)


def load_tokenizer(model: ConfigDict, encoder: TextEncoder | None):
    """The tokenizer of `config.model`, else that of the encoder; raises NunerError if there is none, or it misfits."""
    if encoder and not model.tokenizer:
        return encoder.load_tokenizer()
    if not model.tokenizer:
        raise NunerError("config.model.tokenizer is not set: an encoder from scratch has none of its own")
    tokenizer = pretrained.load_tokenizer(pretrained.resolve(model.tokenizer, pretrained.TOKENIZER_FILES))
    pretrained.check_tokenizer(tokenizer, encoder_config(model, encoder))
    return tokenizer


def parameters(tree: dict) -> int:
    """How many parameters a tree of arrays, or of their shapes, has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def is_frozen(path: str, frozen_layers: int) -> bool:
    """Whether a parameter is of the embeddings or of these bottom layers of the encoder; 0: none is."""
    return path.startswith("text/") and frozen_layers > 0 and depth(path) <= frozen_layers


def depth(path: str) -> int:
    """Of a parameter "text/…" of the encoder: 0 in the embeddings, n in the n-th layer."""
    _, part, number = path.split("/")[:3]
    return 0 if part == "embeddings" else int(number) + 1
