"""Labels of words and mentions: the schemes IO, BIO and BILOU, and the best valid labelling of logits (Viterbi)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nuner_jax.errors import NunerError
from nuner_jax.metrics import Spans, spans_of_runs

# Of each scheme, the prefixes that it has, and that of a mention's only, first, middle and last word. All else follows.
_SCHEMES = {"io": ("I", "IIII"), "bio": ("BI", "BBII"), "bilou": ("BILU", "UBIL")}
_CELLS = 1 << 24  # scores at a time in `viterbi`: 64 MiB


@dataclass(frozen=True, slots=True, eq=False)
class Scheme:
    """A labelling of words by C labels, and which labels may follow each other.

    Label 0 is outside every mention; each type has its prefixes in a row, types 1 … T one after another.

    prefixes: as many letters as a type has labels. positions: the prefix of an only, first, middle, last word.
    type_C: of each label; 0 of the outside.
    begins_C, ends_C: whether a mention, or the outside, may begin or end there.
    inside_CxC: whether two labels in a row are of one mention. allowed_CxC: whether the second may follow the first.
    """

    prefixes: str
    positions: str
    num_types: int
    type_C: np.ndarray
    begins_C: np.ndarray
    ends_C: np.ndarray
    inside_CxC: np.ndarray
    allowed_CxC: np.ndarray

    @classmethod
    def make(cls, name: str, num_types: int) -> Scheme:
        """The scheme of this name for so many types.

        Raises:
          NunerError: there is none of this name.
        """
        if name not in _SCHEMES:
            raise NunerError(f"no label scheme is called {name!r}: use one of {', '.join(_SCHEMES)}")
        prefixes, positions = _SCHEMES[name]
        only, first, middle, last = positions
        prefix_C = np.array(["O", *prefixes * num_types])
        type_C = np.concatenate([[0], np.repeat(np.arange(1, num_types + 1), len(prefixes))])
        begins_C = np.isin(prefix_C, ["O", only, first])
        ends_C = np.isin(prefix_C, ["O", only, last])
        in_turn_CxC = np.isin(prefix_C, [first, middle])[:, None] & np.isin(prefix_C, [middle, last])
        inside_CxC = in_turn_CxC & (type_C[:, None] == type_C)
        allowed_CxC = inside_CxC | (ends_C[:, None] & begins_C)
        return cls(prefixes, positions, num_types, type_C, begins_C, ends_C, inside_CxC, allowed_CxC)

    def names(self, types: Sequence[str]) -> tuple[str, ...]:
        """The labels as they are written: "O", "B-person", …; in IO, the type itself."""
        if len(self.prefixes) == 1:
            return ("O", *types)
        return ("O", *(f"{prefix}-{name}" for name in types for prefix in self.prefixes))

    def labels(self, spans: Spans, sentence_offsets_S1: np.ndarray) -> np.ndarray:
        """Labels of mentions counted in words: int32 [W].

        Of mentions that overlap, the longest is labelled, of equally long ones the first, and the others are not: a
        word has one label.
        """
        labels_W = np.zeros(int(sentence_offsets_S1[-1]), np.int32)
        base_N = np.asarray(sentence_offsets_S1, np.int64)[spans.sentence_N]
        columns = (base_N + spans.start_N, base_N + spans.end_N, spans.type_N)
        mentions = zip(*(column.tolist() for column in columns), strict=True)
        only, first, middle, last = (self.prefixes.index(prefix) for prefix in self.positions)
        for start, end, of_type in sorted(mentions, key=lambda mention: (mention[0] - mention[1], mention[0])):
            if not labels_W[start:end].any():
                label = 1 + (of_type - 1) * len(self.prefixes)
                labels_W[start:end] = label + middle
                labels_W[start] = label + first
                labels_W[end - 1] = label + (last if end - start > 1 else only)
        return labels_W

    def spans(self, labels_HxW: np.ndarray, sentence_offsets_S1: np.ndarray) -> Spans:
        """Mentions, in words, of labels; only whole ones, as seqeval's strict mode reads them.

        A label that continues or ends a mention of which the beginning is not there makes none, and neither does one
        that begins a mention whose end is not there (BILOU).

        Args:
          labels_HxW: of the words of all sentences, one after another, by each head; or labels_W of one head.
          sentence_offsets_S1: the first word of each sentence, and the number of words.
        """
        labels_HxW = np.atleast_2d(labels_HxW)
        joined_HxV = self.inside_CxC[labels_HxW[:, :-1], labels_HxW[:, 1:]]
        runs = spans_of_runs(self.type_C[labels_HxW] * self.begins_C[labels_HxW], joined_HxV, sentence_offsets_S1)
        last_N = np.asarray(sentence_offsets_S1, np.int64)[runs.sentence_N] + runs.end_N - 1
        whole_N = self.ends_C[labels_HxW[runs.head_N, last_N]]
        columns = (runs.head_N, runs.sentence_N, runs.start_N, runs.end_N, runs.type_N)
        return Spans(*(column[whole_N] for column in columns))

    def viterbi(self, logits_WxC: np.ndarray, sentence_offsets_S1: np.ndarray) -> np.ndarray:
        """The valid labels of each sentence with the highest sum of logits: int32 [W].

        Exact; all sentences are decoded together, a word of each at a time.

        Args:
          logits_WxC: finite, of the words of all sentences one after another.
          sentence_offsets_S1: the first word of each sentence, and the number of words.
        """
        if self.allowed_CxC.all():
            return logits_WxC.argmax(axis=1).astype(np.int32)
        labels_W = np.zeros(len(logits_WxC), np.int32)
        offsets_S1 = np.asarray(sentence_offsets_S1, np.int64)
        length_S = np.diff(offsets_S1)
        longest_first_S = np.argsort(-length_S, kind="stable")
        size = max(1, _CELLS // self.allowed_CxC.size)
        for at in range(0, len(length_S), size):
            block = longest_first_S[at : at + size]
            self._decode(logits_WxC, offsets_S1[block], length_S[block], labels_W)
        return labels_W

    def _decode(self, logits_WxC: np.ndarray, first_S: np.ndarray, length_S: np.ndarray, labels_W: np.ndarray) -> None:
        """Writes the labels of some sentences, longest first: those that have a word t are then the first ones."""
        barred_CxC = np.where(self.allowed_CxC, 0, -np.inf).astype(np.float32)
        running_L = [int((length_S > t).sum()) for t in range(int(length_S.max(initial=0)))]
        score_SxC = np.tile(np.where(self.begins_C, 0, -np.inf).astype(np.float32), (len(first_S), 1))
        came_from = []
        for t, running in enumerate(running_L):
            if t:
                path_SxCxC = score_SxC[:running, :, None] + barred_CxC
                came_from.append(path_SxCxC.argmax(axis=1).astype(np.int16))
                score_SxC[:running] = path_SxCxC.max(axis=1)
            score_SxC[:running] += logits_WxC[first_S[:running] + t]
        label_S = np.where(self.ends_C, score_SxC, -np.inf).argmax(axis=1)
        for t in reversed(range(len(running_L))):
            running = running_L[t]
            labels_W[first_S[:running] + t] = label_S[:running]
            if t:
                label_S[:running] = came_from[t - 1][np.arange(running), label_S[:running]]
