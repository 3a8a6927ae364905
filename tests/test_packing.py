"""Packing: every sequence once, nothing overlaps, rows nearly full, and the plan a function of (seed, epoch)."""

import itertools
import queue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuner_jax.data import packing, ragged
from nuner_jax.data.packed_rows import RowStream
from nuner_jax.errors import NunerError


def check_plan(lengths: np.ndarray, row_length: int) -> packing.Slots:
    """The slots are those of the lengths, lie inside their rows, and never overlap."""
    slots = packing.plan_slots(lengths, row_length)
    assert sorted(slots.length_M) == sorted(lengths)
    used = np.zeros((slots.num_rows, row_length), int)
    for row, offset, length in zip(slots.row_M, slots.offset_M, slots.length_M, strict=True):
        assert offset + length <= row_length
        used[row, offset : offset + length] += 1
    assert used.max(initial=0) <= 1
    assert (used.sum(axis=1) > 0).all(), "no row is empty"
    return slots


@given(st.lists(st.integers(1, 24), max_size=200), st.integers(24, 40))
def test_any_lengths_are_packed_without_overlap(lengths, row_length):
    check_plan(np.array(lengths, int), row_length)


def test_sentence_like_lengths_fill_99_percent():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(4, 8, 5000).astype(int) + 3, 3, 128)
    assert check_plan(lengths, 128).fill > 0.99


def test_each_epoch_visits_every_sequence_once_in_another_arrangement():
    lengths = np.random.default_rng(1).integers(3, 30, 500)
    slots = packing.plan_slots(lengths, 64)
    epochs = [packing.assign(slots, lengths, seed=5, epoch=epoch) for epoch in range(3)]
    for sequence_in_slot in epochs:
        assert sorted(sequence_in_slot) == list(range(500))
        np.testing.assert_array_equal(lengths[sequence_in_slot], slots.length_M)
    assert (epochs[0] != epochs[1]).mean() > 0.8
    np.testing.assert_array_equal(epochs[2], packing.assign(slots, lengths, seed=5, epoch=2))
    assert (epochs[0] != packing.assign(slots, lengths, seed=6, epoch=0)).mean() > 0.8


def test_rows_are_visited_in_another_order_each_epoch():
    orders = [packing.order_rows(100, 0, epoch) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert (orders[0] != orders[1]).mean() > 0.8


@pytest.mark.parametrize("num_rows", [96, 103, 5])
def test_rows_that_follow_each_other_are_of_all_strata(num_rows):
    strata, load = 8, np.random.default_rng(3).integers(0, 40, num_rows)
    orders = [packing.order_rows(num_rows, 0, epoch, strata, load) for epoch in (0, 1)]
    assert (orders[0] != orders[1]).any()
    for order in orders:
        assert sorted(order) == list(range(num_rows))
        stratum = [load[order[place::strata]] for place in range(min(strata, num_rows))]
        assert all(lighter.max() <= heavier.min() for lighter, heavier in itertools.pairwise(stratum))
    np.testing.assert_array_equal(orders[1], packing.order_rows(num_rows, 0, 1, strata, load))


@pytest.mark.parametrize("lengths", [[5, 65], [0, 3]])
def test_a_sequence_that_fits_no_row_is_refused_by_name(lengths):
    with pytest.raises(NunerError, match=r"row_length"):
        packing.plan_slots(np.array(lengths), 64)


@given(st.lists(st.integers(1, 20), max_size=120), st.integers(1, 12))
def test_dealing_gives_rows_alike_and_sequences_apart(lengths, num_rows):
    lengths = np.array(lengths, int)
    row, slot, offset = packing.deal(lengths, num_rows)
    for r in range(num_rows):
        mine = row == r
        assert sorted(slot[mine]) == list(range(mine.sum()))
        assert mine.sum() in (len(lengths) // num_rows, -(-len(lengths) // num_rows))
        order = np.argsort(slot[mine])
        np.testing.assert_array_equal(offset[mine][order], ragged.offsets(lengths[mine][order])[:-1])


def test_dealt_totals_differ_by_no_more_than_the_longest():
    lengths = np.random.default_rng(2).integers(3, 20, 400)
    row, _, _ = packing.deal(lengths, 16)
    totals = np.bincount(row, lengths)
    assert totals.max() - totals.min() <= lengths.max()


def test_ranges_and_offsets():
    np.testing.assert_array_equal(ragged.ranges([5, 0, 9], [2, 0, 3]), [5, 6, 9, 10, 11])
    np.testing.assert_array_equal(ragged.offsets([2, 0, 3]), [0, 2, 2, 5])
    assert ragged.ranges([], []).size == 0


def test_rows_of_many_epochs_come_as_asked_for_and_a_negative_one_is_empty():
    lengths = np.random.default_rng(2).integers(1, 9, 30)
    stream = RowStream(lengths, row_length=16, seed=1)
    numbers = np.random.default_rng(3).permutation(np.arange(-1, 5 * stream.rows_per_epoch))
    together = stream.placed(numbers)
    assert (together.rows, together.row_length) == (numbers.size, 16)
    for place, number in enumerate(numbers.tolist()):
        alone, mine = stream.placed(np.array([number])), together.row_N == place
        assert alone.sequence_N.tolist() == together.sequence_N[mine].tolist()
        assert (alone.start_N + 16 * place).tolist() == together.start_N[mine].tolist()
        assert bool(mine.any()) == (number >= 0)
    np.testing.assert_array_equal(np.bincount(together.sequence_N), np.full(30, 5))
    np.testing.assert_array_equal(together.length_N, lengths[together.sequence_N])


@pytest.mark.parametrize(("shuffle", "epochs"), [(True, [0, 1]), (False, [0])])
def test_the_next_epoch_is_planned_before_it_is_asked_for(monkeypatch, shuffle, epochs):
    planned, assign = queue.Queue(), packing.assign

    def observed(slots, lengths, seed, epoch):
        planned.put(epoch)
        return assign(slots, lengths, seed, epoch)

    monkeypatch.setattr(packing, "assign", observed)
    RowStream(np.full(20, 4), row_length=8, seed=0, shuffle=shuffle).placed(np.array([0]))
    assert [planned.get(timeout=60) for _ in epochs] == epochs
    assert planned.empty()
