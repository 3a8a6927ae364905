"""Heads on frozen features: those of all seeds train together, in one compiled program.

A head is a classifier of words, class 0 being outside and 1 to T the types: linear, or two layers with a GELU between
them. Its features are standardised by the mean and deviation of its own support. The heads of one set and k differ in
seed and support alone, so that `jax.vmap` trains them side by side. Sizes are padded to powers of two, and a program
serves many sets and k.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nuner_jax import sharding

# Words that a device classifies at once. A CPU is fastest while the activations of all heads stay in its cache.
_WORDS_ON_CPU, _WORDS_ON_ACCELERATOR = 1024, 16384
_FEWEST_CLASSES = 8  # programs are made for this many classes, or a power of two times it
_FEWEST_WORDS = 64  # likewise for words
_NEVER = -1e9  # logit of a class that is there as padding alone
_EPSILON = 1e-5  # added to the variance of a feature, which may be constant in a support of few words


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """How heads are made and trained; the keys `config.head`.

    kind: "linear" or "mlp" (two layers).
    width: of the layer between, for "mlp".
    steps: AdamW updates.
    lr: peak learning rate; it falls to zero along a cosine.
    weight_decay: of AdamW, on the kernels.
    batch: words per update; a smaller support is one batch.
    balance: a word of a class with n words in the support weighs n ** -balance; 0: all words weigh the same.
    """

    kind: str
    width: int
    steps: int
    lr: float
    weight_decay: float
    batch: int
    balance: float


class Heads(NamedTuple):
    """H trained heads: a word of features f gets the logits of `layers` applied to (f - mean) * scale.

    layers: of each its kernel [H, in, out] and bias [H, out]; the last one's outputs are the T + 1 classes.
    """

    mean_HxD: np.ndarray
    scale_HxD: np.ndarray
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]


# --- Training ----------------------------------------------------------------------------------


def train_heads(
    features_WxD: np.ndarray,
    labels_W: np.ndarray,
    supports: Sequence[np.ndarray],
    *,
    num_types: int,
    options: HeadOptions,
    seeds: Sequence[int],
) -> Heads:
    """Trains one head per support, all at once.

    Args:
      features_WxD: float32, of the pool's words; it may be memory-mapped.
      labels_W: int, 0 for outside, 1 to `num_types`.
      supports: of each head, the words that it learns from: int indices below W, at least one.
      num_types: T.
      options: of the heads.
      seeds: of each head: of its initial parameters and the order of its batches.
    """
    drawn_S = np.unique(np.concatenate(supports))  # what the heads read, of the whole pool
    places = [np.searchsorted(drawn_S, words) for words in supports]
    features_SxD = np.zeros((_power_of_two(drawn_S.size, _FEWEST_WORDS), features_WxD.shape[1]), np.float32)
    features_SxD[: drawn_S.size] = features_WxD[drawn_S]
    labels_S = np.zeros(len(features_SxD), np.int32)
    labels_S[: drawn_S.size] = labels_W[drawn_S]

    mean_HxD = np.stack([features_SxD[words].mean(0) for words in places])
    scale_HxD = np.stack([1 / np.sqrt(features_SxD[words].var(0) + _EPSILON) for words in places])
    largest = max(map(len, places))
    size = min(options.batch, _power_of_two(largest, _FEWEST_WORDS))
    updates = options.steps if largest > size else 1  # a single batch is all there is, at every update
    batches = [batches_of(words, size, updates, seed) for words, seed in zip(places, seeds, strict=True)]
    words_HxNxB = np.stack([words for words, _ in batches])
    weights_HxNxB = np.stack([mask for _, mask in batches]).astype(np.float32)
    for weights_NxB, words_NxB, words in zip(weights_HxNxB, words_HxNxB, places, strict=True):
        counts_C = np.maximum(1, np.bincount(labels_S[words], minlength=num_types + 1))
        weights_NxB *= (counts_C ** -float(options.balance))[labels_S[words_NxB]]

    per_head = (mean_HxD, scale_HxD, words_HxNxB, weights_HxNxB, np.asarray(seeds, np.uint32))
    per_head, shared = _place(per_head, (features_SxD, labels_S, np.int32(num_types + 1)))
    classes = _power_of_two(num_types + 1, _FEWEST_CLASSES)
    layers = _train(*per_head, *shared, options=options, classes=classes)
    *inner, (kernel, bias) = jax.tree.map(lambda leaf: leaf[: len(supports)], jax.device_get(layers))
    return Heads(mean_HxD, scale_HxD, (*inner, (kernel[..., : num_types + 1], bias[..., : num_types + 1])))


def batches_of(words: np.ndarray, size: int, updates: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The words of every update: epochs of the support, each in its own order, divided into batches.

    Args:
      words: the support.
      size: words per batch; a support of fewer is padded with its first word, and the mask is False there.
      updates: number of batches.
      seed: of the order.

    Returns:
      int32 words and bool mask, [updates, size]; the first updates are the same whatever their number.
    """
    if words.size <= size:
        batch_B = np.concatenate([words, np.full(size - words.size, words[0])]).astype(np.int32)
        shape = (updates, size)
        return np.broadcast_to(batch_B, shape), np.broadcast_to(np.arange(size) < words.size, shape)
    order, epochs = np.random.default_rng(seed), -(-updates * size // words.size)
    stream = np.concatenate([order.permutation(words) for _ in range(epochs)])[: updates * size]
    return stream.reshape(updates, size).astype(np.int32), np.ones((updates, size), bool)


def init_layers(seed: jax.Array, inputs: int, classes: int, options: HeadOptions) -> tuple:
    """Random kernels of deviation 1/sqrt(inputs), and zeros for the biases and for the last kernel."""
    if options.kind == "linear":
        return ((jnp.zeros((inputs, classes)), jnp.zeros(classes)),)
    kernel = jax.random.normal(jax.random.key(seed), (inputs, options.width)) / jnp.sqrt(inputs)
    return (kernel, jnp.zeros(options.width)), (jnp.zeros((options.width, classes)), jnp.zeros(classes))


def apply_layers(layers: tuple, x_BxD: jax.Array) -> jax.Array:
    """Logits of one head, [B, classes], of standardised features."""
    *inner, (kernel, bias) = layers
    for inner_kernel, inner_bias in inner:
        x_BxD = jax.nn.gelu(x_BxD @ inner_kernel + inner_bias, approximate=False)
    return x_BxD @ kernel + bias


def make_optimizer(options: HeadOptions) -> optax.GradientTransformation:
    """AdamW along a cosine to zero; biases do not decay."""
    schedule = optax.cosine_decay_schedule(options.lr, options.steps)
    kernels = lambda layers: jax.tree.map(lambda leaf: leaf.ndim > 1, layers)  # noqa: E731
    return optax.adamw(schedule, weight_decay=options.weight_decay, mask=kernels)


def weighted_loss(layers: tuple, x_BxD, labels_B, weights_B, num_classes) -> jax.Array:
    """Cross-entropy over the classes that there are, its weighted mean over words."""
    logits_BxC = apply_layers(layers, x_BxD)
    logits_BxC = jnp.where(jnp.arange(logits_BxC.shape[1]) < num_classes, logits_BxC, _NEVER)
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B)
    return jnp.sum(weights_B * losses_B) / jnp.sum(weights_B)


@functools.partial(jax.jit, static_argnames=("options", "classes"))
def _train(
    mean_HxD, scale_HxD, words_HxNxB, weights_HxNxB, seed_H, features_SxD, labels_S, num_classes, *, options, classes
):
    """The layers of all heads after `options.steps` updates."""
    optimizer = make_optimizer(options)

    def one_head(mean_D, scale_D, words_NxB, weights_NxB, seed):
        layers = init_layers(seed, features_SxD.shape[1], classes, options)

        def update(state, step):
            layers, memory = state
            words_B, weights_B = (array[step % len(array)] for array in (words_NxB, weights_NxB))
            x_BxD = (features_SxD[words_B] - mean_D) * scale_D
            gradient = jax.grad(weighted_loss)(layers, x_BxD, labels_S[words_B], weights_B, num_classes)
            change, memory = optimizer.update(gradient, memory, layers)
            return (optax.apply_updates(layers, change), memory), None

        return jax.lax.scan(update, (layers, optimizer.init(layers)), jnp.arange(options.steps))[0][0]

    return jax.vmap(one_head)(mean_HxD, scale_HxD, words_HxNxB, weights_HxNxB, seed_H)


def _place(per_head: tuple, shared: tuple) -> tuple[tuple, tuple]:
    """The heads split over the devices, padded with copies of the last to a number that divides; the rest on all."""
    mesh = sharding.local_mesh()
    missing = -len(per_head[0]) % sharding.batch_devices(mesh)
    padded = jax.tree.map(lambda array: np.concatenate([array, *[array[-1:]] * missing]), per_head)
    return jax.device_put(padded, sharding.row_sharding(mesh)), jax.device_put(shared, sharding.replicated(mesh))


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


# --- Prediction --------------------------------------------------------------------------------


def predict_heads(heads: Heads, features_WxD: np.ndarray) -> np.ndarray:
    """The class that each head gives each word: int32 [H, W]; of equal logits, the first."""
    mesh = sharding.local_mesh()
    joined = _joined(jax.device_put(heads, sharding.replicated(mesh)))
    per_device = _WORDS_ON_CPU if jax.default_backend() == "cpu" else _WORDS_ON_ACCELERATOR
    size = per_device * sharding.batch_devices(mesh)
    predicted = [np.zeros((len(heads.mean_HxD), 0), np.int32)]
    for start in range(0, len(features_WxD), size):
        chunk_WxD = features_WxD[start : start + size]
        padded_WxD = np.pad(chunk_WxD, ((0, size - len(chunk_WxD)), (0, 0)))
        words = jax.device_put(padded_WxD, sharding.row_sharding(mesh))
        predicted.append(np.asarray(_predict(joined, words))[:, : len(chunk_WxD)])
    return np.concatenate(predicted, axis=1)


@jax.jit
def _joined(heads: Heads) -> tuple:
    """The layers with the standardisation inside the first, whose kernels stand side by side: one product for all."""
    (kernel_HxDxK, bias_HxK), *rest = heads.layers
    scaled_HxDxK = heads.scale_HxD[:, :, None] * kernel_HxDxK
    bias_HxK = bias_HxK - jnp.einsum("hd,hdk->hk", heads.mean_HxD, scaled_HxDxK)
    return (jnp.moveaxis(scaled_HxDxK, 0, 1), bias_HxK), *rest


@jax.jit
def _predict(joined: tuple, features_WxD: jax.Array) -> jax.Array:
    (kernel_DxHxK, bias_HxK), *rest = joined
    x_WxHxK = jnp.tensordot(features_WxD, kernel_DxHxK, 1) + bias_HxK
    for kernel_HxKxC, bias_HxC in rest:
        x_WxHxK = jnp.einsum("whk,hkc->whc", jax.nn.gelu(x_WxHxK, approximate=False), kernel_HxKxC) + bias_HxC
    return jnp.argmax(x_WxHxK, axis=-1).astype(jnp.int32).T
