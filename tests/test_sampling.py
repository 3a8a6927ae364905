"""Words, and k~2k and kw samples: what they promise for any pool, and what they say when the pool is too small."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nuner_jax.data.ner.datasets import load
from nuner_jax.data.ner.words import flat, label_words, word_spans
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import sampling
from nuner_jax.fewshot.sampling import hash_ids, pool_counts, sample_sentences, shortages

# --- Words ------------------------------------------------------------------------------------


def words_of(text, split_on_space):
    return [text[start:end] for start, end in word_spans(text, split_on_space)]


def test_words_of_a_conll_text_are_divided_by_spaces_only():
    assert words_of("U.S. isn't #1 a\u00a0b", split_on_space=True) == ["U.S.", "isn't", "#1", "a\u00a0b"]


def test_words_of_running_text_are_letters_and_digits_and_single_marks():
    assert words_of("Dr. O'Neil, £640...", split_on_space=False) == [
        *("Dr", ".", "O", "'", "Neil", ",", "£", "640", ".", ".", ".")
    ]


@given(st.text(), st.booleans())
def test_words_are_in_order_and_leave_only_white_space_between_them(text, split_on_space):
    spans = word_spans(text, split_on_space)
    assert spans.dtype == "int32" and spans.shape[1:] == (2,)
    covered = [place for start, end in spans.tolist() for place in range(start, end)]
    assert covered == sorted(set(covered))
    left = "".join(text[place] for place in set(range(len(text))) - set(covered))
    assert set(left) <= {" "} if split_on_space else not left.strip()


def test_every_word_that_a_mention_touches_has_its_type():
    record = Record("the IL-2 gene of K562cells", (Entity(4, 13, "gene"), Entity(17, 21, "cell")))
    spans = word_spans(record.text, split_on_space=False)
    assert label_words(record, spans, {"cell": 1, "gene": 2}).tolist() == [0, 2, 2, 2, 2, 0, 1]


def test_of_overlapping_mentions_the_longest_stays():
    record = Record("University of Oslo", (Entity(14, 18, "place"), Entity(0, 18, "org"), Entity(0, 10, "kind")))
    assert flat(record).entities == (Entity(0, 18, "org"),)


# --- Samples ----------------------------------------------------------------------------------

pools = arrays.arrays(
    np.int32,
    st.tuples(st.integers(1, 60), st.integers(1, 6)),
    elements=st.sampled_from([0, 0, 0, 1, 1, 2, 5]),
).filter(lambda counts: counts.any())
ks = st.integers(1, 9)
seeds = st.integers(0, 5)


def one_by_one(counts_SxT, k, seed):
    """The rule as it is written down: one sentence after another."""
    order = np.argsort(np.random.Generator(np.random.Philox(key=[seed, k])).random(len(counts_SxT)), kind="stable")
    goal = np.minimum(counts_SxT.sum(axis=0), k)
    have, drawn, useful = 0 * goal, [], 0
    for sentence in order:
        if (have >= goal).all():
            break
        if (have + counts_SxT[sentence] > 2 * k).any():
            continue
        drawn.append(int(sentence))
        if (counts_SxT[sentence] * (have < goal)).any():
            useful = len(drawn)
        have = have + counts_SxT[sentence]
    drawn = drawn[:useful]
    have = counts_SxT[drawn].sum(axis=0)
    for sentence in (int(one) for one in order if one not in drawn):
        now = have + counts_SxT[sentence]
        if (counts_SxT[sentence] * (have < goal)).any() and not (now > 2 * k).any():
            drawn.append(sentence)
            have = now
    return tuple(sorted(drawn))


@given(pools, ks, seeds, st.integers(1, 20))
def test_a_sample_is_what_adding_one_sentence_after_another_gives(counts, k, seed, block):
    whole, sampling._BLOCK = sampling._BLOCK, block
    try:
        assert sample_sentences(counts, k, seed).ids == one_by_one(counts, k, seed)
    finally:
        sampling._BLOCK = whole


@given(pools, ks, seeds)
def test_no_type_has_more_than_2k_and_each_reaches_k_unless_every_sentence_left_would_break_that(counts, k, seed):
    sample = sample_sentences(counts, k, seed)
    reached = counts[list(sample.ids)].sum(axis=0)
    assert tuple(reached) == sample.reached
    assert (reached <= 2 * k).all()
    left = np.delete(counts, list(sample.ids), axis=0)
    for number in np.flatnonzero(reached < k):
        helpful = left[left[:, number] > 0]
        assert (helpful + reached > 2 * k).any(axis=1).all()
    assert sample.short == tuple(np.flatnonzero(counts.sum(axis=0) < k))
    assert sample.blocked == tuple(t for t in np.flatnonzero(reached < k) if t not in sample.short)


@given(pools, ks)
def test_every_type_with_single_mentions_reaches_k_where_the_pool_has_them(counts, k):
    """Sentences of one mention each never block one another."""
    single = np.repeat(np.eye(counts.shape[1], dtype=np.int32), counts.sum(axis=0), axis=0)
    sample = sample_sentences(single, k, seed=0)
    assert not sample.blocked
    assert all(n >= min(k, have) for n, have in zip(sample.reached, single.sum(axis=0), strict=True))


@given(pools, ks, seeds)
def test_a_sample_is_a_function_of_counts_k_and_seed(counts, k, seed):
    first = sample_sentences(counts, k, seed)
    assert sample_sentences(counts.copy(), k, seed) == first
    assert sample_sentences(counts.astype(np.int64), k, seed, "kw") == first
    assert len(set(first.ids)) == len(first.ids) and list(first.ids) == sorted(first.ids)


@given(st.lists(st.integers(0, 10**6), unique=True), st.randoms())
def test_the_hash_names_the_ids_and_nothing_else(ids, rng):
    mixed = list(ids)
    rng.shuffle(mixed)
    assert hash_ids(mixed) == hash_ids(ids)
    assert hash_ids([*ids, 10**6 + 1]) != hash_ids(ids)


def test_the_hash_can_be_made_elsewhere():
    assert hash_ids([12, 3, 400]) == hashlib.sha256(b"3,12,400").hexdigest()[:16]


def test_the_samples_of_the_embedded_sets_do_not_change():
    """Results name their samples by these hashes; if this fails, results of before cannot be compared any more."""
    counts = pool_counts(load({"name": "travel_desk"}), "k~2k")
    assert [sample_sentences(counts, k, seed).hash for k, seed in ((1, 0), (4, 0), (4, 1), (16, 0))] == [
        "e311e1c1cd1c46f6",
        "6d9b1fb52aa77f83",
        "436d1d225b02895e",
        "45e5a2192b8e63c2",
    ]


def test_seeds_and_ks_draw_different_sentences():
    counts = pool_counts(load({"name": "travel_desk"}), "k~2k")
    hashes = [sample_sentences(counts, k, seed).hash for k in (1, 4, 16) for seed in range(10)]
    assert len(set(hashes)) == len(hashes)


def test_sentences_without_mentions_are_drawn_as_often_as_others():
    rng = np.random.default_rng(0)
    counts = np.zeros((4000, 3), np.int32)
    counts[rng.permutation(4000)[:1000], rng.integers(3, size=1000)] = 1
    sample = sample_sentences(counts, 64, seed=0)
    share = np.mean(counts[list(sample.ids)].sum(axis=1) == 0)
    assert 0.7 < share < 0.8


def test_a_pool_too_small_gives_what_it_has_and_says_what_is_short():
    counts = np.array([[1, 0, 0]] * 3 + [[0, 2, 0]] * 40 + [[0, 0, 0]] * 5, np.int32)
    sample = sample_sentences(counts, k=16, seed=1)
    assert sample.reached[0] == 3 and 16 <= sample.reached[1] <= 32
    assert sample.short == (0, 2) and sample.blocked == ()
    assert shortages({(16, 1): sample}, counts, ["city", "person", "unseen"]) == [
        "k is larger than the number of mentions of some types in all 48 sentences of the pool:"
        " k = 16: city 3, unseen 0"
    ]


def test_a_type_that_comes_with_too_many_of_another_is_named():
    counts = np.array([[9, 1]] * 5 + [[1, 0]] * 9, np.int32)
    sample = sample_sentences(counts, k=2, seed=0)
    assert sample.blocked == (1,) and sample.reached[1] == 0
    free = sample_sentences(counts, k=1, seed=0)
    (line,) = shortages({(1, 0): free, (2, 0): sample, (2, 1): sample}, counts, ["word", "title"], rule="kw")
    assert line.endswith(
        "fewer than k words of a type, as every sentence left would lift a type above 2k:"
        " k = 1: 1 of 1 samples, seed 0 with title 0; k = 2: 2 of 2 samples, seed 0 with title 0"
    )
    enough = np.eye(2, dtype=np.int32).repeat(9, axis=0)
    assert shortages({(2, 0): sample_sentences(enough, 2, 0)}, enough, ["word", "title"]) == []


def test_mentions_and_words_are_counted_by_type(tmp_path):
    (tmp_path / "train.txt").write_text("New\tB-loc\nYork\tI-loc\nOslo\tB-loc\nBo\tB-per\n\nthe\tO\nend\tO\n")
    (tmp_path / "test.txt").write_text("oak\tB-tree\n")
    loaded = load({"name": "mine", "path": str(tmp_path)})
    assert loaded.types == ("loc", "per", "tree")
    assert pool_counts(loaded, "k~2k").tolist() == [[2, 1, 0], [0, 0, 0]]
    assert pool_counts(loaded, "kw").tolist() == [[3, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "k", "seed", "rule", "complaint"),
    [
        (np.ones((3, 2), np.int32), -1, 0, "k~2k", "k = -1, seed = 0: neither may be negative"),
        (np.ones((3, 2), np.int32), 1, -1, "k~2k", "k = 1, seed = -1: neither may be negative"),
        (np.ones((3, 2), np.int32), 1, 0, "2k", "rule '2k': choose one of 'k~2k', 'kw'"),
        (np.zeros((3, 2), np.int32), 1, 0, "kw", "the pool of 3 sentences has no mention"),
    ],
)
def test_what_cannot_be_sampled_is_refused(counts, k, seed, rule, complaint):
    with pytest.raises(NunerError, match=complaint):
        sample_sentences(counts, k, seed, rule)
