"""Ragged arrays: one flat array and the offsets of its rows."""

from __future__ import annotations

import numpy as np


def ranges(start_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """The indices start, start + 1, …, start + length - 1 of every range, one after another: int64 [sum]."""
    length_N = np.asarray(length_N, np.int64)
    ends_N = np.cumsum(length_N)
    total = int(ends_N[-1]) if ends_N.size else 0
    return np.arange(total) + np.repeat(np.asarray(start_N, np.int64) - (ends_N - length_N), length_N)


def offsets(length_N: np.ndarray) -> np.ndarray:
    """Row offsets of a ragged array with rows of these lengths: int64 [N + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(length_N, dtype=np.int64)])
