"""Heads: all seeds at once give what each alone gives; few programs serve all sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuner_jax.fewshot import heads
from nuner_jax.fewshot.heads import HeadOptions

OPTIONS = HeadOptions(kind="mlp", width=16, steps=20, lr=1e-2, weight_decay=0.1, batch=64, balance=0.5)
LINEAR = HeadOptions(kind="linear", width=16, steps=20, lr=1e-2, weight_decay=0.1, batch=64, balance=0.0)


@pytest.fixture(scope="module")
def pool():
    """900 words of width 12 in 4 classes that a line does not part, most of them outside, as in text."""
    rng = np.random.default_rng(0)
    labels_W = rng.choice(4, 900, p=[0.7, 0.1, 0.1, 0.1]).astype(np.int32)
    centres_Cx2xD = rng.normal(size=(4, 2, 12)) * 3
    features_WxD = centres_Cx2xD[labels_W, rng.integers(0, 2, 900)] + rng.normal(size=(900, 12)) + 5
    return features_WxD.astype(np.float32), labels_W


def train(pool, supports, seeds, options=OPTIONS, num_types=3):
    return heads.train_heads(*pool, supports, num_types=num_types, options=options, seeds=seeds)


def logits(trained, head, features_WxD):
    layers = jax.tree.map(lambda leaf: leaf[head], trained.layers)
    return heads.apply_layers(layers, (features_WxD - trained.mean_HxD[head]) * trained.scale_HxD[head])


def plain_loop(pool, support, seed, options, num_types=3):
    """One head, trained update by update: no padding, no vmap, no scan. Logits of all words."""
    features_WxD, labels_W = pool
    x = features_WxD[support]
    mean, deviation = x.mean(0), np.sqrt(x.var(0) + 1e-5)
    weight_W = (np.maximum(1, np.bincount(labels_W[support])) ** -options.balance)[labels_W]
    layers = heads.init_layers(seed, x.shape[1], num_types + 1, options)

    def forward(layers, x):
        *inner, (kernel, bias) = layers
        for k, b in inner:
            x = jax.nn.gelu(x @ k + b, approximate=False)
        return x @ kernel + bias

    @jax.jit
    @jax.grad
    def gradient_of(layers, x, labels, weights):
        each = optax.softmax_cross_entropy_with_integer_labels(forward(layers, x), labels)
        return (weights * each).sum() / weights.sum()

    @jax.jit
    def adamw(layers, first, second, gradient, step):
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        rate = options.lr * 0.5 * (1 + jnp.cos(jnp.pi * step / options.steps))

        def change(p, m, v):
            ratio = m / (1 - 0.9 ** (step + 1)) / (jnp.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
            return p - rate * (ratio + (options.weight_decay * p if p.ndim > 1 else 0))

        return jax.tree.map(change, layers, first, second), first, second

    first = second = jax.tree.map(jnp.zeros_like, layers)
    order, waiting = np.random.default_rng(seed), np.zeros(0, int)
    for step in range(options.steps):
        batch = support
        if len(support) > options.batch:
            while len(waiting) < options.batch:
                waiting = np.concatenate([waiting, order.permutation(support)])
            batch, waiting = waiting[: options.batch], waiting[options.batch :]
        x = (features_WxD[batch] - mean) / deviation
        gradient = gradient_of(layers, x, labels_W[batch], weight_W[batch])
        layers, first, second = adamw(layers, first, second, gradient, step)
    return forward(layers, (features_WxD - mean) / deviation)


@pytest.mark.parametrize("options", [OPTIONS, LINEAR], ids=["mlp", "linear"])
@pytest.mark.parametrize("sizes", [(40, 9), (300, 130, 20)], ids=["one batch", "minibatches"])
def test_heads_trained_together_equal_each_in_a_plain_loop(pool, options, sizes):
    rng = np.random.default_rng(1)
    # Some words of every class: a class without any has gradients of rounding errors, which AdamW makes large.
    some = np.concatenate([np.flatnonzero(pool[1] == label)[:2] for label in range(4)])
    supports = [np.union1d(some, rng.choice(900, size, replace=False)) for size in sizes]
    seeds = [7 + number for number in range(len(sizes))]
    trained = train(pool, supports, seeds, options)
    for head, (support, seed) in enumerate(zip(supports, seeds, strict=True)):
        wanted_WxC = plain_loop(pool, support, seed, options)
        np.testing.assert_allclose(logits(trained, head, pool[0]), wanted_WxC, atol=1e-4)


def test_what_a_line_does_not_part_is_learnt_by_two_layers(pool):
    support, query = np.arange(600), slice(600, 900)
    options = HeadOptions(kind="mlp", width=64, steps=150, lr=3e-3, weight_decay=0.01, batch=256, balance=0.5)
    linear = HeadOptions(kind="linear", width=64, steps=150, lr=3e-3, weight_decay=0.01, batch=256, balance=0.5)
    accuracy = {}
    for choice in (options, linear):
        (predicted_W,) = heads.predict_heads(train(pool, [support], [0], choice), pool[0][query])
        accuracy[choice.kind] = np.mean(predicted_W == pool[1][query])
    assert accuracy["mlp"] > 0.95 and accuracy["mlp"] > accuracy["linear"]


def test_predictions_are_the_largest_logits_in_any_number_of_words(pool):
    supports = [np.arange(50), np.arange(30, 90), np.arange(10)]
    trained = train(pool, supports, [0, 1, 2])
    many_WxD = np.tile(pool[0], (12, 1))  # more than are classified at once, by eight devices too
    predicted_HxW = heads.predict_heads(trained, many_WxD)
    assert predicted_HxW.shape == (3, len(many_WxD)) and predicted_HxW.dtype == np.int32
    for head in range(3):
        logits_WxC = np.asarray(logits(trained, head, pool[0]))
        sure_W = np.diff(np.sort(logits_WxC, axis=1)[:, -2:])[:, 0] > 1e-3
        wanted_W = logits_WxC.argmax(axis=1)
        for start in range(0, len(many_WxD), 900):
            np.testing.assert_array_equal(predicted_HxW[head, start : start + 900][sure_W], wanted_W[sure_W])
    assert heads.predict_heads(trained, many_WxD[:0]).shape == (3, 0)


def test_balance_finds_more_of_the_rare_types(pool):
    noisy = (pool[0] + np.random.default_rng(2).normal(size=pool[0].shape).astype(np.float32) * 4, pool[1])
    recall = {}
    for balance in (0.0, 1.0):
        options = HeadOptions(kind="linear", width=1, steps=100, lr=1e-2, weight_decay=0.0, batch=512, balance=balance)
        (predicted_W,) = heads.predict_heads(train(noisy, [np.arange(400)], [0], options), noisy[0])
        recall[balance] = np.mean((predicted_W == noisy[1])[noisy[1] > 0])
    assert recall[1.0] > recall[0.0]


def test_classes_that_are_padding_are_never_predicted_and_types_without_a_word_are_harmless(pool):
    outside = np.flatnonzero(pool[1] == 0)[:20]
    trained = train(pool, [outside], [0], num_types=5)
    assert trained.layers[-1][0].shape == (1, 16, 6)
    assert set(np.unique(heads.predict_heads(trained, pool[0]))) <= set(range(6))
    one_word = train(pool, [outside[:1]], [0])  # no feature varies
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one_word))


def test_few_programs_serve_many_sizes(pool):
    heads._train.clear_cache()
    rng = np.random.default_rng(3)
    for size, num_types in ((5, 3), (20, 7), (33, 4), (60, 3)):  # all in one: supports of up to 64 words, 8 classes
        supports = [np.sort(rng.choice(64, size, replace=False)) for _ in range(4)]
        train(pool, supports, range(4), num_types=num_types)
    assert heads._train._cache_size() == 1
    for size in (400, 500):  # both in one more: batches of 64 words of at most 1024
        train(pool, [np.sort(rng.choice(900, size, replace=False)) for _ in range(4)], range(4))
    assert heads._train._cache_size() == 2


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 12), st.integers(0, 5))
def test_batches_visit_every_word_once_an_epoch(words, size, updates, seed):
    support = np.arange(100, 100 + words)
    words_NxB, mask_NxB = heads.batches_of(support, size, updates, seed)
    assert words_NxB.shape == mask_NxB.shape == (updates, size)
    visited = words_NxB[mask_NxB]
    for start in range(0, len(visited) - words + 1, words):
        assert sorted(visited[start : start + words]) == support.tolist()
    assert np.isin(words_NxB, support).all()
    earlier = heads.batches_of(support, size, max(1, updates - 1), seed)[0]
    np.testing.assert_array_equal(earlier, words_NxB[: len(earlier)])
