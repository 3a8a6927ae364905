"""Label schemes and Viterbi decoding, against seqeval and against all labellings tried one by one."""

import itertools

import numpy as np
import pytest
from seqeval.scheme import BILOU, IOB2, Entities

from nuner_jax.decoding import Scheme
from nuner_jax.errors import NunerError
from nuner_jax.metrics import Spans

TYPES = ("person", "place")
OFFSETS = np.array([0, 3, 3, 4, 9])
MENTIONS = [(0, 0, 2, 1), (0, 2, 3, 1), (2, 0, 1, 2), (3, 1, 4, 2)]
SCHEMES = ("io", "bio", "bilou")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("bio", "B-person I-person B-person B-place O B-place I-place I-place O"),
        ("bilou", "B-person L-person U-person U-place O B-place I-place L-place O"),
        ("io", "person person person place O place place place O"),
    ],
)
def test_labels_of_mentions_are_the_schemes_own(name, written):
    scheme = Scheme.make(name, len(TYPES))
    labels = scheme.labels(Spans.of(MENTIONS), OFFSETS)
    assert " ".join(scheme.names(TYPES)[label] for label in labels) == written


@pytest.mark.parametrize("name", ["bio", "bilou"])
def test_mentions_survive_labelling_and_decoding(name):
    scheme = Scheme.make(name, len(TYPES))
    assert scheme.spans(scheme.labels(Spans.of(MENTIONS), OFFSETS), OFFSETS).mentions() == MENTIONS


def test_io_joins_mentions_of_one_type_that_touch():
    scheme = Scheme.make("io", len(TYPES))
    spans = scheme.spans(scheme.labels(Spans.of(MENTIONS), OFFSETS), OFFSETS)
    assert spans.mentions() == [(0, 0, 3, 1), *MENTIONS[2:]]


def test_of_overlapping_mentions_the_longest_is_labelled():
    scheme = Scheme.make("bio", 2)
    nested = Spans.of([(0, 1, 2, 2), (0, 0, 2, 1), (0, 1, 3, 2)])
    assert scheme.spans(scheme.labels(nested, np.array([0, 3])), np.array([0, 3])).mentions() == [(0, 0, 2, 1)]


@pytest.mark.parametrize(("name", "theirs"), [("bio", IOB2), ("bilou", BILOU)])
def test_any_labels_are_read_as_seqeval_reads_them_in_strict_mode(name, theirs):
    scheme = Scheme.make(name, len(TYPES))
    names = scheme.names(TYPES)
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 9, 300))])
    labels = rng.integers(0, len(names), (2, offsets[-1]))
    spans = scheme.spans(labels, offsets)
    for head in range(2):
        tags = [[names[label] for label in labels[head, a:b]] for a, b in itertools.pairwise(offsets)]
        entities = [one.to_tuple() for found in Entities(tags, scheme=theirs).entities for one in found]
        expected = [(at, start, end, TYPES.index(kind) + 1) for at, kind, start, end in entities]
        assert len(expected) > 100
        assert spans.mentions(head) == expected


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("num_types", [1, 2])
def test_viterbi_finds_what_trying_all_valid_labellings_finds(name, num_types):
    scheme = Scheme.make(name, num_types)
    classes = len(scheme.type_C)
    rng = np.random.default_rng(num_types)
    lengths = [2, 0, 1, 4, 3, 4, 1]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    logits = rng.normal(size=(offsets[-1], classes)).astype(np.float32)
    found = scheme.viterbi(logits, offsets)
    for at, length in enumerate(lengths):
        rows = logits[offsets[at] : offsets[at + 1]]
        best = max(
            (labels for labels in itertools.product(range(classes), repeat=length) if is_valid(scheme, labels)),
            key=lambda labels, rows=rows: sum(row[label] for row, label in zip(rows, labels, strict=True)),
        )
        assert tuple(found[offsets[at] : offsets[at + 1]]) == best


def is_valid(scheme, labels):
    """Whether every labelled word is of a whole mention, by the names of the labels alone."""
    names = [scheme.names("xy")[label] for label in labels]
    if len(scheme.prefixes) == 1:
        return True
    open_type = None
    for before, name in zip(["O", *names], names, strict=False):
        prefix, _, of_type = name.partition("-")
        goes_on = before[:2] in ("B-", "I-") and before[2:] == of_type
        if prefix in ("I", "L") and not goes_on:
            return False
        if len(scheme.prefixes) == 4 and open_type and not (prefix in ("I", "L") and goes_on):
            return False
        open_type = of_type if prefix in ("B", "I") else None
    return not (len(scheme.prefixes) == 4 and open_type)


@pytest.mark.parametrize("name", SCHEMES)
def test_viterbi_in_blocks_is_viterbi_at_once(name, monkeypatch):
    scheme = Scheme.make(name, 3)
    rng = np.random.default_rng(5)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 20, 50))])
    logits = rng.normal(size=(offsets[-1], len(scheme.type_C)))
    at_once = scheme.viterbi(logits, offsets)
    monkeypatch.setattr("nuner_jax.decoding._CELLS", 3 * len(scheme.type_C) ** 2)
    np.testing.assert_array_equal(scheme.viterbi(logits, offsets), at_once)


def test_valid_labels_are_left_as_they_are():
    scheme = Scheme.make("bilou", len(TYPES))
    labels = scheme.labels(Spans.of(MENTIONS), OFFSETS)
    logits = np.eye(len(scheme.type_C))[labels]
    np.testing.assert_array_equal(scheme.viterbi(logits, OFFSETS), labels)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(NunerError, match="'iobes'.*io, bio, bilou"):
        Scheme.make("iobes", 2)
