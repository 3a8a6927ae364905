"""The metrics of entity recognition, exactly defined; many labellings (heads) of the same words are scored at once.

token macro F1   F1 of each type over words, then the mean over the types that occur in the query set
                 (Bogdanov et al. 2024, arXiv 2402.15343: the main tables)
entity micro F1  a mention counts where its bounds and its type are right, over all types together
                 (seqeval's strict mode on IOB2)
string F1        as entity micro F1, of the different normalised strings of each sentence and type
                 (Zhou et al. 2023, UniversalNER, arXiv 2308.03279)

0 / 0 counts as 0. Labels: 0 is outside every mention, 1 … T are the types.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from nuner_jax.errors import NunerError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Mentions of one or more heads, as columns (int64 [N] each).

    `start` and `end` (exclusive) count from the start of the sentence, in words or in characters: spans are compared
    with spans of the same unit. Types are 1 … T.
    """

    head_N: np.ndarray
    sentence_N: np.ndarray
    start_N: np.ndarray
    end_N: np.ndarray
    type_N: np.ndarray

    @classmethod
    def of(cls, mentions: Iterable[tuple[int, int, int, int]]) -> Spans:
        """Those of one head, from (sentence, start, end, type)."""
        table_Nx4 = np.array(list(mentions), np.int64).reshape(-1, 4)
        return cls(np.zeros(len(table_Nx4), np.int64), *table_Nx4.T)

    def mentions(self, head: int = 0) -> list[tuple[int, int, int, int]]:
        """The (sentence, start, end, type) of one head."""
        columns = (self.sentence_N, self.start_N, self.end_N, self.type_N)
        return list(zip(*(column[self.head_N == head].tolist() for column in columns), strict=True))

    def in_characters(self, characters_Wx2: np.ndarray, sentence_offsets_S1: np.ndarray) -> Spans:
        """Spans counted in words, counted in characters.

        Args:
          characters_Wx2: where each word of all sentences starts and ends in the text of its sentence.
          sentence_offsets_S1: the first word of each sentence, and the number of words.
        """
        base_N = np.asarray(sentence_offsets_S1, np.int64)[self.sentence_N]
        return replace(
            self,
            start_N=characters_Wx2[base_N + self.start_N, 0].astype(np.int64),
            end_N=characters_Wx2[base_N + self.end_N - 1, 1].astype(np.int64),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Precision, recall and F1, between 0 and 1, of H heads: over all types and of each.

    support_T: what there is of each type in the query set (words, mentions or strings, as the metric counts).
    """

    precision_H: np.ndarray
    recall_H: np.ndarray
    f1_H: np.ndarray
    precision_HxT: np.ndarray
    recall_HxT: np.ndarray
    f1_HxT: np.ndarray
    support_T: np.ndarray

    def per_type(self, head: int, types: Sequence[str]) -> dict[str, dict[str, float]]:
        """The scores of one head as plain data, for each type that occurs in the query set."""
        return {
            name: {
                "precision": float(self.precision_HxT[head, at]),
                "recall": float(self.recall_HxT[head, at]),
                "f1": float(self.f1_HxT[head, at]),
                "support": int(self.support_T[at]),
            }
            for at, name in enumerate(types)
            if self.support_T[at]
        }


def io_spans(labels_HxW: np.ndarray, sentence_offsets_S1: np.ndarray) -> Spans:
    """Mentions, in words, of IO labels: words in a row with the same type are one, up to the sentence's end.

    Args:
      labels_HxW: of the words of all sentences, one after another, by each head; or labels_W of one head.
      sentence_offsets_S1: the first word of each sentence, and the number of words.
    """
    labels_HxW = np.atleast_2d(labels_HxW)
    return spans_of_runs(labels_HxW, labels_HxW[:, 1:] == labels_HxW[:, :-1], sentence_offsets_S1)


def spans_of_runs(types_HxW: np.ndarray, joined_HxV: np.ndarray, sentence_offsets_S1: np.ndarray) -> Spans:
    """Mentions, in words: the runs of joined words that start with a type.

    Args:
      types_HxW: 0 where no mention starts; elsewhere the type of the mention, if one starts there.
      joined_HxV: whether a word and the next one are of the same mention; V = W - 1. Sentences are parted here.
      sentence_offsets_S1: the first word of each sentence, and the number of words.
    """
    num_heads, num_words = types_HxW.shape
    offsets_S1 = np.asarray(sentence_offsets_S1, np.int64)
    starts_HxW = np.ones((num_heads, num_words), bool)
    starts_HxW[:, 1:] = ~joined_HxV
    starts_HxW[:, offsets_S1[:-1][np.diff(offsets_S1) > 0]] = True
    first_N = np.flatnonzero(starts_HxW)  # over the words of all heads in a row: a head's last run ends with it
    after_N = np.append(first_N[1:], starts_HxW.size)
    kept_N = types_HxW.reshape(-1)[first_N] > 0
    head_N, word_N = np.divmod(first_N[kept_N], max(num_words, 1))
    sentence_N = np.searchsorted(offsets_S1, word_N, side="right") - 1
    start_N = word_N - offsets_S1[sentence_N]
    length_N = (after_N - first_N)[kept_N]
    return Spans(head_N, sentence_N, start_N, start_N + length_N, types_HxW[head_N, word_N].astype(np.int64))


def confusion(gold_W: np.ndarray, predicted_HxW: np.ndarray, num_types: int) -> np.ndarray:
    """Words by gold label and predicted label: int64 [H, C, C], C = num_types + 1.

    Raises:
      ValueError: the arrays differ in words, or a label is outside 0 … num_types.
    """
    predicted_HxW = np.atleast_2d(predicted_HxW)
    if predicted_HxW.shape[1:] != np.shape(gold_W):
        raise ValueError(f"{np.shape(gold_W)} gold labels, but {predicted_HxW.shape[1:]} predicted ones")
    for labels in (gold_W, predicted_HxW):
        if np.size(labels) and not 0 <= np.min(labels) <= np.max(labels) <= num_types:
            raise ValueError(f"a label is outside 0 … {num_types}: {np.min(labels)} … {np.max(labels)}")
    classes = num_types + 1
    row_W = np.asarray(gold_W, np.int64) * classes
    counts = [np.bincount(row_W + predicted_W, minlength=classes**2) for predicted_W in predicted_HxW]
    return np.stack(counts).reshape(-1, classes, classes)


def token_macro_f1(
    gold_W: np.ndarray, predicted_HxW: np.ndarray, num_types: int, include_other: bool = False
) -> Scores:
    """Token macro F1: each type's scores over words, and their mean over the types that occur in `gold_W`.

    Args:
      gold_W: the label of each word.
      predicted_HxW: by each head; or predicted_W of one head.
      num_types: T.
      include_other: whether the words outside every mention are averaged as one more type.

    Raises:
      NunerError: no type occurs, so there is nothing to average.
      ValueError: the arrays differ in words, or a label is outside 0 … T.
    """
    confusion_HxCxC = confusion(gold_W, predicted_HxW, num_types)
    gold_C = confusion_HxCxC[0].sum(axis=1)
    _refuse_empty(gold_C[1:])
    correct_HxC = np.diagonal(confusion_HxCxC, axis1=1, axis2=2)
    of_classes = _rates(correct_HxC, confusion_HxCxC.sum(axis=1), gold_C)
    averaged_C = gold_C > 0
    averaged_C[0] &= include_other
    means = (rate_HxC[:, averaged_C].mean(axis=1) for rate_HxC in of_classes)
    return Scores(*means, *(rate_HxC[:, 1:] for rate_HxC in of_classes), gold_C[1:])


def entity_micro_f1(gold: Spans, predicted: Spans, num_types: int, num_heads: int = 1) -> Scores:
    """Entity micro F1: a predicted mention is right if the gold ones have it, with the same bounds and type.

    Args:
      gold: in the unit of `predicted`; a mention given twice counts once.
      predicted: of the heads 0 … num_heads - 1.
      num_types: T.
      num_heads: H.

    Raises:
      NunerError: there is no gold mention.
      ValueError: a type is outside 1 … T.
    """
    gold_columns = (gold.sentence_N, gold.start_N, gold.end_N, gold.type_N)
    columns = (predicted.sentence_N, predicted.start_N, predicted.end_N, predicted.type_N)
    return _micro(gold_columns, columns, predicted.head_N, num_types, num_heads)


def string_f1(gold: Spans, predicted: Spans, texts: Sequence[str], num_types: int, num_heads: int = 1) -> Scores:
    """UniversalNER's F1: in each sentence, the different strings of each type are compared, not their places.

    Args:
      gold, predicted: as for `entity_micro_f1`, in characters.
      texts: of the sentences.
      num_types: T.
      num_heads: H.

    Raises:
      NunerError: there is no gold mention.
      ValueError: a type is outside 1 … T.
    """
    number_of: dict[str, int] = {}

    def columns(spans: Spans) -> tuple[np.ndarray, ...]:
        places = zip(spans.sentence_N.tolist(), spans.start_N.tolist(), spans.end_N.tolist(), strict=True)
        strings = (normalised(texts[sentence][start:end]) for sentence, start, end in places)
        string_N = np.array([number_of.setdefault(text, len(number_of)) for text in strings], np.int64)
        return spans.sentence_N, string_N, spans.type_N

    return _micro(columns(gold), columns(predicted), predicted.head_N, num_types, num_heads)


@lru_cache(maxsize=1 << 18)  # the heads find the same strings
def normalised(text: str) -> str:
    """As UniversalNER compares strings: lower case, without ASCII punctuation, without a, an, the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _micro(
    gold: tuple[np.ndarray, ...],
    predicted: tuple[np.ndarray, ...],
    head_N: np.ndarray,
    num_types: int,
    num_heads: int,
) -> Scores:
    """Scores of sets of things: a thing is its columns, the last of which is its type."""
    columns = [np.concatenate(pair) for pair in zip(gold, predicted, strict=True)]
    types = columns[-1]
    if types.size and not 1 <= types.min() <= types.max() <= num_types:
        raise ValueError(f"a type is outside 1 … {num_types}: {types.min()} … {types.max()}")
    keys = np.ravel_multi_index(columns, [1 + int(column.max(initial=0)) for column in columns])
    _, first_I, thing = np.unique(keys, return_index=True, return_inverse=True)
    type_I, is_gold_I = types[first_I], np.zeros(len(first_I), bool)
    is_gold_I[thing[: len(gold[0])]] = True
    gold_T = np.bincount(type_I[is_gold_I], minlength=num_types + 1)[1:]
    _refuse_empty(gold_T)

    once = np.unique(head_N * len(first_I) + thing[len(gold[0]) :])
    head_M, thing_M = np.divmod(once, len(first_I))
    cell_M = head_M * (num_types + 1) + type_I[thing_M]

    def counted(cells: np.ndarray) -> np.ndarray:
        return np.bincount(cells, minlength=num_heads * (num_types + 1)).reshape(num_heads, -1)[:, 1:]

    predicted_HxT, correct_HxT = counted(cell_M), counted(cell_M[is_gold_I[thing_M]])
    overall = _rates(correct_HxT.sum(axis=1), predicted_HxT.sum(axis=1), gold_T.sum())
    return Scores(*overall, *_rates(correct_HxT, predicted_HxT, gold_T), gold_T)


def _rates(correct: np.ndarray, predicted: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, ...]:
    """Precision, recall, F1."""
    return _ratio(correct, predicted), _ratio(correct, gold), _ratio(2 * correct, predicted + gold)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)  # counts: a whole of 0 has a part of 0


def _refuse_empty(gold_T: np.ndarray) -> None:
    if not gold_T.any():
        raise NunerError("the query set has no mention of any type, so nothing can be scored: check its labels")
