"""Functions with gradients of our own: the same as those of JAX, and what is made for CPUs is for CPUs alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuner_jax.models.gradients import gelu, product, settled


def test_gelu_and_its_gradient_are_the_exact_ones():
    x_N = jnp.concatenate([jnp.linspace(-12, 12, 4001), jnp.array([0.0, -0.0, 1e-30, 40.0, -40.0])])
    ours, slope = (f(x_N) for f in (gelu, jax.vmap(jax.grad(gelu))))
    exact = functools.partial(jax.nn.gelu, approximate=False)
    np.testing.assert_allclose(ours, exact(x_N), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(exact))(x_N), rtol=1e-6, atol=1e-6)
    x_N = x_N.astype(jnp.bfloat16)
    assert gelu(x_N).dtype == jnp.bfloat16
    np.testing.assert_allclose(gelu(x_N).astype("float32"), exact(x_N.astype("float32")), rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize(
    "rows, inputs, outputs",
    [
        ((3, 5), (4,), (16,)),
        ((3, 5), (16,), (4,)),
        ((3, 5), (8,), (3, 2, 4)),
        ((15,), (2, 4), (8,)),
        ((3,), (4, 4), (2,)),
    ],
)
@pytest.mark.parametrize("dtype, close", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_product_and_its_gradients_are_those_of_jax(rows, inputs, outputs, dtype, close):
    random = np.random.default_rng(0)
    x, kernel, weight = (
        jnp.asarray(random.standard_normal(shape), dtype) for shape in (rows + inputs, inputs + outputs, rows + outputs)
    )

    def value_and_gradients(multiply):
        value, pull = jax.jit(lambda x, kernel: jax.vjp(multiply, x, kernel))(x, kernel)
        return value, *pull(weight)

    ours = value_and_gradients(lambda x, kernel: product(x, kernel, len(inputs)))
    exact = value_and_gradients(lambda x, kernel: jnp.tensordot(x, kernel, len(inputs)))
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        np.testing.assert_allclose(mine.astype("float32"), theirs.astype("float32"), rtol=close, atol=close)


def test_what_is_settled_keeps_its_value_and_gradient():
    x_N = jnp.arange(4.0)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: settled(x) ** 3)))(x_N)
    np.testing.assert_allclose(value, x_N**3)
    np.testing.assert_allclose(slope, 3 * x_N**2)


@pytest.mark.parametrize("platform, barriers", [("cpu", 3), ("tpu", 0), ("cuda", 0)])
def test_only_programs_for_cpus_turn_and_settle_by_themselves(platform, barriers):
    def gradients(x, kernel):
        return jax.grad(lambda x, kernel: product(settled(x), kernel, 1).sum(), argnums=(0, 1))(x, kernel)

    traced = jax.jit(gradients).trace(jnp.ones((8, 4)), jnp.ones((4, 16)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("optimization_barrier") == barriers
