"""The words of a text, and which of them each mention covers: every metric and every sample counts in words."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping

import numpy as np

from nuner_jax.data.records import Entity, Record

_BETWEEN_SPACES = re.compile(r"[^ ]+")
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def word_spans(text: str, split_on_space: bool) -> np.ndarray:
    """The words of a text as character offsets (start, exclusive end): int32 [W, 2], in order.

    Args:
      text: the text.
      split_on_space: the text is words joined by one space each (CoNLL), so only a space divides. Else it is running
        text: words are runs of letters and digits, and every other character that is no white space is one.
    """
    pattern = _BETWEEN_SPACES if split_on_space else _WORD_OR_MARK
    spans = [match.span() for match in pattern.finditer(text)]
    return np.array(spans, np.int32).reshape(-1, 2)


def label_words(record: Record, spans_Wx2: np.ndarray, numbers: Mapping[str, int]) -> np.ndarray:
    """The type of every word: int32 [W], 0 outside; a word that a mention covers in part is the mention's.

    Args:
      record: a text with mentions that do not overlap (`flat`).
      spans_Wx2: the words of its text.
      numbers: the number of every type, from 1.
    """
    starts, ends = spans_Wx2[:, 0].tolist(), spans_Wx2[:, 1].tolist()
    labels_W = np.zeros(len(starts), np.int32)
    for entity in record.entities:
        labels_W[bisect_right(ends, entity.start) : bisect_left(starts, entity.end)] = numbers[entity.concept]
    return labels_W


def flat(record: Record) -> Record:
    """The record with one mention at most at every character: of mentions that overlap, the longest stays.

    Of mentions of the same length it is the first, then the first by type. A word has one label, so nothing
    else can be learnt or scored.
    """
    kept: list[Entity] = []
    for entity in sorted(record.entities, key=lambda one: (one.start - one.end, one.start, one.concept)):
        if all(entity.end <= other.start or other.end <= entity.start for other in kept):
            kept.append(entity)
    return Record(record.text, tuple(sorted(kept, key=lambda one: one.start)))


def is_within_word(text: str, place: int, split_on_space: bool) -> bool:
    """Whether the place, between two characters, divides a word."""
    if not 0 < place < len(text):
        return False
    around = text[place - 1 : place + 1]
    return " " not in around if split_on_space else re.fullmatch(r"\w\w", around) is not None
