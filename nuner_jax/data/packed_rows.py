"""The endless stream of packed rows: which sequence stands where in a batch, as a pure function of (seed, index).

The rows of all epochs follow each other (shuffle, then repeat), and batch `index` is the `index`-th piece of them:
there is no iterator state, and every host finds the rows of a batch alone.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from nuner_jax.data import packing, ragged


@dataclasses.dataclass(frozen=True)
class Placed:
    """The sequences of some rows of a batch, row after row: int64 arrays [N].

    sequence_N: which sequence.
    row_N: the row, counted among the rows asked for.
    start_N: its first token, counted over the flattened rows [R * L].
    length_N: its tokens.
    segment_N: its number in the row, from 1.
    """

    sequence_N: np.ndarray
    row_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray
    segment_N: np.ndarray


class PackedRows:
    """Batches of `rows` packed rows over sequences of known length."""

    def __init__(self, length_S: np.ndarray, *, rows: int, row_length: int, seed: int, shuffle: bool = True):
        """Plans the packing.

        Args:
          length_S: int array, tokens per sequence, each in 1..row_length.
          rows: R, rows of a batch; where an epoch has fewer, a batch is the epoch, and its other rows are empty.
          row_length: L, tokens per row.
          seed: of the shuffles.
          shuffle: False gives one epoch and then empty rows, for evaluation.

        Raises:
          NunerError: a sequence is longer than a row, or empty.
        """
        self.rows, self.row_length, self._seed, self._shuffle = rows, row_length, seed, shuffle
        self._length_S = np.asarray(length_S)
        self._by_length_S = np.argsort(self._length_S, kind="stable")
        self._slots = packing.plan_slots(self._length_S, row_length)
        # The slots of row r are _row_slots[_row_offsets[r]:_row_offsets[r + 1]].
        self._row_slots = np.argsort(self._slots.row_M, kind="stable")
        self._row_offsets = ragged.offsets(np.bincount(self._slots.row_M, minlength=self._slots.num_rows))
        self._filled = min(rows, self._slots.num_rows)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)  # a batch may touch two epochs

    @property
    def rows_per_epoch(self) -> int:
        """Packed rows that hold every sequence once."""
        return self._slots.num_rows

    @property
    def batches_per_epoch(self) -> float:
        """Batches that visit every row once."""
        return self.rows_per_epoch / self._filled

    @property
    def fill(self) -> float:
        """Share of the token slots that hold a token."""
        return self._slots.fill

    def most_per_row(self, amount_S: np.ndarray) -> int:
        """What a row of any epoch holds at most of something that sequence s has `amount_S[s]` of."""
        most = np.zeros(self.row_length + 1, np.int64)  # by length, which alone decides who may stand in a slot
        np.maximum.at(most, self._length_S, amount_S)
        return int(np.bincount(self._slots.row_M, most[self._slots.length_M]).max(initial=0))

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence in each slot, and the order of the rows, of one epoch."""
        sequence_M = packing.assign(self._slots, self._by_length_S, self._length_S, self._seed, epoch)
        return sequence_M, packing.shuffled_rows(self.rows_per_epoch, self._seed, epoch)

    def batch(self, index: int, part: np.ndarray | None = None) -> Placed:
        """What the rows of a batch hold.

        Args:
          index: of the batch.
          part: int [R'], the rows of the batch that are asked for, in this order; None: all.
        """
        part = np.arange(self.rows) if part is None else np.asarray(part)
        slots, sequences = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        count_R = np.zeros(part.size, np.int64)
        for place in np.flatnonzero(part < self._filled):
            epoch, number = divmod(index * self._filled + int(part[place]), self.rows_per_epoch)
            if epoch and not self._shuffle:
                continue  # evaluation ends with the epoch: no row twice
            sequence_M, order = self._epoch(epoch)
            first, stop = self._row_offsets[order[number] : order[number] + 2]
            mine = self._row_slots[first:stop]
            slots.append(mine)
            sequences.append(sequence_M[mine])
            count_R[place] = mine.size
        slot_N, row_N = np.concatenate(slots), np.repeat(np.arange(part.size), count_R)
        return Placed(
            sequence_N=np.concatenate(sequences),
            row_N=row_N,
            start_N=row_N * self.row_length + self._slots.offset_M[slot_N],
            length_N=self._slots.length_M[slot_N].astype(np.int64),
            segment_N=ragged.ranges(np.ones(part.size), count_R),
        )
