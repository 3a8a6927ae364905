"""The endless stream of packed rows: which sequence stands where, as a pure function of (seed, number of the row).

The rows of all epochs follow each other (shuffle, then repeat), and a batch is a piece of them: there is no iterator
state, and every host finds the rows of a batch alone.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools

import numpy as np

from nuner_jax.data import packing, ragged

_PLANNER = concurrent.futures.ThreadPoolExecutor(1, "plan")  # for all streams; its thread starts with the first plan


@dataclasses.dataclass(frozen=True)
class Placed:
    """The sequences of some rows, row after row: int64 arrays [N].

    rows, row_length: R, the rows asked for, of L tokens each.
    sequence_N: which sequence.
    row_N: the row, counted among the rows asked for.
    start_N: its first token, counted over the flattened rows [R * L].
    length_N: its tokens.
    segment_N: its number in the row, from 1.
    """

    rows: int
    row_length: int
    sequence_N: np.ndarray
    row_N: np.ndarray
    start_N: np.ndarray
    length_N: np.ndarray
    segment_N: np.ndarray

    def gather(self, tokens_T: np.ndarray, offsets_S1: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows themselves: tokens and segments (0 is padding), int32 [R, L].

        Args:
          tokens_T, offsets_S1: the tokens of all sequences, and where each begins.
          pad_id: the token of empty places.
        """
        segments = np.zeros((self.rows, self.row_length), np.int32)
        segments.reshape(-1)[self.places()] = np.repeat(self.segment_N, self.length_N)
        return self.values(tokens_T, offsets_S1, pad_id), segments

    def values(self, values_T: np.ndarray, offsets_S1: np.ndarray, empty: float) -> np.ndarray:
        """What stands for each token, in rows: [R, L, ...].

        Args:
          values_T: [T, ...], of the tokens of all sequences.
          offsets_S1: where each sequence begins.
          empty: the value of empty places.
        """
        rest = values_T.shape[1:]
        rows = np.full((self.rows, self.row_length, *rest), empty, values_T.dtype)
        rows.reshape(-1, *rest)[self.places()] = values_T[self.origins(offsets_S1)]
        return rows

    def places(self) -> np.ndarray:
        """Where each token stands, counted over the flattened rows: int64 [sum of length_N]."""
        return ragged.ranges(self.start_N, self.length_N)

    def origins(self, offsets_S1: np.ndarray) -> np.ndarray:
        """Of each of these tokens, its place among the tokens of all sequences, which begin at the offsets: int64."""
        return ragged.ranges(offsets_S1[self.sequence_N], self.length_N)


class RowStream:
    """Packed rows over sequences of known length, epoch after epoch."""

    def __init__(
        self,
        length_S: np.ndarray,
        *,
        row_length: int,
        seed: int,
        shuffle: bool = True,
        strata: int = 1,
        load_S: np.ndarray | None = None,
    ):
        """Plans the packing.

        Args:
          length_S: int array, tokens per sequence, each in 1..row_length.
          row_length: L, tokens per row.
          seed: of the shuffles.
          shuffle: False ends with the first epoch, for evaluation: the rows after it are empty.
          strata: rows of a batch, if batches are to have about the same load; see `packing.order_rows`.
          load_S: what each sequence adds to it.

        Raises:
          NunerError: a sequence is longer than a row, or empty.
        """
        self.row_length, self._seed, self._shuffle = row_length, seed, shuffle
        self._strata, self._load_S = strata, load_S
        self._slots = packing.plan_slots(length_S, row_length)
        self._length_S = np.asarray(length_S).astype(np.min_scalar_type(row_length))
        # The slots of row r are _row_slots[_row_offsets[r]:_row_offsets[r + 1]]; behind the last row is an empty one.
        self._row_slots = np.argsort(self._slots.row_M, kind="stable")
        self._row_offsets = ragged.offsets(np.bincount(self._slots.row_M, minlength=self.rows_per_epoch + 1))
        self._begin = functools.lru_cache(maxsize=3)(self._begin_epoch)  # a batch may touch two, and begins another

    @property
    def rows_per_epoch(self) -> int:
        """Packed rows that hold every sequence once."""
        return self._slots.num_rows

    @property
    def fill(self) -> float:
        """Share of the token slots that hold a token."""
        return self._slots.fill

    def most_per_row(self, amount_S: np.ndarray) -> int:
        """What a row of any epoch holds at most of something that sequence s has `amount_S[s]` of."""
        most = np.zeros(self.row_length + 1, np.int64)  # by length, which alone decides who may stand in a slot
        np.maximum.at(most, self._length_S, amount_S)
        return int(np.bincount(self._slots.row_M, most[self._slots.length_M]).max(initial=0))

    def placed(self, number_R: np.ndarray) -> Placed:
        """What these rows of the stream hold.

        Args:
          number_R: int [R], counted from 0 over all epochs; a negative one is an empty row.
        """
        epoch_R, place_R = np.divmod(np.asarray(number_R, np.int64), self.rows_per_epoch)
        plans = {epoch: self._epoch(epoch) for epoch in np.unique(epoch_R).tolist() if self._has(epoch)}
        row_R = np.full(epoch_R.size, self.rows_per_epoch)
        for epoch, (_, order) in plans.items():
            mine_R = epoch_R == epoch
            row_R[mine_R] = order[place_R[mine_R]]
        count_R = self._row_offsets[row_R + 1] - self._row_offsets[row_R]
        row_N = np.repeat(np.arange(row_R.size), count_R)
        slot_N = self._row_slots[ragged.ranges(self._row_offsets[row_R], count_R)]
        sequence_N = np.empty_like(slot_N)
        for epoch, (sequence_M, _) in plans.items():
            mine_N = epoch_R[row_N] == epoch
            sequence_N[mine_N] = sequence_M[slot_N[mine_N]]
        return Placed(
            rows=row_R.size,
            row_length=self.row_length,
            sequence_N=sequence_N,
            row_N=row_N,
            start_N=row_N * self.row_length + self._slots.offset_M[slot_N],
            length_N=self._slots.length_M[slot_N].astype(np.int64),
            segment_N=ragged.ranges(np.ones(row_R.size), count_R),
        )

    def _has(self, epoch: int) -> bool:
        return epoch == 0 or (epoch > 0 and self._shuffle)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The plan of an epoch; that of the next one is begun, so that no batch waits for it."""
        plan = self._begin(epoch)
        if self._has(epoch + 1):
            self._begin(epoch + 1)
        return plan.result()

    def _begin_epoch(self, epoch: int) -> concurrent.futures.Future:
        return _PLANNER.submit(self._plan_epoch, epoch)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence in each slot, and the order of the rows, of one epoch."""
        sequence_M = packing.assign(self._slots, self._length_S, self._seed, epoch)
        load_R = None
        if self._load_S is not None:
            load_R = np.bincount(self._slots.row_M, self._load_S[sequence_M], minlength=self.rows_per_epoch)
        return sequence_M, packing.order_rows(self.rows_per_epoch, self._seed, epoch, self._strata, load_R)


class PackedRows(RowStream):
    """Batches of `rows` packed rows; where an epoch has fewer, a batch is the epoch, and its other rows are empty."""

    def __init__(self, length_S: np.ndarray, *, rows: int, row_length: int, seed: int, shuffle: bool = True):
        """Plans the packing of batches of `rows` rows; see `RowStream` for the other arguments, and what is raised."""
        super().__init__(length_S, row_length=row_length, seed=seed, shuffle=shuffle)
        self.rows, self._filled = rows, min(rows, self.rows_per_epoch)

    @property
    def batches_per_epoch(self) -> float:
        """Batches that visit every row once."""
        return self.rows_per_epoch / self._filled

    def batch(self, index: int, part: np.ndarray | None = None) -> Placed:
        """What the rows of a batch hold.

        Args:
          index: of the batch.
          part: int [R'], the rows of the batch that are asked for, in this order; None: all.
        """
        part = np.arange(self.rows) if part is None else np.asarray(part)
        return self.placed(np.where(part < self._filled, index * self._filled + part, -1))
