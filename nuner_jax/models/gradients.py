"""Functions whose gradient is written here, because XLA's compiler for CPUs makes a slow program of JAX's own.

Values and gradients are the same, up to the order of sums. What is particular to CPUs is left out on other platforms.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the normal distribution's share below x (Hendrycks and Gimpel 2016), float32 inside.

    Its slope is found beside it and kept for the backward pass, in place of x: as large, and nothing is computed twice.
    `jax.nn.gelu` keeps digits of values near zero that a sum with others loses again, and takes twice as long on CPUs.
    """
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    below = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5)
    density = (2 * math.pi) ** -0.5 * jnp.exp(-0.5 * wide * wide)
    return (wide * below).astype(x.dtype), (below + wide * density).astype(x.dtype)


gelu.defvjp(_gelu_and_slope, lambda slope, gradient: (gradient * slope,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """x [*rows, *inputs] times kernel [*inputs, *outputs], `axes` of which are inputs: [*rows, *outputs].

    The kernel's gradient multiplies two arrays that both stand by rows, so one of them must be turned. XLA for CPUs
    does it within the product, or within what makes the array, and is slow at both. Here the narrower one is turned
    alone, which takes a few hundredths of the product's time.
    """
    return jnp.tensordot(x, kernel, axes)


def _product_backward(axes, kept, gradient):
    x, kernel = kept
    rows = x.ndim - axes
    of_outputs = (tuple(range(rows, gradient.ndim)), tuple(range(axes, kernel.ndim)))
    to_kernel = jax.lax.platform_dependent(
        x.reshape(-1, *x.shape[rows:]), gradient.reshape(-1, *gradient.shape[rows:]), cpu=_turned_first, default=_turned
    )
    return jnp.tensordot(gradient, kernel, of_outputs), to_kernel


def _turned(x, y):
    """[N, *inputs] and [N, *outputs] -> [*inputs, *outputs]."""
    return jnp.tensordot(x, y, (0, 0))


def _turned_first(x, y):
    if x.size > y.size:
        return jnp.moveaxis(_turned_first(y, x), range(y.ndim - 1), range(1 - y.ndim, 0))
    turned = jax.lax.optimization_barrier(jnp.moveaxis(x, 0, -1))
    return jax.lax.optimization_barrier(jnp.tensordot(turned, y, 1))


product.defvjp(lambda x, kernel, axes: (jnp.tensordot(x, kernel, axes), (x, kernel)), _product_backward)


@jax.custom_vjp
def settled(x: jax.Array) -> jax.Array:
    """x, whose gradient is written down before anything else is done with it.

    XLA for CPUs else computes it anew for every element of what is turned, in an order that is ten times as slow.
    """
    return x


def _settled_backward(_, gradient):
    return (jax.lax.platform_dependent(gradient, cpu=jax.lax.optimization_barrier, default=lambda x: x),)


settled.defvjp(lambda x: (x, None), _settled_backward)
