"""A tagger: an encoder, and a head that gives every word a score for each class."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import Encoder, EncoderConfig, dropped


class Standard(nnx.Module):
    """Takes the mean off each feature and scales it; what both are, the task finds in its data."""

    def __init__(self, features: int):
        self.mean = nnx.Param(jnp.zeros(features))
        self.scale = nnx.Param(jnp.ones(features))

    def __call__(self, x_RxVxD: jax.Array) -> jax.Array:
        """Standardised vectors."""
        return (x_RxVxD - self.mean[...]) * self.scale[...]


class Head(nnx.Module):
    """From the vector of a word to the scores of its classes, in float32: linear, or two layers with a GELU between."""

    def __init__(
        self, inputs: int, classes: int, *, kind: str, width: int, dropout: float, standardise: bool, rngs: nnx.Rngs
    ):
        """Builds the head: random kernels of deviation 1 / sqrt(inputs), but 0.02 in the last layer.

        Args:
          inputs, classes: sizes.
          kind: "linear", or "mlp" (two layers).
          width: of the layer between, where there is one.
          dropout: rate on the input of each layer.
          standardise: whether a `Standard` stands before the first layer.
          rngs: random streams for the initial parameters.
        """
        self.dropout, self.standardise = dropout, standardise
        if standardise:
            self.standard = Standard(inputs)
        # Not zeros: no gradient would reach the encoder at first, and a short fine-tune never makes up for it.
        small, normal = nnx.initializers.normal(0.02), nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        if kind == "mlp":
            self.hidden = nnx.Linear(inputs, width, kernel_init=normal, rngs=rngs)
            inputs = width
        self.mlp = kind == "mlp"
        self.out = nnx.Linear(inputs, classes, kernel_init=small, rngs=rngs)

    def __call__(self, x_RxVxD: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [R, V, C] float32; a key turns dropout on."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x_RxVxD = x_RxVxD.astype(jnp.float32)
        if self.standardise:
            x_RxVxD = self.standard(x_RxVxD)
        if self.mlp:
            x_RxVxD = jax.nn.gelu(self.hidden(dropped(x_RxVxD, self.dropout, keys[0])), approximate=False)
        return self.out(dropped(x_RxVxD, self.dropout, keys[1]))


class Tagger(nnx.Module):
    """The encoder `text` and the `head` over the words' first sub-tokens."""

    def __init__(
        self,
        text: EncoderConfig,
        *,
        classes: int,
        layers: Sequence[int],
        frozen_layers: int,
        kind: str,
        width: int,
        dropout: float,
        standardise: bool,
        dtype,
        attention: str,
        remat: str = "none",
        activations: jax.sharding.NamedSharding | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds both with random parameters.

        Args:
          text: sizes of the encoder.
          classes: of the head.
          layers: hidden layers whose vectors the head reads, as `Encoder` numbers them.
          frozen_layers: bottom layers of the encoder (and its embeddings, where more than 0) without gradient.
          kind, width, dropout, standardise: of the head.
          dtype: of the encoder's computation; parameters and the head are float32.
          attention, remat, activations: as `Encoder` takes them.
          rngs: random streams for the initial parameters.

        Raises:
          NunerError: more frozen layers than layers, or a hidden layer that is not there.
        """
        if not 0 <= frozen_layers <= text.num_layers:
            raise NunerError(f"config.model.frozen_layers: {frozen_layers} of {text.num_layers} layers")
        self.hidden_layers, self.frozen_layers = tuple(layers), frozen_layers
        options = {"dtype": dtype, "attention_implementation": attention, "remat": remat, "activations": activations}
        self.text = Encoder(text, **options, rngs=rngs)
        self.text.check_layers(layers)
        self.head = Head(
            len(layers) * text.hidden_size,
            classes,
            kind=kind,
            width=width,
            dropout=dropout,
            standardise=standardise,
            rngs=rngs,
        )

    def vectors(self, tokens_RxL, segments_RxL, positions_RxV, dropout_key: jax.Array | None = None) -> jax.Array:
        """The vectors [R, V, D] of the words whose first sub-tokens stand at `positions_RxV`; None: of every token.

        With every layer frozen the encoder is deterministic: what no gradient reaches needs no dropout.
        """
        hidden_RxLxD = self.text(
            tokens_RxL,
            segments_RxL,
            stop_gradient_layers=self.frozen_layers,
            dropout_key=None if self.frozen_layers == len(self.text.layers) else dropout_key,
            layers=self.hidden_layers,
        )
        if positions_RxV is None:
            return hidden_RxLxD
        return self.text.place(jnp.take_along_axis(hidden_RxLxD, positions_RxV[:, :, None], axis=1))

    def __call__(self, tokens_RxL, segments_RxL, positions_RxV, dropout_key: jax.Array | None = None) -> jax.Array:
        """The scores [R, V, C] float32 of the words whose first sub-tokens stand at `positions_RxV`, or every token."""
        text_key, head_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        return self.head(self.vectors(tokens_RxL, segments_RxL, positions_RxV, text_key), head_key)
