"""What a step costs: held to numbers counted by hand, and to what XLA counts in its own programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nuner_jax import losses, sharding
from nuner_jax.models.encoder import Encoder, EncoderConfig
from nuner_jax.models.params import merge, split
from nuner_jax.performance import costs

ROBERTA_BASE = EncoderConfig(
    model_type="roberta",
    vocab_size=50265,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    intermediate_size=3072,
    max_positions=514,
    position_offset=2,
    type_vocab_size=1,
    pad_token_id=1,
)
SMALL = EncoderConfig(
    model_type="bert",
    vocab_size=100,
    hidden_size=384,
    num_layers=2,
    num_heads=12,
    intermediate_size=1536,
    max_positions=64,
    position_offset=0,
    type_vocab_size=1,
    pad_token_id=0,
)
WEIGHTS = 84_934_656  # of RoBERTa-base's 12 layers: 12 (4 x 768^2 + 2 x 768 x 3072)
TOKENS = 4 * 512


def base(frozen_layers=0, itemsize=2):
    return costs.encoder(ROBERTA_BASE, costs.whole(4, 512), frozen_layers=frozen_layers, itemsize=itemsize)


def test_a_forward_pass_of_roberta_base_is_two_operations_a_weight_and_token_and_its_attention():
    attention = 12 * 4 * TOKENS * 512 * 768  # layers, two products of a multiplication and an addition, L x D a token
    assert base()["trained"].forward.operations == 2 * WEIGHTS * TOKENS + attention
    assert base()["frozen"].both == costs.Cost()
    assert base()["embeddings"].both.operations == 0


def test_a_backward_pass_is_twice_that_and_frozen_layers_have_none():
    whole, half = base()["trained"], base(frozen_layers=6)
    assert whole.backward.operations == 2 * whole.forward.operations
    assert half["frozen"].forward.operations == half["trained"].forward.operations == whole.forward.operations / 2
    assert half["frozen"].backward == costs.Cost() and half["embeddings"].backward == costs.Cost()
    # The lowest trained layer needs no gradient of its input, which only its first product would make.
    spared = 2 * TOKENS * 768 * (3 * 768)
    assert half["trained"].backward.operations == whole.backward.operations / 2 - spared
    assert base(frozen_layers=12)["trained"].both == costs.Cost()


def test_parameters_are_read_in_float32_and_their_gradients_written():
    part = base()["trained"]
    assert part.forward.parameter_bytes == 4 * WEIGHTS
    assert part.backward.parameter_bytes == 2 * 4 * WEIGHTS
    two = costs.encoder(ROBERTA_BASE, costs.whole(2, 512, passes=2), frozen_layers=0, itemsize=2)["trained"]
    assert two.forward.parameter_bytes == 2 * 4 * WEIGHTS, "once for each micro-batch"
    assert two.both.operations == part.both.operations
    assert (
        two.both.activation_bytes == part.both.activation_bytes == base(itemsize=4)["trained"].both.activation_bytes / 2
    )


def flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@functools.cache
def small_encoder():
    graphdef, params = split(nnx.eval_shape(lambda: Encoder(SMALL, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    rows = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    return (
        functools.partial(lambda graphdef, params, *rows, **o: merge(graphdef, params)(*rows, **o), graphdef),
        params,
        rows,
    )


def test_xla_counts_as_many_operations_in_the_compiled_encoder():
    encode, params, rows = small_encoder()
    counted = costs.encoder(SMALL, costs.whole(2, 64), frozen_layers=0, itemsize=4)["trained"]
    assert counted.forward.operations == pytest.approx(flops(encode, params, rows, rows), rel=0.05)


@pytest.mark.parametrize("frozen_layers", [0, 1])
def test_xla_counts_as_many_operations_in_its_gradient(frozen_layers):
    encode, params, rows = small_encoder()

    def gradient(params, tokens, segments):
        def loss(params):
            return jnp.sum(encode(params, tokens, segments, stop_gradient_layers=frozen_layers) ** 2)

        return jax.grad(loss)(params)

    parts = costs.encoder(SMALL, costs.whole(2, 64), frozen_layers=frozen_layers, itemsize=4)
    assert costs.total(parts.values()).operations == pytest.approx(flops(gradient, params, rows, rows), rel=0.05)


def test_xla_counts_as_many_operations_in_the_loss():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    tokens, concepts, width = 2 * 64, 4 * 32, 384

    def loss(vectors, scored, ids, pairs):
        sums = losses.contrastive_loss(mesh, vectors[0], scored, vectors[1], ids, pairs, pairs, 1.0, 0.0)
        return sums["loss"]

    vectors = jax.ShapeDtypeStruct((2, 64, width), jnp.float32), jax.ShapeDtypeStruct((4, 32, width), jnp.float32)
    scored = jax.ShapeDtypeStruct((2, 64), jnp.bool_)
    ids, pairs = jax.ShapeDtypeStruct((4, 32), jnp.int32), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    counted = costs.contrastive_loss(tokens * concepts, tokens + concepts, width, 4).both.operations
    assert counted == 6 * tokens * concepts * width
    assert counted == pytest.approx(flops(jax.grad(loss), vectors, scored, ids, pairs), rel=0.05)


def test_what_is_useful_are_tokens_and_attention_within_their_segments():
    segments = np.array([[[1, 1, 2, 0], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]]])
    assert costs.within(segments) == costs.Load(tokens=8, attended=2**2 + 1 + 1 + 4**2, passes=2)
    assert costs.whole(2, 4, passes=2) == costs.Load(tokens=16, attended=64, passes=2)


def test_a_head_on_a_frozen_encoder_has_no_gradient_of_its_input():
    load = costs.Load(10, 0)
    trained, alone = (costs.head(load, [(8, 6), (6, 3)], below) for below in (True, False))
    assert trained.forward.operations == alone.forward.operations == 2 * 10 * (8 * 6 + 6 * 3)
    assert trained.backward.operations == 2 * trained.forward.operations
    assert alone.backward.operations == trained.backward.operations - 2 * 10 * 8 * 6


def test_the_floor_is_the_slower_of_products_and_memory_and_devices_share_all_but_parameters():
    rates = {"matrix_rate": 100.0, "bandwidth": 10.0}
    assert costs.Cost(1000, 20, 30).seconds(**rates) == 10
    assert costs.Cost(100, 20, 30).seconds(**rates) == 5
    assert costs.Cost(100, 20, 30).seconds(**rates, devices=4) == (20 / 4 + 30) / 10
    assert costs.Cost(10_000, 20, 30).seconds(**rates, devices=4) == 25


def test_the_optimizer_moves_32_bytes_a_parameter():
    assert costs.optimizer(1000).both == costs.Cost(0, 0, 32_000)
