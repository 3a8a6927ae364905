"""The few sentences that an encoder may learn from: k~2k and kw sampling.

A sample depends on the counts of the pool, k and the seed alone, so every encoder sees the same sentences, and
anyone can draw them again and compare the hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nuner_jax.data.ner.datasets import TaggedSet
from nuner_jax.data.ner.words import label_words, word_spans
from nuner_jax.errors import NunerError

RULES = {"k~2k": "mentions", "kw": "words"}  # what each counts, per type
_BLOCK = 256  # sentences looked at together


@dataclass(frozen=True, slots=True)
class Sample:
    """Sentences of a pool.

    ids: their numbers in the pool, ascending.
    hash: names the ids: the first 16 hexadecimal digits of a sha256.
    reached: how many mentions (kw: words) of each type they have.
    short: the types of which the whole pool has fewer than k.
    blocked: the types of which the pool has k, and the sample fewer, because every sentence left would lift some
      type beyond 2k.
    """

    ids: tuple[int, ...]
    hash: str
    reached: tuple[int, ...]
    short: tuple[int, ...]
    blocked: tuple[int, ...]


def pool_counts(pool: TaggedSet, rule: str) -> np.ndarray:
    """What each sentence of the training pool has of each type: int32 [S, T], mentions (k~2k) or words (kw).

    Raises:
      NunerError: there is no such rule.
    """
    _check_rule(rule)
    numbers = {name: number for number, name in enumerate(pool.types, start=1)}
    counts_SxT = np.zeros((len(pool.train), len(pool.types)), np.int32)
    for row_T, record in zip(counts_SxT, pool.train, strict=True):
        if rule == "kw" and record.entities:
            labels_W = label_words(record, word_spans(record.text, pool.split_on_space), numbers)
            row_T += np.bincount(labels_W, minlength=len(numbers) + 1)[1:].astype(np.int32)
        elif rule == "k~2k":
            for entity in record.entities:
                row_T[numbers[entity.concept] - 1] += 1
    return counts_SxT


def sample_sentences(counts_SxT: np.ndarray, k: int, seed: int, rule: str = "k~2k") -> Sample:
    """Draws sentences until every type has at least k mentions, none more than 2k (NuNER, section 4; Few-NERD).

    The sentences come in a random order, and each is added unless it would lift a type above 2k, until every type
    has k of what the pool has. A sentence without a mention lifts none, so it is added like any other: a sample has
    about the share of such sentences that the pool has, and they show heads what is outside. (Rules that draw for
    one type after another, as those of Few-NERD's episodes, never take such a sentence.)

    Where k cannot be reached, the sample ends with the last sentence that brought a type nearer to it, so that it
    does not fill up with the rest of the pool; those that were skipped, bring a type nearer to k and fit now are then
    added in their order.

    Args:
      counts_SxT: mentions of each type in each sentence of the pool, or their words for the rule kw.
      k: 0 draws nothing.
      seed: not negative. The order is a pure function of (k, seed) and the size of the pool.
      rule: one of `RULES`; both draw alike, from other counts.

    Raises:
      NunerError: the pool is empty or has no mention, k or seed is negative, or there is no such rule.
    """
    _check_rule(rule)
    if k < 0 or seed < 0:
        raise NunerError(f"k = {k}, seed = {seed}: neither may be negative")
    pool_T = counts_SxT.sum(axis=0)
    if not pool_T.any():
        raise NunerError(f"the pool of {len(counts_SxT):,} sentences has no mention: there is nothing to sample")
    keys_S = np.random.Generator(np.random.Philox(key=[seed, k])).random(len(counts_SxT))
    ids = np.sort(_draw(np.argsort(keys_S, kind="stable"), counts_SxT, np.minimum(pool_T, k), 2 * k))
    reached_T = counts_SxT[ids].sum(axis=0)
    return Sample(
        ids=tuple(ids.tolist()),
        hash=hash_ids(ids.tolist()),
        reached=tuple(reached_T.tolist()),
        short=tuple(np.flatnonzero(pool_T < k).tolist()),
        blocked=tuple(np.flatnonzero((reached_T < k) & (pool_T >= k)).tolist()),
    )


def hash_ids(ids: Sequence[int]) -> str:
    """The hash of a sample: of its ids in ascending order, and of nothing else."""
    return hashlib.sha256(",".join(map(str, sorted(ids))).encode()).hexdigest()[:16]


def shortages(
    samples: Mapping[tuple[int, int], Sample], counts_SxT: np.ndarray, types: Sequence[str], rule: str = "k~2k"
) -> list[str]:
    """What keeps samples of a pool from k of every type, a line for each reason; none if nothing does.

    Args:
      samples: by (k, seed).
      counts_SxT: as for `sample_sentences`.
      types: their names.
      rule: that of the samples.
    """
    pool_T, unit, lines = counts_SxT.sum(axis=0), RULES[rule], []
    of_k: dict[int, dict[int, Sample]] = {}
    for (k, seed), sample in samples.items():
        of_k.setdefault(k, {})[seed] = sample
    short = {k: next(iter(seeds.values())).short for k, seeds in of_k.items()}  # the pool's, so of every seed
    if any(short.values()):
        told = (f"k = {k}: {_counted(short[k], pool_T, types)}" for k in of_k if short[k])
        where = f"in all {len(counts_SxT):,} sentences of the pool"
        lines.append(f"k is larger than the number of {unit} of some types {where}: {'; '.join(told)}")
    told = []
    for k, seeds in of_k.items():
        if blocked := [seed for seed, sample in seeds.items() if sample.blocked]:
            sample = seeds[blocked[0]]
            found = _counted(sample.blocked, sample.reached, types)
            told.append(f"k = {k}: {len(blocked)} of {len(seeds)} samples, seed {blocked[0]} with {found}")
    if told:
        why = "as every sentence left would lift a type above 2k"
        lines.append(f"samples with fewer than k {unit} of a type, {why}: {'; '.join(told)}")
    return lines


def _counted(chosen: Sequence[int], count_T: Sequence[int], types: Sequence[str]) -> str:
    return ", ".join(f"{types[t]} {count_T[t]}" for t in chosen)


def _draw(order_S: np.ndarray, counts_SxT: np.ndarray, goal_T: np.ndarray, limit: int) -> np.ndarray:
    """The sentences drawn, in the order of drawing."""
    drawn = _walk(order_S, counts_SxT, goal_T, limit)
    have_T = counts_SxT[drawn].sum(axis=0)
    left = order_S[~np.isin(order_S, drawn)]
    while True:
        counts_LxT = counts_SxT[left]
        fits, helps = (counts_LxT + have_T <= limit).all(axis=1), ((counts_LxT > 0) & (have_T < goal_T)).any(axis=1)
        left = left[fits & helps]
        if not left.size:
            return drawn
        drawn, have_T, left = np.append(drawn, left[0]), have_T + counts_SxT[left[0]], left[1:]


def _walk(order_S: np.ndarray, counts_SxT: np.ndarray, goal_T: np.ndarray, limit: int) -> np.ndarray:
    """The sentences that fit, up to the last one that helps: one after another in meaning, many at once in effect."""
    have_T = np.zeros(counts_SxT.shape[1], np.int64)
    drawn, size, useful = [order_S[:0]], 0, 0
    for start in range(0, len(order_S), _BLOCK):
        block = order_S[start : start + _BLOCK]
        while True:
            # What does not fit now never will, as counts only grow.
            block = block[(counts_SxT[block] + have_T <= limit).all(axis=1)]
            if not block.size or (have_T >= goal_T).all():
                break
            counts_BxT = counts_SxT[block]
            after_BxT = have_T + np.cumsum(counts_BxT, axis=0)
            over = (after_BxT > limit).any(axis=1)
            take = int(over.argmax()) if over.any() else block.size  # at least 1: the first one fits
            helps = ((after_BxT - counts_BxT < goal_T) & (counts_BxT > 0))[:take].any(axis=1)
            if helps.any():
                useful = size + int(np.flatnonzero(helps)[-1]) + 1
            drawn.append(block[:take])
            size += take
            have_T = after_BxT[take - 1]
            block = block[take + 1 :]
    return np.concatenate(drawn)[:useful]


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise NunerError(f"rule {rule!r}: choose one of {', '.join(map(repr, RULES))}")
