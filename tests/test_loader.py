"""Batches: pure in the step, complete in the epoch, and true to the corpus in every position."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest

from nuner_jax.data import builder
from nuner_jax.data.corpus import Corpus, load_corpus
from nuner_jax.data.loader import PackedLoader, concept_tokens
from nuner_jax.data.packed_rows import RowStream
from nuner_jax.data.prefetch import Prefetch
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError
from nuner_jax.pretrained import load_tokenizer

TEXT = ("tokens", "segments", "scored", "pair_positions", "pair_concepts", "dropped_pairs")


@pytest.fixture(scope="module")
def tokenizer(root):
    return load_tokenizer(root / "nuner_jax" / "data" / "sample" / "tokenizer")


def build(path, cache):
    return builder.ensure_built(str(path), cache / "shards", validation_fraction=0.1)


@pytest.fixture(scope="module")
def load(tokenizer, tmp_path_factory):
    """The train split of these inputs, in windows of 64 tokens."""
    cache = tmp_path_factory.mktemp("cache")

    def load_inputs(*, window=64, **inputs) -> Corpus:
        built = {name: build(path, cache) for name, path in inputs.items()}
        return load_corpus(built, "train", tokenizer, window=window, concept_length=32, cache_dir=cache)

    return load_inputs


@pytest.fixture(scope="module")
def corpus(load, rows_file):
    return load(rows=rows_file)


@pytest.fixture(scope="module")
def doubled(load, rows_file, tmp_path_factory):
    """The same texts with a second concept for every mention."""
    folder = tmp_path_factory.mktemp("doubled")
    records = [
        Record(
            record.text,
            tuple(dataclasses.replace(e, concept=kind) for e in record.entities for kind in (e.concept, "x")),
        )
        for record in builder.open_split(build(rows_file, folder), "train")
    ]
    builder.build(records, folder / "data", validation_fraction=0)
    return load(doubled=folder / "data")


@pytest.fixture(scope="module")
def two_sources(load, rows_file, root):
    return load(rows=rows_file, desk=root / "nuner_jax" / "data" / "sample" / "travel_desk.jsonl")


@pytest.fixture(scope="module")
def sample(load):
    """The whole embedded sample, as the quickstart reads it."""
    return load(sample="sample", window=128)


def make(corpus: Corpus, **options) -> PackedLoader:
    defaults = {"rows": 12, "row_length": 128, "concept_row_length": 64, "row_multiple": 4, "seed": 3, "pad_id": 1}
    return PackedLoader(corpus, **defaults | options)


def assert_same(batch: dict, other: dict) -> None:
    assert batch.keys() == other.keys()
    for name in batch:
        assert batch[name].dtype == other[name].dtype
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def pieces(tokens_L: np.ndarray, segments_L: np.ndarray) -> list[tuple[int, tuple[int, ...]]]:
    """(start, tokens) of each segment of a row, which lie one after another."""
    number = int(segments_L.max())
    found = [np.flatnonzero(segments_L == segment) for segment in range(1, number + 1)]
    assert all(at.size and at[-1] - at[0] + 1 == at.size for at in found), "contiguous"
    return [(int(at[0]), tuple(tokens_L[at].tolist())) for at in found]


def visited(batch: dict) -> list[list[tuple[int, ...]]]:
    """The sequences in each row of a batch, as their tokens."""
    return [[ids for _, ids in pieces(*row)] for row in zip(batch["tokens"], batch["segments"], strict=True)]


def contents(corpus: Corpus) -> dict[tuple[int, ...], set[tuple[int, int]]]:
    """The pairs (position, concept id) of each sequence, by its tokens."""
    tokens, pairs = corpus.sequence_offsets_W1, corpus.pair_offsets_W1
    found = {}
    for w in range(corpus.source_W.size):
        at = slice(pairs[w], pairs[w + 1])
        mine = set(zip(corpus.pair_positions_P[at].tolist(), corpus.pair_concepts_P[at].tolist(), strict=True))
        found[tuple(corpus.tokens_T[tokens[w] : tokens[w + 1]].tolist())] = mine
    assert len(found) == corpus.source_W.size, "no two sequences are alike"
    return found


def row_pairs(batch: dict, row: int) -> list[tuple[int, int]]:
    """The pairs of a row of text, (position in the row, concept id), without padding."""
    positions, concepts = batch["pair_positions"][row], batch["pair_concepts"][row]
    np.testing.assert_array_equal(positions == -1, concepts == -1)
    return [(p, c) for p, c in zip(positions.tolist(), concepts.tolist(), strict=True) if p >= 0]


def named_concepts(batch: dict) -> dict[int, tuple[int, ...]]:
    """The tokens of each concept in a batch's concept rows, by id."""
    found = {}
    for ids_S, tokens_K, segments_K in zip(
        batch["concept_ids"], batch["concept_tokens"], batch["concept_segments"], strict=True
    ):
        number = int((ids_S >= 0).sum())
        assert segments_K.max() == number and (ids_S[number:] == -1).all()
        for concept, (_, tokens) in zip(ids_S[:number].tolist(), pieces(tokens_K, segments_K), strict=True):
            assert concept not in found, "each concept stands once"
            found[concept] = tokens
    return found


def test_a_batch_depends_on_the_seed_and_the_step_alone(corpus):
    loader, steps = make(corpus), 2 * make(corpus).num_batches
    in_order = [loader.batch(step) for step in range(steps)]
    fresh = make(corpus)
    for step in np.random.default_rng(0).permutation(steps):
        assert_same(fresh.batch(int(step)), in_order[step])
    assert_same(make(corpus).batch(steps - 1), in_order[-1])
    assert not np.array_equal(make(corpus, seed=4).batch(0)["tokens"], in_order[0]["tokens"])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_rows_of_several_hosts_are_the_whole_batch(corpus, hosts, interleaved):
    whole, parts = make(corpus), [make(corpus) for _ in range(hosts)]
    for step in (0, 7, whole.num_batches):

        def rows(count, host):
            assert count % hosts == 0
            return np.arange(host, count, hosts) if interleaved else np.split(np.arange(count), hosts)[host]

        shapes = whole.shapes
        got = [
            part.batch(step, rows(shapes.rows, host), rows(shapes.concept_rows, host))
            for host, part in enumerate(parts)
        ]
        expected = whole.batch(step)
        for name in expected:
            count = len(expected[name])
            order = np.concatenate([rows(count, host) for host in range(hosts)])
            np.testing.assert_array_equal(np.concatenate([part[name] for part in got]), expected[name][order], name)


def test_an_epoch_visits_every_sequence_once_also_where_batches_straddle_it(corpus):
    loader, epochs = make(corpus), 3
    assert loader.rows_per_epoch % loader.shapes.rows, "an epoch ends inside a batch"
    steps = -(-epochs * loader.rows_per_epoch // loader.shapes.rows)
    rows = [row for step in range(steps) for row in visited(loader.batch(step))]
    arrangements = []
    for epoch in range(epochs):
        mine = rows[epoch * loader.rows_per_epoch : (epoch + 1) * loader.rows_per_epoch]
        assert Counter(ids for row in mine for ids in row) == Counter(contents(corpus).keys())
        arrangements.append(mine)
    assert sum(a == b for a, b in zip(*arrangements[:2], strict=True)) < 0.1 * loader.rows_per_epoch
    together = [{frozenset(row) for row in mine} for mine in arrangements[:2]]
    assert len(together[0] & together[1]) < 0.5 * loader.rows_per_epoch, "other neighbours in each epoch"


def test_weights_are_visits_per_epoch_and_a_fraction_is_a_seeded_part(two_sources):
    def visits(seed, **weights):
        loader = make(two_sources, seed=seed, shuffle=False, weights=weights)
        count = Counter(ids for i in range(loader.num_batches) for row in visited(loader.batch(i)) for ids in row)
        assert count.total() == loader.sequences_per_epoch
        per_source = [[], []]
        for ids, source in zip(contents(two_sources), two_sources.source_W, strict=True):
            per_source[source].append(count[ids])
        return per_source

    rows, desk = visits(0, rows=2.0, desk=0.4)
    assert set(rows) == {2} and set(desk) == {0, 1}
    assert 0.3 < np.mean(desk) < 0.5
    assert visits(0, rows=2.0, desk=0.4) == [rows, desk]
    other_desk = visits(1, rows=2.0, desk=0.4)[1]
    assert 0.3 < np.mean(other_desk) < 0.5 and other_desk != desk
    rows, desk = visits(0, rows=0.0, desk=1.5)
    assert set(rows) == {0} and set(desk) == {1, 2}
    assert set(visits(0)[0] + visits(0)[1]) == {1}, "one by default"


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"rows": 0.0, "desk": 0.0}, "no sequence is left"), ({"desk": -1.0}, r"sources\.desk\.weight = -1")],
)
def test_weights_that_leave_nothing_or_are_negative_are_named(two_sources, weights, message):
    with pytest.raises(NunerError, match=message):
        make(two_sources, weights=weights)


def test_a_sequence_longer_than_a_row_is_refused(corpus):
    with pytest.raises(NunerError, match="row_length"):
        make(corpus, row_length=32)


def test_rows_hold_sequences_with_their_segments_scores_and_pairs(corpus, tokenizer):
    loader, known = make(corpus), contents(corpus)
    for step in range(4):
        batch = loader.batch(step)
        assert {batch[name].shape[0] for name in TEXT} == {12}
        for row in range(12):
            tokens, segments, expected, inner = batch["tokens"][row], batch["segments"][row], [], set()
            assert (tokens[segments == 0] == 1).all(), "padding"
            for start, ids in pieces(tokens, segments):
                assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
                expected += [(start + position, concept) for position, concept in known[ids]]
                inner |= set(range(start + 1, start + len(ids) - 1))
            assert sorted(row_pairs(batch, row)) == sorted(expected)
            assert set(np.flatnonzero(batch["scored"][row]).tolist()) == inner, "all but special tokens and padding"


def test_concept_rows_hold_the_distinct_concepts_of_the_batch(corpus, tokenizer):
    loader = make(corpus)
    for step in range(4):
        batch = loader.batch(step)
        found = named_concepts(batch)
        assert set(found) == set(batch["pair_concepts"][batch["pair_concepts"] >= 0].tolist())
        for concept, ids in found.items():
            assert tokenizer.decode(ids, skip_special_tokens=True) == corpus.concept_names[concept]
            assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert (batch["concept_tokens"][batch["concept_segments"] == 0] == 1).all()


def test_shapes_are_static_rounded_and_within_their_limits(corpus):
    loader = make(corpus, row_multiple=8)
    shapes = [{name: (array.shape, array.dtype) for name, array in loader.batch(i).items()} for i in range(5)]
    assert all(each == shapes[0] for each in shapes)
    assert loader.shapes.concept_rows % 8 == 0 and loader.shapes.concept_row_length <= 64
    assert {dtype for _, dtype in shapes[0].values()} == {np.dtype(np.int32), np.dtype(bool)}


@pytest.mark.parametrize(("rows", "row_length"), [(16, 128), (4, 512)])
def test_the_sample_fills_rows_and_nothing_is_dropped(sample, rows, row_length):
    loader = make(sample, rows=rows, row_length=row_length, concept_row_length=row_length, row_multiple=8, seed=0)
    assert loader.fill >= 0.92
    batches = [loader.batch(index) for index in range(loader.rows_per_epoch // rows)]
    filled = np.mean([(batch["segments"] > 0).mean() for batch in batches])
    assert filled == pytest.approx(loader.fill, abs=0.005)
    assert sum(batch["dropped_pairs"].sum() + batch["dropped_concepts"].sum() for batch in batches) == 0
    concepts = np.mean([(batch["concept_segments"] > 0).mean() for batch in batches])
    assert concepts > 0.8, "concept rows are worth their slots"


def test_batches_have_their_share_of_heavy_and_light_rows(sample):
    loader = make(sample, rows=8, row_length=128, concept_row_length=128)
    shuffled = RowStream(sample.length_W, row_length=128, seed=3)

    def spread(stream):
        placed = stream.placed(np.arange(8 * (stream.rows_per_epoch // 8)))
        return np.bincount(placed.row_N // 8, concept_tokens(sample)[placed.sequence_N]).std()

    assert spread(loader._stream) < 0.4 * spread(shuffled)


def test_a_sequences_concept_tokens_are_those_of_its_distinct_concepts(doubled):
    length_C = np.diff(doubled.concept_offsets_C1)
    expected = [
        length_C[np.unique(doubled.pair_concepts_P[first:end])].sum()
        for first, end in itertools.pairwise(doubled.pair_offsets_W1)
    ]
    assert concept_tokens(doubled).tolist() == expected
    assert max(expected) > 0


@pytest.mark.parametrize("room", [8, 9])
def test_pairs_without_room_are_counted_and_their_tokens_not_scored(doubled, room):
    """With two concepts for each token, and room for 9 pairs, the room ends between the two of one token."""
    loader = make(doubled)
    whole = [loader.batch(step) for step in range(3)]
    loader.shapes = dataclasses.replace(loader.shapes, pairs_per_row=room)
    for step, before in enumerate(whole):
        batch = loader.batch(step)
        for row in range(12):
            all_pairs, kept = set(row_pairs(before, row)), row_pairs(batch, row)
            assert len(kept) == len(set(kept)) and set(kept) <= all_pairs
            assert 0 < len(kept) <= room
            assert batch["dropped_pairs"][row] == len(all_pairs) - len(kept) > 0
            # A token that is scored has all of its concepts; every other positive token is not scored at all.
            scored = set(np.flatnonzero(batch["scored"][row]).tolist())
            assert {pair for pair in all_pairs if pair[0] in scored} == set(kept)
            no_longer = set(np.flatnonzero(before["scored"][row]).tolist()) - scored
            assert no_longer == {position for position, _ in all_pairs - set(kept)}


@pytest.mark.parametrize("capacity", [{"concepts_per_row": 3}, {"concept_row_length": 24}])
def test_concepts_without_room_are_counted_and_the_others_stay_whole(corpus, capacity):
    loader = make(corpus)
    before = named_concepts(loader.batch(0))
    loader.shapes = dataclasses.replace(loader.shapes, **capacity)
    batch = loader.batch(0)
    kept = named_concepts(batch)
    assert 0 < len(kept) < len(before)
    assert kept == {concept: before[concept] for concept in kept}
    assert batch["dropped_concepts"].sum() == len(before) - len(kept)
    assert batch["dropped_concepts"].shape == (loader.shapes.concept_rows,)


def test_evaluation_has_one_order_visits_all_once_and_pads_the_last_batch(corpus):
    loader = make(corpus, shuffle=False)
    batches = [loader.batch(index) for index in range(loader.num_batches)]
    rows = [row for batch in batches for row in visited(batch)]
    assert Counter(ids for row in rows for ids in row) == Counter(contents(corpus).keys())
    empty = loader.num_batches * loader.shapes.rows - loader.rows_per_epoch
    assert empty > 0 and [row == [] for row in rows] == [False] * loader.rows_per_epoch + [True] * empty
    last = {name: batches[-1][name][-empty:] for name in TEXT}
    assert (last["tokens"] == 1).all() and not last["scored"].any() and (last["pair_positions"] == -1).all()
    for index in reversed(range(loader.num_batches)):
        assert_same(make(corpus, shuffle=False).batch(index), batches[index])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetched_batches_come_in_order_and_raise_where_they_failed(depth):
    def make_batch(step):
        if step == 5:
            raise ValueError(f"no batch {step}")
        return {"step": step}

    batches = Prefetch(make_batch, 2, 7, depth)
    assert [batches.get()["step"] for _ in range(3)] == [2, 3, 4]
    with pytest.raises(ValueError, match="no batch 5"):
        batches.get()
    batches.close()


def test_prefetch_works_ahead_by_its_depth_and_no_further_and_waits_are_counted():
    made, gate = [], threading.Semaphore(0)

    def make_batch(step):
        gate.acquire()
        made.append(step)
        return step

    batches = Prefetch(make_batch, 0, 4, 2)
    gate.release(10)
    deadline = time.time() + 5
    while len(made) < 2 and time.time() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1], "two ahead, before the first was asked for"
    assert [batches.get() for _ in range(4)] == [0, 1, 2, 3]
    batches.close()
    assert made == [0, 1, 2, 3], "none beyond the last step"

    slow = Prefetch(lambda step: time.sleep(0.03), 0, 2, 1)
    slow.get()
    slow.close()
    assert slow.waited >= 0.02
