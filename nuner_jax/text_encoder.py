"""A text encoder by name: a Hugging Face folder, a name on its hub, or the text tower of a run of this project."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from nuner_jax import checkpoint, pretrained
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder_config import EncoderConfig
from nuner_jax.models.hf_weights import check_params, hf_weights
from nuner_jax.models.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Where an encoder lies, and its sizes.

    folder: a Hugging Face folder, or WORKDIR/checkpoints/STEP.
    tokenizer_folder: its tokenizer's.
    is_checkpoint: which of the two `folder` is.
    """

    folder: Path
    tokenizer_folder: Path
    config: EncoderConfig
    is_checkpoint: bool

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; raises NunerError if there is none, or it does not fit the encoder."""
        tokenizer = pretrained.load_tokenizer(self.tokenizer_folder)
        pretrained.check_tokenizer(tokenizer, self.config)
        return tokenizer

    def load_params(self, abstract_params: Params) -> Params:
        """The parameters as float32 host arrays; raises NunerError that names every leaf that does not fit."""
        if not self.is_checkpoint:
            return pretrained.load_encoder(self.folder, self.config, abstract_params)
        params = checkpoint.load_params(self.folder)["text"]
        check_params(hf_weights(self.config), params)
        return jax.tree.map(np.asarray, params)


def find(name: str) -> TextEncoder:
    """The encoder of this name, without its weights.

    Args:
      name: a Hugging Face folder or hub name, a workdir of this project's training (its best checkpoint), or one
        of its checkpoints/STEP folders.

    Raises:
      NunerError: there is none, or it is of a kind that cannot be read.
    """
    path = Path(name).expanduser()
    if not any((path / inside).is_dir() for inside in ("checkpoints", "params")):
        folder = pretrained.resolve(name)
        return TextEncoder(folder, folder, pretrained.load_encoder_config(folder), False)
    folder = checkpoint.resolve(name)
    info = checkpoint.read_info(folder)
    if "text" not in info:
        raise NunerError(f"{folder} is a checkpoint of the task {info.get('task')!r}, which has no text encoder")
    config = EncoderConfig.from_hf(info["text"])
    return TextEncoder(folder, folder.parent.parent / "tokenizer", config, True)
