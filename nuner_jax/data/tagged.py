"""Texts for token classification: sub-tokens in windows, and where each word's first sub-token stands.

A *sequence* is what an encoder reads: a special token, the tokens of a text or of one window of it, a special
token. A text longer than a window is read in windows that overlap by half, and each of its words counts in the one
window where it stands nearest to the middle; so nothing is cut off, and every word has context on both sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from nuner_jax.data import ragged
from nuner_jax.data.corpus import special_tokens
from nuner_jax.data.packed_rows import PackedRows
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
    ids_T, spans_Tx2, token_offsets, char_offsets = _encode(texts, tokenizer)
    word_offsets = ragged.offsets([len(spans) for spans in words])
    start_W, stop_W = _shifted(words, char_offsets[:-1], word_offsets).T
    # A word's first sub-token is the first one that ends behind the word's start.
    token_W = np.searchsorted(spans_Tx2[:, 1], start_W, side="right")
    present_W = token_W < ids_T.size
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
    return WordCorpus(
        tokens_T=_with_special_tokens(ids_T, first_S, size_S, tokenizer),
        sequence_offsets_S1=ragged.offsets(size_S + 2),
        word_V=word_V,
        position_V=token_W[word_V] - first_S[sequence_V] + 1,
        word_offsets_S1=ragged.offsets(np.bincount(sequence_V, minlength=first_S.size)),
        num_words=int(word_offsets[-1]),
        texts_split=int(np.sum(windows_N > 1)),
    )


def _encode(texts: Sequence[str], tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and their characters over all texts, which stand one after another, and the offsets of each text."""
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    token_offsets = ragged.offsets([len(ids) for ids in encoding["input_ids"]])
    char_offsets = ragged.offsets([len(text) + 1 for text in texts])
    ids_T = np.fromiter((i for ids in encoding["input_ids"] for i in ids), np.int32, token_offsets[-1])
    spans_Tx2 = _shifted(encoding["offset_mapping"], char_offsets[:-1], token_offsets)
    # A token without characters must not break the order.
    return ids_T, np.maximum.accumulate(spans_Tx2, axis=0), token_offsets, char_offsets


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


def _with_special_tokens(ids_T, first_S, size_S, tokenizer) -> np.ndarray:
    begin, end = special_tokens(tokenizer)
    at_S1 = ragged.offsets(size_S + 2)
    tokens = np.empty(at_S1[-1], np.int32)
    tokens[at_S1[:-1]], tokens[at_S1[1:] - 1] = begin, end
    tokens[ragged.ranges(at_S1[:-1] + 1, size_S)] = ids_T[ragged.ranges(first_S, size_S)]
    return tokens


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
        rows, row_length = self.packing.rows if part is None else len(part), self.packing.row_length
        tokens = np.full((rows, row_length), self.pad_id, np.int32)
        segments = np.zeros_like(tokens)
        to, first_N = ragged.ranges(placed.start_N, placed.length_N), corpus.sequence_offsets_S1[placed.sequence_N]
        tokens.reshape(-1)[to] = corpus.tokens_T[ragged.ranges(first_N, placed.length_N)]
        segments.reshape(-1)[to] = np.repeat(placed.segment_N, placed.length_N)

        words = np.full((rows, self.words_per_row), -1, np.int32)
        positions = np.zeros_like(words)
        first_N = corpus.word_offsets_S1[placed.sequence_N]
        count_N = corpus.word_offsets_S1[placed.sequence_N + 1] - first_N
        row_v, from_v = np.repeat(placed.row_N, count_N), ragged.ranges(first_N, count_N)
        at = row_v, ragged.ranges(np.zeros(rows), np.bincount(row_v, minlength=rows))
        words[at] = corpus.word_V[from_v]
        positions[at] = np.repeat(placed.start_N % row_length, count_N) + corpus.position_V[from_v]
        return {"tokens": tokens, "segments": segments, "words": words, "positions": positions}
