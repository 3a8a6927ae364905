"""Packing: which sequences share a row, decided from their lengths alone.

Rows are filled by best-fit decreasing, run on the *histogram* of lengths: it is as long as the longest
sequence, not as the data, so a million sentences take milliseconds. The histogram is the same in every
epoch, hence so is the number of rows; what changes with the epoch is which sequence of a given length takes
which slot, and the order of the rows. So an epoch's plan is a pure function of (seed, epoch), and rows per
epoch are known before any of them is drawn.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter

import numpy as np

from nuner_jax.errors import NunerError


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where sequences go: slot m holds a sequence of `length_M[m]` tokens, at `offset_M[m]` of row `row_M[m]`.

    Slots are sorted by length (ascending), as `assign` needs them. int32 arrays of shape [M].
    """

    row_M: np.ndarray
    offset_M: np.ndarray
    length_M: np.ndarray
    num_rows: int
    row_length: int

    @property
    def fill(self) -> float:
        """Share of the token slots that hold a token."""
        return float(self.length_M.sum()) / max(1, self.num_rows * self.row_length)


def plan_slots(length_M: np.ndarray, row_length: int) -> Slots:
    """Best-fit decreasing on the histogram of lengths.

    Args:
      length_M: int array, tokens per sequence, each in 1..row_length.
      row_length: tokens per row.

    Raises:
      NunerError: a sequence is longer than a row, or empty.
    """
    length_M = np.asarray(length_M)
    if length_M.size and (length_M.min() < 1 or length_M.max() > row_length):
        raise NunerError(
            f"packing: sequences of {length_M.min()}..{length_M.max()} tokens do not fit rows of {row_length}; "
            "raise config.data.row_length"
        )
    lengths, counts = np.unique(length_M, return_counts=True)
    compositions = _fill_rows(dict(zip(lengths.tolist(), counts.tolist(), strict=True)), row_length)

    row_parts, offset_parts, length_parts, num_rows = [], [], [], 0
    for composition, count in compositions.items():
        inside = np.asarray(composition, np.int32)
        offsets = np.concatenate([[0], np.cumsum(inside)[:-1]])
        row_parts.append(np.repeat(np.arange(num_rows, num_rows + count), inside.size))
        offset_parts.append(np.tile(offsets, count))
        length_parts.append(np.tile(inside, count))
        num_rows += count
    row_M, offset_M, length_M = (
        np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
        for parts in (row_parts, offset_parts, length_parts)
    )
    order = np.argsort(length_M, kind="stable")
    return Slots(row_M[order], offset_M[order], length_M[order], num_rows, row_length)


def _fill_rows(histogram: dict[int, int], row_length: int) -> Counter[tuple[int, ...]]:
    """Number of rows of each composition (the lengths inside, longest first)."""
    # Rows that are alike are kept together: space left -> {composition: number of rows}.
    open_rows: dict[int, Counter[tuple[int, ...]]] = {}
    spaces: list[int] = []  # the keys of open_rows, sorted

    def put(space: int, composition: tuple[int, ...], count: int) -> None:
        if space not in open_rows:
            open_rows[space] = Counter()
            bisect.insort(spaces, space)
        open_rows[space][composition] += count

    for length in sorted(histogram, reverse=True):
        left = histogram[length]
        while left:
            place = bisect.bisect_left(spaces, length)
            if place == len(spaces):  # no open row has room: open rows that hold as many as fit, then one more
                each = row_length // length
                full, rest = divmod(left, each)
                for per_row, count in ((each, full), (rest, 1)):
                    if per_row and count:
                        put(row_length - per_row * length, (length,) * per_row, count)
                break
            space = spaces[place]
            composition, count = next(iter(open_rows[space].items()))
            take = min(left, count)
            open_rows[space][composition] -= take
            if not open_rows[space][composition]:
                del open_rows[space][composition]
            if not open_rows[space]:
                del open_rows[space]
                spaces.pop(place)
            put(space - length, (*composition, length), take)
            left -= take
    total: Counter[tuple[int, ...]] = Counter()
    for group in open_rows.values():
        total.update(group)
    return total


def assign(slots: Slots, length_M: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The sequence that takes each slot in one epoch: int64 [M], a permutation.

    Args:
      slots: the plan of these lengths.
      length_M: tokens per sequence; sorting them is fast in a type of one or two bytes.
      seed, epoch: the shuffle is a pure function of them.
    """
    if length_M.size != slots.length_M.size:
        raise ValueError(f"{length_M.size} sequences for {slots.length_M.size} slots")
    keys = np.random.Generator(np.random.Philox(key=[seed, 2 * epoch])).random(length_M.size)
    # Shuffled, and then by length, as the slots are.
    shuffled = np.argsort(keys, kind="stable")
    return shuffled[np.argsort(length_M[shuffled], kind="stable")]


def order_rows(num_rows: int, seed: int, epoch: int, strata: int = 1, load_R: np.ndarray | None = None) -> np.ndarray:
    """The order in which an epoch visits its rows: int64 [num_rows], a pure function of (seed, epoch) and the loads.

    Shuffled; and with several strata, any `strata` rows that follow each other hold one of each: one of the lightest
    rows, and so on, one of the heaviest. A batch of so many rows then has about as much as any other.

    Args:
      num_rows: rows of the epoch.
      seed, epoch: of the shuffle.
      strata: parts of equal size into which the rows are split by load.
      load_R: what is to be spread evenly; None: nothing is.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, 2 * epoch + 1]))
    shuffled = np.argsort(random.random(num_rows), kind="stable")
    if load_R is None or strata == 1:
        return shuffled
    places = random.permutation(num_rows)
    order = np.empty(num_rows, np.int64)
    order[places[np.argsort(places % strata, kind="stable")]] = shuffled[np.argsort(load_R[shuffled], kind="stable")]
    return order


def deal(length_N: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deals sequences to rows in serpentine order of length, so that rows get as many, and as much, alike.

    Used for a batch's concepts: a fixed number of slots per row, and token totals that hardly differ.

    Returns:
      row_N, slot_N (the place among the row's sequences) and offset_N (first token in the row), int64.
    """
    count = length_N.size
    order_N = np.argsort(-length_N, kind="stable")
    lap, place = np.divmod(np.arange(count), num_rows)
    row_in_order = np.where(lap % 2 == 0, place, num_rows - 1 - place)
    row_N, slot_N, offset_N = (np.empty(count, np.int64) for _ in range(3))
    row_N[order_N], slot_N[order_N] = row_in_order, lap
    grouped = np.lexsort((slot_N, row_N))
    ends = np.cumsum(length_N[grouped])
    starts = ends - length_N[grouped]
    first_of_row = np.searchsorted(row_N[grouped], row_N[grouped], side="left")
    offset_N[grouped] = starts - starts[first_of_row] if count else starts
    return row_N, slot_N, offset_N
