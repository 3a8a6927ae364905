"""Texts for token classification: sub-tokens in windows, and where each word's first sub-token stands.

A text longer than a window is read in windows that overlap by half, and each of its words counts in the one window
where it stands nearest to the middle; so nothing is cut off, and every word has context on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nuner_jax.data import ragged
from nuner_jax.data.packed_rows import PackedRows
from nuner_jax.data.tokens import encode, with_special_tokens
from nuner_jax.errors import NunerError


@dataclasses.dataclass(frozen=True)
class WordCorpus:
    """Tokenised texts and their words, which are numbered over all texts.

    tokens_T, sequence_offsets_S1: the sequences, special tokens included.
    word_V, position_V, word_offsets_S1: for each sequence the words that count in it, with the place of their first
      sub-token in the sequence. A word without a sub-token of its own is in none.
    num_words: W, words of all texts.
    texts_split: texts that needed more than one window.
    """

    tokens_T: np.ndarray
    sequence_offsets_S1: np.ndarray
    word_V: np.ndarray
    position_V: np.ndarray
    word_offsets_S1: np.ndarray
    num_words: int
    texts_split: int

    @property
    def words_without_tokens(self) -> int:
        """Words that no sequence holds a sub-token of: characters that the tokenizer leaves out."""
        return self.num_words - self.word_V.size


def tokenise(texts: Sequence[str], words: Sequence[np.ndarray], tokenizer, window: int) -> WordCorpus:
    """Tokenises texts, and finds their words in the tokens.

    Args:
      texts: the texts.
      words: int32 [W', 2] for each text, its words as character offsets (start, exclusive end), in order.
      tokenizer: a fast tokenizer.
      window: tokens per sequence at most, the two special tokens included; at least 4.

    Raises:
      NunerError: the window is too small.
    """
    if window < 4:
        raise NunerError(f"windows of {window} tokens, two of them special ones: at least 4 are needed")
    capacity = window - 2
    encoded = encode(texts, tokenizer)
    spans_Tx2, token_offsets = encoded.spans_Tx2, encoded.token_offsets_N1
    word_offsets = ragged.offsets([len(spans) for spans in words])
    start_W, stop_W = _shifted(words, encoded.char_offsets_N1[:-1], word_offsets).T
    # A word's first sub-token is the first one that ends behind the word's start.
    token_W = np.searchsorted(spans_Tx2[:, 1], start_W, side="right")
    present_W = token_W < len(spans_Tx2)
    present_W[present_W] = spans_Tx2[token_W[present_W], 0] < stop_W[present_W]

    length_N = np.diff(token_offsets)
    more_N = np.maximum(0, -(-(length_N - capacity) // max(1, capacity // 2)))  # windows after the first
    windows_N = np.where(length_N > 0, more_N + 1, 0)
    text_S = np.repeat(np.arange(len(texts)), windows_N)
    # Windows stand at equal steps, the last one at its text's end.
    number_S, slack_S = ragged.ranges(np.zeros(len(texts)), windows_N), np.maximum(0, length_N - capacity)[text_S]
    first_S = token_offsets[text_S] + number_S * slack_S // np.maximum(1, more_N[text_S])
    size_S = np.minimum(length_N[text_S], capacity)

    word_V = np.flatnonzero(present_W)
    sequence_V = _most_central(token_W[word_V], first_S, text_S, capacity)
    tokens_T, offsets_S1 = with_special_tokens(encoded.ids_T, first_S, size_S, tokenizer)
    return WordCorpus(
        tokens_T=tokens_T,
        sequence_offsets_S1=offsets_S1,
        word_V=word_V,
        position_V=token_W[word_V] - first_S[sequence_V] + 1,
        word_offsets_S1=ragged.offsets(np.bincount(sequence_V, minlength=first_S.size)),
        num_words=int(word_offsets[-1]),
        texts_split=int(np.sum(windows_N > 1)),
    )


def _shifted(spans: Sequence, base_N: np.ndarray, offsets_N1: np.ndarray) -> np.ndarray:
    """The character spans of each text, int64 [sum, 2], counted over all texts."""
    flat = [np.asarray(part, np.int64).reshape(-1, 2) for part in spans]
    return np.concatenate([np.zeros((0, 2), np.int64), *flat]) + np.repeat(base_N, np.diff(offsets_N1))[:, None]


def _most_central(token_V, first_S, text_S, capacity: int) -> np.ndarray:
    """The sequence in which each token stands nearest to the middle: int64 [V], ascending."""
    # A window takes over half-way between the middles of the one before and itself, or where its text begins.
    halfway_S = (np.append(0, first_S[:-1]) + first_S + capacity) // 2
    border_S = np.where(np.diff(text_S, prepend=-1) > 0, first_S, halfway_S)
    return np.searchsorted(border_S, token_V, side="right") - 1


class WordLoader:
    """Packed batches of a `WordCorpus`, as a pure function of the index."""

    def __init__(self, corpus: WordCorpus, *, rows: int, row_length: int, seed: int, pad_id: int, shuffle: bool = True):
        """Plans the packing; see `PackedRows` for the arguments.

        Raises:
          NunerError: a sequence is longer than a row, or there is none.
        """
        if not corpus.tokens_T.size:
            raise NunerError("no text has a token: there is nothing to train or evaluate on")
        self.corpus, self.pad_id = corpus, pad_id
        lengths = np.diff(corpus.sequence_offsets_S1)
        self.packing = PackedRows(lengths, rows=rows, row_length=row_length, seed=seed, shuffle=shuffle)
        self.words_per_row = max(1, self.packing.most_per_row(np.diff(corpus.word_offsets_S1)))

    def batch(self, index: int, part: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The batch of this index, or some of its rows (int [R'], which R then stands for).

        Returns:
          tokens, segments [R, L] int32 (segment 0 is padding); words [R, V] int32, the number of each word that
          counts here (-1 pads), and positions [R, V] int32, the place of its first sub-token in the row. Words that
          one sub-token covers share it.
        """
        corpus, placed = self.corpus, self.packing.batch(index, part)
        tokens, segments = placed.gather(corpus.tokens_T, corpus.sequence_offsets_S1, self.pad_id)

        words = np.full((placed.rows, self.words_per_row), -1, np.int32)
        positions = np.zeros_like(words)
        first_N = corpus.word_offsets_S1[placed.sequence_N]
        count_N = corpus.word_offsets_S1[placed.sequence_N + 1] - first_N
        row_v, from_v = np.repeat(placed.row_N, count_N), ragged.ranges(first_N, count_N)
        at = row_v, ragged.ranges(np.zeros(placed.rows), np.bincount(row_v, minlength=placed.rows))
        words[at] = corpus.word_V[from_v]
        positions[at] = np.repeat(placed.start_N % placed.row_length, count_N) + corpus.position_V[from_v]
        return {"tokens": tokens, "segments": segments, "words": words, "positions": positions}
