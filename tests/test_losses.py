"""The sharded loss against its plain reference: value and every gradient, on several meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nuner_jax import losses, sharding

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
R, L, D, Q, S, PAIRS = 8, 12, 16, 8, 5, 6


def make_inputs(seed: int = 0, vocabulary: int = 17) -> dict[str, np.ndarray]:
    """Random inputs in which most concepts occur several times, on different devices, and some pairs' not at all."""
    rng = np.random.default_rng(seed)
    concept_ids = rng.integers(0, vocabulary, (Q, S)).astype(np.int32)
    concept_ids[rng.random((Q, S)) < 0.2] = -1
    positions = np.stack([rng.permutation(L)[:PAIRS] for _ in range(R)]).astype(np.int32)
    positions[rng.random((R, PAIRS)) < 0.3] = -1
    scored = rng.random((R, L)) < 0.7
    np.put_along_axis(scored, np.maximum(positions, 0), True, axis=1)
    return {
        "tokens": rng.normal(size=(R, L, D)).astype(np.float32),
        "scored": scored,
        "concepts": rng.normal(size=(Q, S, D)).astype(np.float32),
        "concept_ids": concept_ids,
        "pair_positions": positions,
        "pair_concepts": rng.integers(0, vocabulary + 3, (R, PAIRS)).astype(np.int32),
    }


def reference(inputs):
    def loss(tokens, concepts, scale, bias):
        sums = losses.contrastive_loss_reference(
            tokens,
            inputs["scored"],
            concepts.reshape(-1, D),
            inputs["concept_ids"].reshape(-1),
            inputs["pair_positions"],
            inputs["pair_concepts"],
            scale,
            bias,
        )
        return sums["loss"], sums

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
        inputs["tokens"], inputs["concepts"], jnp.float32(0.3), jnp.float32(-2.0)
    )


def sharded(inputs, shape, chunk=None):
    if np.prod(shape) == jax.device_count():
        mesh = sharding.make_mesh(*shape)
    else:
        mesh = jax.make_mesh(
            shape, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[: np.prod(shape)]
        )
    placed = {k: jax.device_put(v, NamedSharding(mesh, P(sharding.BATCH_AXES))) for k, v in inputs.items()}

    @jax.jit
    def grads(tokens, concepts, scale, bias, rest):
        def loss(tokens, concepts, scale, bias):
            sums = losses.contrastive_loss(
                mesh,
                tokens,
                rest["scored"],
                concepts,
                rest["concept_ids"],
                rest["pair_positions"],
                rest["pair_concepts"],
                scale,
                bias,
                chunk=chunk,
            )
            return sums["loss"], sums

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(tokens, concepts, scale, bias)

    return grads(placed["tokens"], placed["concepts"], jnp.float32(0.3), jnp.float32(-2.0), placed)


@pytest.mark.parametrize("shape", [(1, 1, 1), *MESHES], ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 7, 20, 40])
def test_value_and_gradients_equal_the_reference_on_every_mesh(shape, chunk):
    inputs = make_inputs()
    (_, expected), expected_grads = reference(inputs)
    (_, actual), actual_grads = sharded(inputs, shape, chunk)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, err_msg=name)
    for name, a, e in zip(("tokens", "concepts", "scale", "bias"), actual_grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_bf16_gradients_do_not_depend_on_the_mesh_beyond_their_last_rounding(shape, chunk):
    inputs = make_inputs()
    for name in ("tokens", "concepts"):
        inputs[name] = inputs[name].astype(jnp.bfloat16)
    (expected, _), expected_grads = sharded(inputs, (1, 1, 1))
    (actual, _), actual_grads = sharded(inputs, shape, chunk)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for a, e in zip(actual_grads[:2], expected_grads[:2], strict=True):
        assert a.dtype == e.dtype == jnp.bfloat16
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        # Sums in another order differ by 1e-7 or so: few of them fall on the other side of a rounding.
        assert np.mean(a != e) < 0.005
        np.testing.assert_allclose(a, e, rtol=2**-7, atol=1e-6)
    for a, e in zip(actual_grads[2:], expected_grads[2:], strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5)


def test_bf16_gradients_are_those_of_the_reference_within_bf16():
    inputs = make_inputs()
    for name in ("tokens", "concepts"):
        inputs[name] = inputs[name].astype(jnp.bfloat16)
    actual_grads = sharded(inputs, (2, 2, 2))[1]
    expected_grads = reference(
        {k: v.astype(np.float32) if k in ("tokens", "concepts") else v for k, v in inputs.items()}
    )[1]
    for a, e in zip(actual_grads[:2], expected_grads[:2], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=2**-7, atol=2**-7 * np.abs(e).max())


def test_memory_does_not_grow_with_the_concepts():
    """Of the compiled program for value and gradients: beside the vectors and their gradients themselves."""

    def temporary_bytes(concepts: int) -> int:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])

        def loss(tokens, concepts, scale, bias, scored, ids, positions, pair_concepts):
            return losses.contrastive_loss(
                mesh, tokens, scored, concepts, ids, positions, pair_concepts, scale, bias, chunk=1024
            )["loss"]

        ints, rows = jnp.int32, 64
        shapes = [(16, 512, 256), (rows, concepts // rows, 256), (), (), (16, 512), (rows, concepts // rows)]
        dtypes = [jnp.float32] * 4 + [bool, ints]
        inputs = map(jax.ShapeDtypeStruct, [*shapes, (16, 64), (16, 64)], [*dtypes, ints, ints])
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(65536) <= 1.3 * temporary_bytes(1024)


def test_the_inputs_repeat_concepts_across_devices():
    ids = make_inputs()["concept_ids"]
    rows = [set(row[row >= 0]) for row in ids]
    assert any(rows[i] & rows[j] for i in range(Q) for j in range(i))


def test_a_repeated_concept_counts_once_and_only_its_first_vector_matters():
    inputs = make_inputs()
    inputs["concept_ids"][:] = 3
    inputs["pair_concepts"][:] = 3
    (value, sums), (_, concept_grad, _, _) = sharded(inputs, (8, 1, 1))
    assert sums["pairs"] == inputs["scored"].sum()
    assert np.abs(concept_grad[0, 0]).max() > 0
    assert np.abs(np.asarray(concept_grad).reshape(-1, D)[1:]).max() == 0
    inputs["concepts"].reshape(-1, D)[1:] += 5.0
    np.testing.assert_array_equal(sharded(inputs, (8, 1, 1))[0][0], value)


def test_the_value_of_a_hand_computed_case():
    tokens = np.array([[[1.0, 0.0], [0.0, 2.0]]], np.float32)
    concepts = np.array([[[3.0, 0.0], [0.0, 1.0]]], np.float32)
    mesh = jax.make_mesh(
        (1, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    sums = losses.contrastive_loss(
        mesh,
        tokens,
        np.array([[True, True]]),
        concepts,
        np.array([[7, 9]], np.int32),
        np.array([[0]], np.int32),
        np.array([[7]], np.int32),
        jnp.float32(1.0),
        jnp.float32(0.5),
    )
    logits = np.array([3.5, 0.5, 0.5, 2.5])  # token 0 with 7, 9; token 1 with 7, 9
    np.testing.assert_allclose(sums["loss"], np.log1p(np.exp(logits)).sum() - 3.5, rtol=1e-6)
    assert (sums["positives"], sums["pairs"], sums["positive_logits"]) == (1, 4, 3.5)


def test_tokens_that_are_not_scored_and_empty_slots_change_nothing():
    inputs = make_inputs()
    before = sharded(inputs, (2, 2, 2))[0][0]
    inputs["tokens"][~inputs["scored"]] = 1e3
    inputs["concepts"][inputs["concept_ids"] < 0] = -1e3
    np.testing.assert_allclose(sharded(inputs, (2, 2, 2))[0][0], before, rtol=1e-6)
