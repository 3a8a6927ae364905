"""Self-attention in several implementations of the same: which of them is fast depends on the platform.

    heads = softmax(q k' / sqrt(K), over the tokens of the same segment) v

The softmax is float32 in all of them. Shapes: B rows of L tokens, H heads of K numbers.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nuner_jax.errors import NunerError

IMPLEMENTATIONS = ("plain", "xla", "cudnn", "splash")
"""Ours; those of `jax.nn.dot_product_attention`, of which "cudnn" is flash attention on NVIDIA GPUs, bfloat16 only; and
the flash attention for TPUs that comes with JAX, which other platforms interpret, for tests."""

NEEDS = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}
"""The platform of those that are not for all of them, and its name for people."""

_SPLASH_BLOCK = 128  # tokens; a row is some whole number of them
_NEVER = -1e30  # logit of a token that the mask excludes


def fastest(platform: str) -> str:
    """The implementation for "cpu", "gpu" or "tpu"; "cudnn" and "splash" are left to who asks for them.

    On CPUs XLA multiplies small matrices fast where heads stand before tokens, and slowly as jax.nn lays them out.
    """
    return "plain" if platform == "cpu" else "xla"


def check(implementation: str, dtype: jnp.dtype) -> None:
    """Raises NunerError if there is no such implementation, or it does not compute in this dtype."""
    if implementation not in IMPLEMENTATIONS:
        raise NunerError(
            f"attention_implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        raise NunerError(
            "attention_implementation 'cudnn' computes in bfloat16, not in "
            f"{jnp.dtype(dtype).name}; choose bfloat16, or 'xla'"
        )


def attend(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    segments_BxL: jax.Array,
    implementation: str,
    placed: NamedSharding | None = None,
) -> jax.Array:
    """What each token reads from those of its own segment, padding (0) from padding: [B, L, H, K].

    `placed` is how [B, L, H, ...] are split over a mesh, which "splash" must be told; None: they are whole.
    """
    if implementation == "splash":
        return _splash(q_BxLxHxK * q_BxLxHxK.shape[-1] ** -0.5, k_BxLxHxK, v_BxLxHxK, segments_BxL, placed)
    mask_Bx1xLxL = segments_BxL[:, None, :, None] == segments_BxL[:, None, None, :]
    if implementation != "plain":
        return jax.nn.dot_product_attention(
            q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, mask=mask_Bx1xLxL, implementation=implementation
        )
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = (jnp.swapaxes(x, 1, 2) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    return jnp.swapaxes(_plain(q_BxHxLxK * q_BxHxLxK.shape[-1] ** -0.5, k_BxHxLxK, v_BxHxLxK, mask_Bx1xLxL), 1, 2)


def _splash(q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, segments_BxL, placed):
    """The same of scaled queries; rows are filled up to whole blocks of the kernel's."""
    length = segments_BxL.shape[1]
    missing = -length % _SPLASH_BLOCK
    segments_BxL = jnp.pad(segments_BxL, ((0, 0), (0, missing)), constant_values=-1)
    heads_first = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))
        for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK)
    )
    kernel = functools.partial(
        jax.lax.platform_dependent,
        tpu=functools.partial(_splash_kernel, interpret=False),
        default=functools.partial(_splash_kernel, interpret=True),
    )
    if placed is not None:  # XLA cannot split a kernel over devices by itself
        rows, _, heads = placed.spec
        split = P(rows, heads)
        kernel = jax.shard_map(
            kernel, mesh=placed.mesh, in_specs=(split, split, split, P(rows)), out_specs=split, check_vma=False
        )
    return jnp.swapaxes(kernel(*heads_first, segments_BxL), 1, 2)[:, :length]


def _splash_kernel(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL, *, interpret):
    # Imported where it is used: it takes a second, and nothing but a TPU has use for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, length, _ = q_BxHxLxK.shape
    block = next(size for size in (512, 384, 256, _SPLASH_BLOCK) if length % size == 0)
    names = [field.name for field in dataclasses.fields(splash.BlockSizes) if field.name.startswith("block_")]
    attend_row = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q_HxLxK, k_HxLxK, v_HxLxK, segments_L):
        return attend_row(q_HxLxK, k_HxLxK, v_HxLxK, segment_ids=splash.SegmentIds(segments_L, segments_L))

    return jax.vmap(row)(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, segments_BxL)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _plain(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, mask_Bx1xLxL):
    """The same of scaled queries, heads before tokens; its gradient divides where there are K numbers, not L."""
    return _plain_forward(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, mask_Bx1xLxL)[0]


def _plain_forward(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, mask_Bx1xLxL):
    logits_BxHxLxL = jnp.where(mask_Bx1xLxL, _product("bhlk,bhmk->bhlm", q_BxHxLxK, k_BxHxLxK), _NEVER)
    shifted_BxHxLxL = jnp.exp(logits_BxHxLxL - jnp.max(logits_BxHxLxL, axis=-1, keepdims=True))
    total_BxHxLx1 = jnp.sum(shifted_BxHxLxL, axis=-1, keepdims=True)
    shifted_BxHxLxL = shifted_BxHxLxL.astype(v_BxHxLxK.dtype)
    heads_BxHxLxK = _product("bhlm,bhmk->bhlk", shifted_BxHxLxL, v_BxHxLxK) / total_BxHxLx1
    heads_BxHxLxK = heads_BxHxLxK.astype(v_BxHxLxK.dtype)
    return heads_BxHxLxK, (q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, heads_BxHxLxK, shifted_BxHxLxL, total_BxHxLx1)


def _plain_backward(kept, gradient_BxHxLxK):
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, heads_BxHxLxK, shifted_BxHxLxL, total_BxHxLx1 = kept
    dtype = v_BxHxLxK.dtype
    scaled_BxHxLxK = gradient_BxHxLxK / total_BxHxLx1  # of the sum over tokens before it was divided
    own_BxHxLx1 = jnp.sum(scaled_BxHxLxK * heads_BxHxLxK, axis=-1, keepdims=True, dtype=jnp.float32)
    scaled_BxHxLxK = scaled_BxHxLxK.astype(dtype)
    slope_BxHxLxL = _product("bhlk,bhmk->bhlm", scaled_BxHxLxK, v_BxHxLxK) - own_BxHxLx1
    slope_BxHxLxL = (shifted_BxHxLxL * slope_BxHxLxL).astype(dtype)
    return (
        _product("bhlm,bhmk->bhlk", slope_BxHxLxL, k_BxHxLxK).astype(dtype),
        _read_by(slope_BxHxLxL, q_BxHxLxK).astype(dtype),
        _read_by(shifted_BxHxLxL, scaled_BxHxLxK).astype(dtype),
        None,
    )


def _read_by(weight_BxHxLxL, x_BxHxLxK):
    """The transposed weights times x; what XLA is given to transpose is x, the small one of the two."""
    x_BxHxKxL = jnp.swapaxes(x_BxHxLxK, 2, 3)
    return jnp.swapaxes(_product("bhkl,bhlm->bhkm", x_BxHxKxL, weight_BxHxLxL), 2, 3)


_plain.defvjp(_plain_forward, _plain_backward)
