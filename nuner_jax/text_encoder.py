"""A text encoder by name: a Hugging Face folder, a name on its hub, or the text tower of a run of this project.

`WORKDIR@start` is the encoder that a run started from, so that every run can be compared with no training at all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nuner_jax import checkpoint, pretrained
from nuner_jax import workdir as workdir_lib
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import Encoder
from nuner_jax.models.encoder_config import EncoderConfig
from nuner_jax.models.hf_weights import check_params, hf_weights
from nuner_jax.models.params import Params, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

START = "@start"
"""What follows the workdir of a run in the name of the encoder that it started from."""


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Where an encoder lies, and its sizes.

    folder: a Hugging Face folder, WORKDIR/checkpoints/STEP, or the WORKDIR of a run that started from random numbers.
    tokenizer_folder: its tokenizer's.
    is_checkpoint: whether `folder` is one.
    frozen_layers: the bottom layers that its training leaves as they were; half of all where nothing says so, as in
      the paper.
    seed: of random parameters; None: they are in `folder`.
    """

    folder: Path
    tokenizer_folder: Path
    config: EncoderConfig
    is_checkpoint: bool
    frozen_layers: int
    seed: int | None = None

    @property
    def origin(self) -> str:
        """Where its parameters are from, in words."""
        return str(self.folder) if self.seed is None else f"random parameters of seed {self.seed}"

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; raises NunerError if there is none, or it does not fit the encoder."""
        tokenizer = pretrained.load_tokenizer(self.tokenizer_folder)
        pretrained.check_tokenizer(tokenizer, self.config)
        return tokenizer

    def load_params(self, abstract_params: Params) -> Params:
        """The parameters as float32 host arrays; raises NunerError that names every leaf that does not fit."""
        if self.seed is not None:
            return jax.tree.map(np.asarray, _random_params(self.config, self.seed))
        if not self.is_checkpoint:
            return pretrained.load_encoder(self.folder, self.config, abstract_params)
        params = checkpoint.load_params(self.folder)["text"]
        check_params(hf_weights(self.config), params)
        return jax.tree.map(np.asarray, params)


def find(name: str) -> TextEncoder:
    """The encoder of this name, without its weights.

    Args:
      name: a Hugging Face folder or hub name; a workdir of this project's training (its best checkpoint), or one of
        its checkpoints/STEP folders; or WORKDIR@start, what such a run started from.

    Raises:
      NunerError: there is none, or it is of a kind that cannot be read.
    """
    if name.endswith(START):
        return _start(Path(name.removesuffix(START)).expanduser())
    path = Path(name).expanduser()
    if not any((path / inside).is_dir() for inside in ("checkpoints", "params")):
        folder = pretrained.resolve(name)
        config = pretrained.load_encoder_config(folder)
        return TextEncoder(folder, folder, config, False, frozen_layers=config.num_layers // 2)
    folder = checkpoint.resolve(name)
    workdir, info = folder.parent.parent, checkpoint.read_info(folder)
    if "text" not in info:
        raise NunerError(f"{folder} is a checkpoint of the task {info.get('task')!r}, which has no text encoder")
    config = EncoderConfig.from_hf(info["text"])
    frozen = _frozen_layers(workdir_lib.read_config(workdir).model.frozen_layers, config)
    return TextEncoder(folder, workdir / "tokenizer", config, True, frozen)


def _start(workdir: Path) -> TextEncoder:
    """The encoder of a run's first step; `initialise.start` says the same of all parameters."""
    if not workdir.is_dir():
        raise NunerError(f"{workdir}{START}: there is no folder {workdir.absolute()}; give the workdir of a run")
    config = workdir_lib.read_config(workdir)
    if "model" not in config:
        raise NunerError(f"{workdir}{START}: {workdir} is a run of the task {config.get('task')!r}, not of training")
    model, init_from = config.model, config.checkpoint.init_from
    if init_from or model.init == "pretrained":
        found = find(init_from or model.text)
    else:
        encoder = dataclasses.replace(EncoderConfig.from_hf(model.encoder.to_dict()), dropout=model.dropout)
        found = TextEncoder(workdir, workdir, encoder, False, frozen_layers=0, seed=config.seed)
    # The tokenizer and the layers are those of the run, so that both of its ends are read alike.
    frozen = _frozen_layers(model.frozen_layers, found.config)
    return dataclasses.replace(found, tokenizer_folder=workdir / "tokenizer", frozen_layers=frozen)


def _frozen_layers(given: int, config: EncoderConfig) -> int:
    """Their number; -1 stands for all of them."""
    return config.num_layers if given < 0 else given


def _random_params(config: EncoderConfig, seed: int) -> Params:
    """What a task draws for its text encoder: it is the first module that draws from the run's key."""
    draw = lambda key: split(Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(key)))[1]  # noqa: E731
    return jax.jit(draw)(jax.random.key(seed))
