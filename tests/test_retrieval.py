"""Token-to-concept retrieval against its definition, written out pair by pair."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nuner_jax import sharding
from nuner_jax.data import builder
from nuner_jax.data.corpus import load_corpus
from nuner_jax.data.loader import PackedLoader
from nuner_jax.pretrained import load_tokenizer
from nuner_jax.tasks import retrieval

R, L, D, N, PAIRS = 8, 10, 4, 23, 9


@functools.cache
def on_mesh(shape: tuple[int, int, int]):
    """retrieval_sums on a mesh of the eight devices, rows placed as training places them."""
    mesh = sharding.make_mesh(*shape)
    compiled = jax.jit(functools.partial(retrieval.retrieval_sums, mesh))

    def sums(tokens, concepts, positions, ids) -> dict[str, float]:
        rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
        placed = (jax.device_put(array, rows) for array in (tokens, positions, ids))
        tokens, positions, ids = placed
        concepts = jax.device_put(concepts, sharding.replicated(mesh))
        return {name: float(value) for name, value in compiled(tokens, concepts, positions, ids).items()}

    return sums


def make_inputs(seed: int, integers: bool):
    """Vectors, and pairs in which tokens have up to three concepts; with small integers most scores are tied."""
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.integers, -3, 4) if integers else lambda size: rng.normal(size=size)
    positions = rng.integers(0, 5, (R, PAIRS))
    ids = np.stack([rng.permutation(N)[:PAIRS] for _ in range(R)])  # so each pair occurs once
    empty = rng.random((R, PAIRS)) < 0.25
    empty[3] = True  # a row without pairs
    positions[empty], ids[empty] = -1, -1
    tokens, concepts = (np.asarray(draw(size=size), np.float32) for size in ((R, L, D), (N, D)))
    return tokens, concepts, positions.astype(np.int32), ids.astype(np.int32)


def reference(tokens, concepts, positions, ids) -> dict[str, float]:
    """The definition: rank among all concepts but the token's other right ones, a tie counting half."""
    ranks = []
    for row in range(tokens.shape[0]):
        pairs = [(p, c) for p, c in zip(positions[row], ids[row], strict=True) if p >= 0]
        for position, concept in pairs:
            scores = concepts @ tokens[row, position]
            right = {c for p, c in pairs if p == position}
            rivals = [scores[c] for c in range(len(concepts)) if c not in right]
            higher = sum(score > scores[concept] for score in rivals)
            equal = sum(score == scores[concept] for score in rivals)
            ranks.append(1 + higher + equal / 2)
    ranks = np.array(ranks)
    return {"top1": np.sum(ranks == 1), "reciprocal_rank": np.sum(1 / ranks), "pairs": float(len(ranks))}


@pytest.mark.parametrize("integers", [True, False], ids=["many ties", "no ties"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_sums_are_those_of_the_definition_on_every_mesh(shape, integers):
    first_places = 0
    for seed in range(5):
        inputs = make_inputs(seed, integers)
        expected, actual = reference(*inputs), on_mesh(shape)(*inputs)
        assert expected["pairs"] > 40
        assert actual == {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}
        first_places += expected["top1"]
    assert first_places > 0


def single(token, concepts, *pairs, dtype=np.float32) -> dict[str, float]:
    """The sums of one token at position 2 with these concepts, in the first of eight rows."""
    tokens = np.zeros((R, L, len(token)), dtype)
    tokens[0, 2] = token
    positions, ids = (np.full((R, PAIRS), -1, np.int32) for _ in range(2))
    positions[0, : len(pairs)], ids[0, : len(pairs)] = 2, pairs
    return on_mesh((8, 1, 1))(tokens, np.asarray(concepts, dtype), positions, ids)


def test_a_tie_is_half_a_place_lost_and_not_a_first_place():
    assert single([1], [[3], [3], [0]], 0) == {"top1": 0, "reciprocal_rank": pytest.approx(1 / 1.5), "pairs": 1}
    assert single([0], [[3]] * 5, 0)["reciprocal_rank"] == pytest.approx(1 / 3), "all alike: the middle"


def test_other_right_concepts_of_a_token_are_no_rivals():
    concepts = [[5], [4], [3], [0]]
    assert single([1], concepts, 2) == {"top1": 0, "reciprocal_rank": pytest.approx(1 / 3), "pairs": 1}
    both = single([1], concepts, 0, 2)
    assert both == {"top1": 1, "reciprocal_rank": pytest.approx(1 + 1 / 2), "pairs": 2}
    assert single([1], concepts, 0, 1, 2)["top1"] == 3


def test_a_batch_without_pairs_sums_to_nothing():
    assert single([1], [[1], [2]]) == {"top1": 0, "reciprocal_rank": 0, "pairs": 0}


def test_half_precision_vectors_are_compared_in_float32():
    # In bfloat16 both scores would be 256, and tie.
    assert single([1, 1], [[256, 0.5], [256, 0]], 0, dtype=jnp.bfloat16)["top1"] == 1


@pytest.fixture(scope="module")
def corpus(root, rows_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    data = builder.ensure_built(str(rows_file), cache / "shards", validation_fraction=0.1)
    tokenizer = load_tokenizer(root / "nuner_jax" / "data" / "sample" / "tokenizer")
    return load_corpus({"rows": data}, "validation", tokenizer, window=128, concept_length=32, cache_dir=cache)


@pytest.mark.parametrize("rows", [8, 64])
def test_concept_batches_hold_all_names_one_a_row_in_the_order_of_their_ids(corpus, rows):
    batches = list(retrieval.concept_batches(corpus, rows, pad_id=1))
    assert {array.shape for batch in batches for array in batch} == {batches[0][0].shape}
    tokens, segments = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    assert tokens.shape[0] == -(-len(corpus.concept_names) // rows) * rows
    at = corpus.concept_offsets_C1
    for concept in range(len(corpus.concept_names)):
        ids = corpus.concept_tokens_U[at[concept] : at[concept + 1]]
        np.testing.assert_array_equal(tokens[concept, : ids.size], ids)
        assert segments[concept].tolist() == [1] * ids.size + [0] * (segments.shape[1] - ids.size)
    assert (tokens[segments == 0] == 1).all() and not segments[len(corpus.concept_names) :].any()


def test_vectors_that_know_the_answer_find_every_concept_of_real_batches(corpus):
    """One-hot concepts, and tokens that are the sum of theirs: every right concept is first."""
    loader = PackedLoader(
        corpus, rows=8, row_length=128, concept_row_length=64, row_multiple=8, seed=0, pad_id=1, shuffle=False
    )
    concepts = np.eye(len(corpus.concept_names), dtype=np.float32)
    pairs = 0.0
    for index in range(loader.num_batches):
        batch = loader.batch(index)
        tokens = np.zeros((8, 128, len(corpus.concept_names)), np.float32)
        row, place = np.nonzero(batch["pair_positions"] >= 0)
        tokens[row, batch["pair_positions"][row, place], batch["pair_concepts"][row, place]] = 1
        sums = on_mesh((2, 2, 2))(tokens, concepts, batch["pair_positions"], batch["pair_concepts"])
        assert sums["top1"] == sums["reciprocal_rank"] == sums["pairs"]
        pairs += sums["pairs"]
    assert pairs == corpus.pair_positions_P.size > 500


def test_vectors_that_are_not_numbers_rank_last_and_not_first():
    mesh = sharding.make_mesh(8, 1, 1)
    tokens = np.full((8, 4, 3), np.nan, np.float32)
    sums = retrieval.retrieval_sums(
        mesh, tokens, np.ones((5, 3), np.float32), np.zeros((8, 1), np.int32), np.full((8, 1), 2, np.int32)
    )
    assert (float(sums["top1"]), float(sums["pairs"])) == (0, 8)
    assert float(sums["reciprocal_rank"]) <= 8 / 5 + 1e-6
