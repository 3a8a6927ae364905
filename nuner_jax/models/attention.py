"""Self-attention in several implementations of the same: which of them is fast depends on the platform.

    heads = softmax(q k' / sqrt(K), over what the mask allows) v

The softmax is float32 in all of them. Shapes: B rows of L tokens, H heads of K numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from nuner_jax.errors import NunerError

IMPLEMENTATIONS = ("plain", "xla", "cudnn")
"""Ours, and those of `jax.nn.dot_product_attention`; "cudnn" is flash attention on NVIDIA GPUs, bfloat16 only."""

_NEVER = -1e30  # logit of a token that the mask excludes


def fastest(platform: str) -> str:
    """The implementation for "cpu", "gpu" or "tpu"; "cudnn" is left to who asks for it.

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
    q_BxLxHxK: jax.Array, k_BxLxHxK: jax.Array, v_BxLxHxK: jax.Array, mask_Bx1xLxL: jax.Array, implementation: str
) -> jax.Array:
    """What each token reads from those that the mask (bool, at least one for each token) allows: [B, L, H, K]."""
    if implementation != "plain":
        return jax.nn.dot_product_attention(
            q_BxLxHxK, k_BxLxHxK, v_BxLxHxK, mask=mask_Bx1xLxL, implementation=implementation
        )
    q_BxHxLxK, k_BxHxLxK, v_BxHxLxK = (jnp.swapaxes(x, 1, 2) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    return jnp.swapaxes(_plain(q_BxHxLxK * q_BxHxLxK.shape[-1] ** -0.5, k_BxHxLxK, v_BxHxLxK, mask_Bx1xLxL), 1, 2)


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
