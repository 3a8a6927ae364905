"""A closed set of concepts as ordinary classes: which concepts, and the one label of every token.

Labels: 0 is outside every mention, 1 … M are the classes, the most frequent first, and M + 1 is any other concept where
that is a class too; -1 takes no part in the loss.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from nuner_jax.data import ragged
from nuner_jax.data.corpus import Corpus
from nuner_jax.errors import NunerError

_NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class ClosedSet:
    """The classes, most frequent first; those of equal frequency in the order of their names.

    names: of the concepts.
    mentions: of each in an epoch of training.
    num_concepts: those they were chosen from.
    share: of all mentions of an epoch, those of the classes.
    """

    names: tuple[str, ...]
    mentions: tuple[int, ...]
    num_concepts: int
    share: float


def choose(corpus: Corpus, visits_W: np.ndarray, number: int | None, min_mentions: int) -> ClosedSet:
    """The most frequent concepts of an epoch.

    Args:
      corpus: of training.
      visits_W: how often an epoch visits each sequence.
      number: M, of the classes; None: all concepts that are frequent enough.
      min_mentions: of a class, in an epoch.

    Raises:
      NunerError: too few concepts are frequent enough.
    """
    mentions_C = _mentions_per_epoch(corpus, visits_W)
    enough = int(np.sum(mentions_C >= min_mentions))
    found = (
        f"{enough:,} of the {len(mentions_C):,} concepts have at least config.classes.min_mentions = {min_mentions:,} "
        f"mentions in an epoch"
    )
    if not enough:
        raise NunerError(f"{found}; the most frequent one has {mentions_C.max(initial=0):,}: choose a lower number")
    if number is not None and number > enough:
        raise NunerError(
            f"config.classes.number = {number:,}, but only {found}: choose fewer classes, or None for all of these"
        )
    names = np.array(corpus.concept_names, object)
    chosen = np.lexsort((names, -mentions_C))[: number or enough]
    return ClosedSet(
        names=tuple(names[chosen].tolist()),
        mentions=tuple(mentions_C[chosen].tolist()),
        num_concepts=len(names),
        share=float(mentions_C[chosen].sum() / mentions_C.sum()),
    )


def labelled(corpus: Corpus, names: tuple[str, ...], others: str) -> Corpus:
    """The same texts for a loader of text rows: one pair (position, label) for each annotated token.

    A token of several concepts has the class that comes first, which is the most frequent one; only where it has none
    is it of another concept.

    Args:
      corpus: of any split.
      names: of the classes, most frequent first.
      others: what the tokens of all other concepts are: "ignore" gives them no label, "outside" takes them as not
        annotated, "class" makes them one class more.
    """
    number = {name: place for place, name in enumerate(names, start=1)}
    other = len(names) + 1
    label_C = np.array([number.get(name, other) for name in corpus.concept_names], np.int32)
    sequence_P, position_P = _sequences(corpus), np.asarray(corpus.pair_positions_P)
    # The pairs of a token stand together.
    first_N = np.flatnonzero(_changes(sequence_P) | _changes(position_P))
    label_N = np.minimum.reduceat(label_C[corpus.pair_concepts_P], first_N) if first_N.size else label_C[:0]
    label_N[label_N == other] = {"ignore": _NO_LABEL, "outside": 0, "class": other}[others]
    return dataclasses.replace(
        corpus,
        pair_positions_P=position_P[first_N],
        pair_concepts_P=label_N,
        pair_offsets_W1=ragged.offsets(np.bincount(sequence_P[first_N], minlength=corpus.source_W.size)),
    )


def label_counts(corpus: Corpus, visits_W: np.ndarray, num_labels: int) -> np.ndarray:
    """The tokens of an epoch that have each label: int64 [num_labels].

    Args:
      corpus: from `labelled`.
      visits_W: how often an epoch visits each sequence.
      num_labels: of which 0 is outside.
    """
    visits_N, label_N = np.repeat(visits_W, np.diff(corpus.pair_offsets_W1)), corpus.pair_concepts_P
    count_C = np.bincount(label_N[label_N >= 0], visits_N[label_N >= 0], num_labels).astype(np.int64)
    count_C[0] += np.sum(visits_W * (corpus.length_W - 2)) - visits_N.sum()  # without the special tokens
    return count_C


def batch_labels(batch: dict[str, np.ndarray]) -> np.ndarray:
    """The labels [R, L] int32 of the tokens of a batch over a corpus from `labelled`; of special tokens and padding -1.

    Args:
      batch: `scored`, `pair_positions` and `pair_concepts` of a `PackedLoader`.
    """
    labels_RxL = np.where(batch["scored"], 0, _NO_LABEL).astype(np.int32)
    row, place = np.nonzero(batch["pair_positions"] >= 0)
    labels_RxL[row, batch["pair_positions"][row, place]] = batch["pair_concepts"][row, place]
    return labels_RxL


def _mentions_per_epoch(corpus: Corpus, visits_W: np.ndarray) -> np.ndarray:
    """Mentions of each concept: runs of neighbouring tokens that have it: int64 [C]."""
    sequence_P, position_P, concept_P = _sequences(corpus), corpus.pair_positions_P, corpus.pair_concepts_P
    order = np.lexsort((position_P, concept_P, sequence_P))
    sequence_P, position_P, concept_P = sequence_P[order], position_P[order].astype(np.int64), concept_P[order]
    begins_P = _changes(sequence_P) | _changes(concept_P) | (np.diff(position_P, prepend=-1) != 1)
    visits_N = np.asarray(visits_W, np.int64)[sequence_P[begins_P]]
    return np.bincount(concept_P[begins_P], visits_N, len(corpus.concept_names)).astype(np.int64)


def _sequences(corpus: Corpus) -> np.ndarray:
    """The sequence of each pair: int64 [P]."""
    return np.repeat(np.arange(corpus.source_W.size), np.diff(corpus.pair_offsets_W1))


def _changes(values_P: np.ndarray) -> np.ndarray:
    """bool [P]: whether a value is not the one before it."""
    return np.concatenate([np.ones(min(1, values_P.size), bool), values_P[1:] != values_P[:-1]])
