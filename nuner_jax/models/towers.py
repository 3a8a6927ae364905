"""The two towers of NuNER: an encoder of text and an encoder of concept names, compared by dot product.

Bogdanov et al., EMNLP 2024, Figure 5: one vector per token of the text, one vector per concept name, and
the probability that the token instantiates the concept is the logistic sigmoid of their dot product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import Encoder, EncoderConfig

POOLINGS = ("mean", "first")


class Logit(nnx.Module):
    """Scale and bias of the logit, float32 scalars: logit = exp(log_scale) * <t, c> + bias."""

    def __init__(self, scale: float, bias: float):
        self.log_scale = nnx.Param(jnp.log(jnp.float32(scale)))
        self.bias = nnx.Param(jnp.float32(bias))

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """(scale, bias)."""
        return jnp.exp(self.log_scale[...]), self.bias[...]


class TwoTower(nnx.Module):
    """Text tower, concept tower and the logit that joins them."""

    def __init__(
        self,
        text: EncoderConfig,
        concept: EncoderConfig,
        *,
        frozen_layers: int,
        concept_pooling: str,
        scale: float,
        bias: float,
        dtype,
        attention: str,
        remat: str = "none",
        activations: jax.sharding.NamedSharding | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds both towers with random parameters.

        Args:
          text, concept: sizes of the two encoders, of the same width.
          frozen_layers: bottom layers of the text tower (and its embeddings, where more than 0) without gradient.
          concept_pooling: "mean" over a name's tokens, or the "first" token's vector.
          scale, bias: initial values of the logit.
          dtype: of the computation; parameters are float32.
          attention: implementation of the attention, as `Encoder` takes it.
          remat: what both towers compute again in the backward pass, as `Encoder` takes it.
          activations: where both towers' activations belong, as `Encoder` takes it.
          rngs: random streams for the initial parameters.

        Raises:
          NunerError: towers of different width, more frozen layers than layers, an unknown pooling.
        """
        if text.hidden_size != concept.hidden_size:
            raise NunerError(
                f"config.model: the text tower is {text.hidden_size} wide and the concept tower {concept.hidden_size}; "
                "their dot product needs the same width"
            )
        if not 0 <= frozen_layers <= text.num_layers:
            raise NunerError(f"config.model.frozen_layers: {frozen_layers} of {text.num_layers} layers")
        if concept_pooling not in POOLINGS:
            raise NunerError(
                f"config.model.concept_pooling: unknown {concept_pooling!r}; choose one of {', '.join(POOLINGS)}"
            )
        self.frozen_layers = frozen_layers
        self.concept_pooling = concept_pooling
        options = {"dtype": dtype, "attention_implementation": attention, "remat": remat, "activations": activations}
        self.text = Encoder(text, **options, rngs=rngs)
        self.concept = Encoder(concept, **options, rngs=rngs)
        self.logit = Logit(scale, bias)

    def frozen_vectors(self, tokens_RxL, segments_RxL) -> jax.Array:
        """What the embeddings and the frozen layers make of packed rows: [R, L, D]."""
        return self.text(tokens_RxL, segments_RxL, layers=(self.frozen_layers,))

    def token_vectors(self, tokens_RxL, segments_RxL, dropout_key=None, frozen_RxLxD=None) -> jax.Array:
        """One vector per token of packed rows: [R, L, D]; from their `frozen_vectors`, where these are given."""
        return self.text(
            tokens_RxL,
            segments_RxL,
            stop_gradient_layers=self.frozen_layers,
            dropout_key=dropout_key,
            below_BxLxD=frozen_RxLxD,
        )

    def concept_vectors(self, tokens_QxK, segments_QxK, num_slots: int, dropout_key=None) -> jax.Array:
        """One vector per concept name: [Q, S, D]; the name in slot s of a row is its segment s + 1."""
        hidden_QxKxD = self.concept(tokens_QxK, segments_QxK, dropout_key=dropout_key)
        member_QxKxS = segments_QxK[:, :, None] == jnp.arange(1, num_slots + 1)
        if self.concept_pooling == "first":
            member_QxKxS &= jnp.cumsum(member_QxKxS, axis=1) == 1
        member_QxKxS = member_QxKxS.astype(hidden_QxKxD.dtype)
        sums_QxSxD = jnp.einsum("qks,qkd->qsd", member_QxKxS, hidden_QxKxD, preferred_element_type=jnp.float32)
        counts_QxS = jnp.sum(member_QxKxS, axis=1, dtype=jnp.float32)
        return (sums_QxSxD / jnp.maximum(counts_QxS, 1.0)[:, :, None]).astype(hidden_QxKxD.dtype)
