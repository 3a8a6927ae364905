"""The implementations of the attention against each other, and which one a platform gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nuner_jax import sharding
from nuner_jax.config import pretrain
from nuner_jax.models import attention
from nuner_jax.tasks import text_tower

B, L, H, K = 3, 20, 2, 8


def make_inputs(dtype=jnp.float32):
    """Queries, keys and values whose logits are large, and rows packed with segments of 1 to 20 tokens, some padded."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(3 * rng.standard_normal((B, L, H, K)), dtype) for _ in range(3))
    segments = np.array([[1] * 20, [1] * 7 + [2] + [3] * 9 + [0] * 3, [1] * 2 + [2] * 3 + [0] * 15])
    return (q, k, v), jnp.asarray(segments, jnp.int32)


def value_and_gradients(implementation, inputs, segments, placed=None):
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)

    def weighted(q, k, v):
        heads = attention.attend(q, k, v, segments, implementation, placed)
        return jnp.sum(weights * heads), heads

    (_, heads), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(one, np.float32) for one in (heads, *gradients)]


def test_plain_is_what_jax_computes_and_so_are_its_gradients():
    inputs, segments = make_inputs()
    for plain, xla in zip(*(value_and_gradients(name, inputs, segments) for name in ("plain", "xla")), strict=True):
        np.testing.assert_allclose(plain, xla, rtol=1e-5, atol=1e-5)


def test_splash_is_plain_and_so_are_its_gradients():
    # Rows of 20 tokens fill up a block of 128; longer ones have several.
    inputs, segments = make_inputs()
    longer = [jnp.tile(x, (1, 15, 1, 1)) for x in inputs], jnp.arange(300)[None] // jnp.array([[7], [90], [300]]) + 1
    for batch in ((inputs, segments), longer):
        for splash, plain in zip(*(value_and_gradients(name, *batch) for name in ("splash", "plain")), strict=True):
            np.testing.assert_allclose(splash, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("platform", "kernels"), [("tpu", 1), ("cpu", 0)])
def test_only_a_tpu_is_given_the_kernel(platform, kernels):
    inputs, segments = make_inputs(jnp.bfloat16)
    traced = jax.jit(lambda *batch: attention.attend(*batch, "splash")).trace(*inputs, segments)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call") == kernels


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}])
def test_splash_over_a_mesh_is_that_of_one_device(shape):
    inputs, segments = make_inputs()
    inputs, segments = (
        [jnp.concatenate([x, x, x[:2]]) for x in inputs],
        jnp.concatenate([segments, segments, segments[:2]]),
    )
    placed = sharding.head_sharding(sharding.make_mesh(**({"data": 1} | shape)))
    split = [jax.device_put(x, placed) for x in inputs]
    for many, one in zip(
        value_and_gradients("splash", split, segments, placed),
        value_and_gradients("splash", inputs, segments),
        strict=True,
    ):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)


def test_plain_of_bfloat16_is_that_of_float32_within_its_precision():
    inputs, segments = make_inputs(jnp.bfloat16)
    exact = value_and_gradients("plain", [one.astype(jnp.float32) for one in inputs], segments)
    for near, far in zip(value_and_gradients("plain", inputs, segments), exact, strict=True):
        assert np.abs(near - far).max() < 0.02 * np.abs(far).max()
    assert attention.attend(*inputs, segments, "plain").dtype == jnp.bfloat16


def test_a_token_reads_nothing_of_other_segments():
    (q, k, v), segments = make_inputs()
    heads = attention.attend(q, k, v, segments, "plain")
    changed = attention.attend(q, k.at[1, 7].add(5.0), v.at[1, 7].add(5.0), segments, "plain")
    np.testing.assert_array_equal(heads[1, :7], changed[1, :7])
    np.testing.assert_array_equal(heads[1, 8:], changed[1, 8:])
    np.testing.assert_allclose(heads[1, 7], v[1, 7], rtol=1e-6)  # alone in its segment


@pytest.mark.parametrize(("asked", "given"), [("auto", "plain"), ("xla", "xla")])
def test_the_platform_chooses_unless_the_config_does(asked, given):
    config = pretrain()
    config.model.attention = asked
    assert text_tower.attention(config.model, sharding.make_mesh()) == given
    assert attention.fastest("gpu") == attention.fastest("tpu") == "xla"
