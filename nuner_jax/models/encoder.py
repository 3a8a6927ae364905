"""One Transformer encoder for RoBERTa, BERT (MiniLM included) and XLM-R, as a Flax NNX module.

The three families share one post-norm architecture (Vaswani et al. 2017, in the form of BERT,
Devlin et al. 2019) and differ in data alone: table sizes, the row at which positions start, and
the epsilon of LayerNorm.

Axis names: B rows of a batch, L tokens of a row, D hidden size, H heads, K = D / H, F inner size
of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from nuner_jax import sharding
from nuner_jax.errors import NunerError
from nuner_jax.models import attention, gradients
from nuner_jax.models.encoder_config import EncoderConfig

__all__ = ["Encoder", "EncoderConfig", "positions_from_segments"]

REMAT = ("none", "attention", "layers")
"""What the backward pass computes again, in place of keeping it: see `Encoder`."""

INITIALIZER_STDDEV = 0.02  # As in BERT; values beyond two standard deviations are drawn again.


def positions_from_segments(segments_BxL: jax.Array) -> jax.Array:
    """The place of every token within its own segment, from 0; padding gets 0.

    [B,L] int32 -> [B,L] int32. A segment is a run of equal ids; an id must not return later in
    the same row.
    """
    index_L = jnp.arange(segments_BxL.shape[1], dtype=jnp.int32)
    previous_BxL = jnp.pad(segments_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BxL = jnp.where(segments_BxL != previous_BxL, index_L, 0)
    positions_BxL = index_L - jax.lax.cummax(starts_BxL, axis=1)
    # A long run of padding would leave the position table, and reading outside of it gives NaN.
    return jnp.where(segments_BxL > 0, positions_BxL, 0)


class Embeddings(nnx.Module):
    """Word, position and token type vectors, summed in f32 and normalised."""

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        activations: jax.sharding.NamedSharding | None = None,
    ):
        self.position_offset = config.position_offset
        self.whole = None if activations is None else jax.sharding.NamedSharding(activations.mesh, P())
        self.word = _embedding(config.vocab_size, config, rngs)
        self.position = _embedding(config.max_positions, config, rngs)
        self.type = _embedding(config.type_vocab_size, config, rngs)
        self.norm = _layer_norm(config, dtype, rngs)

    def __call__(self, tokens_BxL: jax.Array, positions_BxL: jax.Array) -> jax.Array:
        words_BxLxD = self._rows(self.word, tokens_BxL)
        positions_BxLxD = self._rows(self.position, positions_BxL + self.position_offset)
        type_D = self.type.embedding[0]  # Single sentences only: every token is of type 0.
        return self.norm(words_BxLxD + positions_BxLxD + type_D)

    def _rows(self, table: nnx.Embed, index_BxL: jax.Array) -> jax.Array:
        """Rows of a table, NaN beyond its end; a table that is split over devices is made whole first.

        Else each device looks up its part of the width for the rows of all devices, and those vectors, which grow with
        the devices, are sent in place of the table, which does not.
        """
        table_VxD = table.embedding[...]
        if self.whole is not None:
            table_VxD = jax.lax.with_sharding_constraint(table_VxD, self.whole)
        return jnp.take(table_VxD, index_BxL, axis=0)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    There is no dropout of the attention probabilities:
    the fused kernels have none, and the choice of a kernel must not change what is trained.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: jnp.dtype,
        implementation: str,
        remat: str,
        rngs: nnx.Rngs,
        placed: jax.sharding.NamedSharding | None,
    ):
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        self.implementation = implementation
        self.placed = placed
        self.remat = remat == "attention"
        self.qkv = _dense(config.hidden_size, (3, *heads), dtype, rngs)
        self.out = _dense(heads, config.hidden_size, dtype, rngs)

    def __call__(self, x_BxLxD: jax.Array, segments_BxL: jax.Array) -> jax.Array:
        qkv_BxLx3xHxK = self.qkv(x_BxLxD)
        q_BxLxHxK, k_BxLxHxK, v_BxLxHxK = (qkv_BxLx3xHxK[:, :, i] for i in range(3))
        attend = jax.checkpoint(attention.attend, static_argnums=(4, 5)) if self.remat else attention.attend
        heads_BxLxHxK = attend(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, self.implementation, self.placed)
        return self.out(heads_BxLxHxK)


class MLP(nnx.Module):
    """Two dense layers with the exact GELU between them."""

    def __init__(self, config: EncoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = _dense(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.down = _dense(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.down(gradients.gelu(self.up(x_BxLxD)))


class Layer(nnx.Module):
    """One post-norm layer: attention, then MLP, each added to its input and normalised; options as `Attention` has."""

    def __init__(self, config: EncoderConfig, *, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs, **options):
        self.dropout = config.dropout
        self.remat = remat == "layers"
        self.attention = Attention(config, dtype=dtype, remat=remat, rngs=rngs, **options)
        self.attention_norm = _layer_norm(config, dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = _layer_norm(config, dtype, rngs)

    def __call__(self, x_BxLxD: jax.Array, segments_BxL: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        # A function made for this call: what JAX traces of one, parameters included, it may use again.
        forward = jax.checkpoint(lambda *inputs: self._forward(*inputs)) if self.remat else self._forward
        return forward(x_BxLxD, segments_BxL, dropout_key)

    def _forward(self, x_BxLxD: jax.Array, segments_BxL: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        attended_BxLxD = self.attention(x_BxLxD, segments_BxL)
        attended_BxLxD = dropped(attended_BxLxD, self.dropout, _fold_in(dropout_key, 0))
        x_BxLxD = self.attention_norm(x_BxLxD + attended_BxLxD)
        mapped_BxLxD = dropped(self.mlp(x_BxLxD), self.dropout, _fold_in(dropout_key, 1))
        return self.mlp_norm(x_BxLxD + mapped_BxLxD)


class Encoder(nnx.Module):
    """Token ids to one vector per token; padded and packed rows take the same path.

    Parameters are f32 and the only state: dropout keys come with the call. `dtype` (bf16 or f32)
    is that of the matrix products and of the result; LayerNorm statistics and softmax are f32
    whatever it is. f32 on a TPU or GPU is as exact as `jax_default_matmul_precision` allows.

    `attention_implementation` is one of `attention.IMPLEMENTATIONS`. Raises NunerError for any other name, and for
    "cudnn" with f32. Over a mesh, "splash" takes `activations` for rows split as `sharding.row_sharding` splits them.

    `remat` is one of `REMAT`, what the backward pass computes again so that it need not be kept: nothing; the L x L
    weights of each head ("attention": the most memory of long rows for the least arithmetic, and nothing is gained
    with "cudnn" or "splash", which keep none anyway); or all of a layer but its input ("layers"). Frozen layers keep
    nothing in any case. Values and gradients stay what they are. XLA's compiler for CPUs finds that the same is
    computed twice, and keeps it after all: there it saves nothing. Raises NunerError for any other name.

    `activations` places the vectors between the layers (it must divide B); None leaves the choice to XLA, which
    may follow split parameters and split the vectors by width, and then adds whole activations over devices.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        attention_implementation: str = "xla",
        remat: str = "none",
        activations: jax.sharding.NamedSharding | None = None,
    ):
        attention.check(attention_implementation, dtype)
        if remat not in REMAT:
            raise NunerError(f"remat {remat!r} is unknown; choose one of {', '.join(REMAT)}")
        self.config = config
        self.dtype = dtype
        self.activations = activations
        heads = None if activations is None else sharding.head_sharding(activations.mesh)
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs, activations=activations)
        self.layers = nnx.List(
            Layer(config, dtype=dtype, implementation=attention_implementation, placed=heads, remat=remat, rngs=rngs)
            for _ in range(config.num_layers)
        )

    def __call__(
        self,
        tokens_BxL: jax.Array,
        segments_BxL: jax.Array,
        positions_BxL: jax.Array | None = None,
        *,
        stop_gradient_layers: int = 0,
        dropout_key: jax.Array | None = None,
        layers: Sequence[int] = (-1,),
        below_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        """Encodes a batch of rows.

        Args:
          tokens_BxL: int32 token ids.
          segments_BxL: int32, 0 for padding, 1 and up for the sentences packed into the row. A
            token attends to its own segment only, padding to padding (its vectors are finite and
            meaningless).
          positions_BxL: int32 place of each token within its segment, from 0, below
            `config.max_length` (beyond the table the vectors are NaN, never those of another
            place); `positions_from_segments` by default.
          stop_gradient_layers: the embeddings and this many bottom layers are cut from the backward
            pass; 0 cuts nothing. Static.
          dropout_key: turns dropout on (rate `config.dropout`); None is the deterministic model.
          layers: whose vectors are wanted, numbered as the `hidden_states` of transformers: 0 the embeddings, n the
            n-th layer, -1 the last one.
          below_BxLxD: what the embeddings and the `stop_gradient_layers` bottom layers would give, so that they are
            not computed, and no layer below it can be returned; None: they are.

        Returns: hidden_BxLxD, of the compute dtype; of several layers, their vectors one after another.
        Raises: NunerError if there are not as many layers to cut, or to return.
        """
        if not 0 <= stop_gradient_layers <= len(self.layers):
            raise NunerError(
                f"{stop_gradient_layers} layers to freeze, but the encoder has {len(self.layers)}: "
                f"choose 0 to {len(self.layers)}"
            )
        self.check_layers(layers)
        if positions_BxL is None:
            positions_BxL = positions_from_segments(segments_BxL)

        if below_BxLxD is None:
            given = 0
            x_BxLxD = self.embeddings(tokens_BxL, positions_BxL)
            x_BxLxD = self.place(dropped(x_BxLxD, self.config.dropout, _fold_in(dropout_key, 0)))
        else:
            given = stop_gradient_layers
            x_BxLxD = self.place(below_BxLxD.astype(self.dtype))
        hidden = [None] * given + [x_BxLxD]
        for number, layer in enumerate(self.layers[given:], start=given + 1):
            x_BxLxD = self.place(layer(x_BxLxD, segments_BxL, _fold_in(dropout_key, number)))
            if number == stop_gradient_layers:
                x_BxLxD = jax.lax.stop_gradient(x_BxLxD)
            hidden.append(x_BxLxD)
        return jnp.concatenate([hidden[layer] for layer in layers], axis=-1)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises NunerError that names a hidden layer that is not there."""
        count = len(self.layers)
        if missing := [layer for layer in layers if not -count - 1 <= layer <= count]:
            raise NunerError(
                f"hidden layer {missing[0]}, but the encoder has {count} layers: choose 0 (the embeddings) to {count}, "
                f"or -1 (the last) to {-count - 1}"
            )

    def place(self, x_BxLxD: jax.Array) -> jax.Array:
        """The same vectors, or others of as many rows, where `activations` wants them."""
        return x_BxLxD if self.activations is None else jax.lax.with_sharding_constraint(x_BxLxD, self.activations)


def _embedding(rows: int, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.truncated_normal(INITIALIZER_STDDEV)
    return nnx.Embed(rows, config.hidden_size, dtype=jnp.float32, embedding_init=init, rngs=rngs)


def _dense(inputs: int | tuple, outputs: int | tuple, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LinearGeneral:
    axis = tuple(range(-len(inputs), 0)) if isinstance(inputs, tuple) else -1
    init = nnx.initializers.truncated_normal(INITIALIZER_STDDEV)
    return nnx.LinearGeneral(
        inputs, outputs, axis=axis, dtype=dtype, kernel_init=init, rngs=rngs, dot_general=_dot_general
    )


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: tuple, **_) -> jax.Array:
    """What a dense layer asks `jax.lax.dot_general` for: its last axes of x are the first ones of the kernel."""
    (contracted, _), _ = dimension_numbers
    return gradients.product(x, kernel, len(contracted))


def _layer_norm(config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] - E[x]², loses digits where the mean is large beside the spread.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def _fold_in(key: jax.Array | None, number: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def dropped(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout: each value is 0 at this rate, and the others make up for it; without a key, nothing happens."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, gradients.settled(x) / (1 - rate), 0)
