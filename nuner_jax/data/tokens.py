"""Texts as tokens: a batch of texts in one coordinate of tokens and one of characters, and the sequences cut from it.

A *sequence* is what an encoder reads: a special token, the tokens of a text or of a part of it, a special token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain

import numpy as np

from nuner_jax.data import ragged


@dataclasses.dataclass(frozen=True)
class TextTokens:
    """The tokens of texts that stand one after another, without special tokens.

    ids_T: int32.
    spans_Tx2: int64, the characters of each token (start, exclusive end), counted over all texts; in order.
    token_offsets_N1: where each text begins in them.
    char_offsets_N1: the first character of each text; one place lies between two texts.
    """

    ids_T: np.ndarray
    spans_Tx2: np.ndarray
    token_offsets_N1: np.ndarray
    char_offsets_N1: np.ndarray


def encode(texts: Sequence[str], tokenizer) -> TextTokens:
    """Tokenises texts, whole, with a fast tokenizer."""
    encoding = {"input_ids": [], "offset_mapping": []}
    if texts:  # of no text, a tokenizer makes an error
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
    flat = chain.from_iterable
    ids_T = np.fromiter(flat(encoding["input_ids"]), np.int32, token_offsets[-1])
    spans_Tx2 = np.fromiter(flat(flat(encoding["offset_mapping"])), np.int64, 2 * token_offsets[-1]).reshape(-1, 2)
    spans_Tx2 += np.repeat(char_offsets[:-1], np.diff(token_offsets))[:, None]
    return TextTokens(
        ids_T=ids_T,
        spans_Tx2=np.maximum.accumulate(spans_Tx2, axis=0),  # a token without characters must not break the order
        token_offsets_N1=token_offsets,
        char_offsets_N1=char_offsets,
    )


def special_tokens(tokenizer) -> tuple[int, int]:
    """The ids of the tokens that begin and end a sequence ([CLS] … [SEP], or <s> … </s>)."""
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return tokenizer.bos_token_id if begin is None else begin, tokenizer.eos_token_id if end is None else end


def with_special_tokens(
    ids_T: np.ndarray, first_S: np.ndarray, length_S: np.ndarray, tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """The sequences that hold `length_S` tokens from `first_S` on, one after another: (int32 tokens, int64 offsets)."""
    begin, end = special_tokens(tokenizer)
    offsets_S1 = ragged.offsets(length_S + 2)
    tokens = np.empty(offsets_S1[-1], np.int32)
    tokens[offsets_S1[:-1]], tokens[offsets_S1[1:] - 1] = begin, end
    tokens[ragged.ranges(offsets_S1[:-1] + 1, length_S)] = ids_T[ragged.ranges(first_S, length_S)]
    return tokens, offsets_S1
