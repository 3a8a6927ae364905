"""The learning rate over a run, and what the optimizer does to each kind of parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nuner_jax.errors import NunerError
from nuner_jax.models import params as params_lib
from nuner_jax.optim import learning_rate, make_optimizer

PEAK, END = 1e-3, 1e-5


def rates(schedule: str, steps, *, warmup_steps=10, total_steps=100, peak=PEAK, end=END) -> np.ndarray:
    rate = learning_rate(schedule, peak=peak, end=end, warmup_steps=warmup_steps, total_steps=total_steps)
    return np.array([float(rate(step)) for step in steps])


@pytest.mark.parametrize(("schedule", "last"), [("cosine", END), ("linear", END), ("constant", PEAK)])
def test_rates_rise_from_nothing_to_the_peak_and_end_where_they_should(schedule, last):
    np.testing.assert_allclose(rates(schedule, [0, 5, 10, 100, 120]), [0, PEAK / 2, PEAK, last, last], atol=1e-9)
    every = rates(schedule, range(101))
    assert (np.diff(every[:11]) > 0).all() and (np.diff(every[10:]) <= 0).all()


def test_decay_is_half_way_in_the_middle_as_its_name_says():
    middle, early = 55, 32
    assert rates("cosine", [middle])[0] == pytest.approx((PEAK + END) / 2, rel=1e-4)
    assert rates("linear", [middle])[0] == pytest.approx((PEAK + END) / 2, rel=1e-4)
    assert rates("cosine", [early])[0] > rates("linear", [early])[0] > (PEAK + END) / 2, "a cosine starts flat"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_update_has_the_peak_rate(schedule):
    assert rates(schedule, [0], warmup_steps=0)[0] == pytest.approx(PEAK)


def test_extreme_runs_have_finite_rates():
    for schedule in ("cosine", "linear", "constant"):
        assert np.isfinite(rates(schedule, range(5), warmup_steps=4, total_steps=4)).all(), "warm-up only"
        assert np.isfinite(rates(schedule, range(2), warmup_steps=0, total_steps=0)).all()
        assert rates(schedule, [3, 50], peak=0.0, end=0.0).tolist() == [0, 0]


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(NunerError, match=r"config\.optim\.schedule: unknown 'cosin'; choose one of cosine, linear"):
        rates("cosin", [0])


def make(rate=1.0, *, weight_decay=0.1, clip_norm=1.0) -> optax.GradientTransformation:
    return make_optimizer(
        optax.constant_schedule(rate), b1=0.9, b2=0.98, eps=1e-6, weight_decay=weight_decay, clip_norm=clip_norm
    )


@pytest.fixture(scope="module")
def encoder_params() -> dict[str, jax.Array]:
    """The real parameters of both towers and the logit, all ones, by path, as the train step passes them."""
    from flax import nnx

    from nuner_jax.models.encoder import EncoderConfig
    from nuner_jax.models.towers import TwoTower

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = EncoderConfig.from_hf(
        {"model_type": "bert", "vocab_size": 12, "max_position_embeddings": 9, "type_vocab_size": 2, "pad_token_id": 0}
        | sizes
    )

    def build():
        options = {"frozen_layers": 0, "concept_pooling": "mean", "dtype": jnp.float32, "attention": "xla"}
        towers = TwoTower(config, config, scale=1.0, bias=0.0, rngs=nnx.Rngs(0), **options)
        return params_lib.split(towers)[1]

    abstract = params_lib.flatten(jax.eval_shape(build))
    return {path: jnp.ones(leaf.shape) for path, leaf in abstract.items()}


def test_decay_shrinks_matrices_and_embeddings_alone(encoder_params):
    optimizer = make(rate=1.0, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, encoder_params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(encoder_params), encoder_params)
    decayed = {path for path, update in updates.items() if np.all(update != 0)}
    untouched = {path for path, update in updates.items() if np.all(update == 0)}
    assert decayed | untouched == set(updates)
    for path in decayed:
        np.testing.assert_allclose(updates[path], -0.1, rtol=1e-6)
    text = {path.removeprefix("text/") for path in decayed if path.startswith("text/")}
    assert text == {
        *(f"embeddings/{name}/embedding" for name in ("word", "position", "type")),
        *(f"layers/0/{name}/kernel" for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down")),
    }
    assert {
        "text/layers/0/attention/qkv/bias",
        "text/embeddings/norm/scale",
        "logit/log_scale",
        "logit/bias",
    } <= untouched
    assert updates["text/layers/0/attention/qkv/bias"].ndim == 3, "a bias with the shape of a matrix"
    assert {path.replace("concept/", "text/") for path in decayed} == {p for p in decayed if p.startswith("text/")}


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
    params = {"a/kernel": jnp.zeros((2, 2)), "b/bias": jnp.zeros(5)}
    optimizer = make(clip_norm=1.5)

    def first_moment(grads) -> np.ndarray:
        _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        [adam] = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(adam.mu)]) / (1 - 0.9)

    large = {"a/kernel": jnp.full((2, 2), 2.0), "b/bias": jnp.full(5, 2.0)}  # norm 6
    np.testing.assert_allclose(first_moment(large), 0.5, rtol=1e-5)
    small = jax.tree.map(lambda g: g / 6, large)  # norm 1
    np.testing.assert_allclose(first_moment(small), 1 / 3, rtol=1e-5)


def test_an_update_is_adam_in_the_direction_of_descent():
    params = {"a/kernel": jnp.ones((3, 2)), "b/bias": jnp.ones(3)}
    optimizer, grads = make(rate=0.01, weight_decay=0.0), {"a/kernel": jnp.full((3, 2), 0.1), "b/bias": -jnp.ones(3)}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], -0.01, rtol=1e-3)  # the first step of Adam has the size of the rate
    np.testing.assert_allclose(updates["b/bias"], 0.01, rtol=1e-3)
