"""Metrics against seqeval, nervaluate and definitions written out in plain Python."""

import numpy as np
import pytest
from nervaluate import Evaluator
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2
from sklearn.metrics import precision_recall_fscore_support as words_scores

from nuner_jax.decoding import Scheme
from nuner_jax.errors import NunerError
from nuner_jax.metrics import (
    Spans,
    confusion,
    entity_micro_f1,
    io_spans,
    normalised,
    string_f1,
    token_macro_f1,
)

TYPES = ("airport", "date", "person", "unseen")  # "unseen" never occurs as gold
BIO = Scheme.make("bio", len(TYPES))
NAMES = np.array(BIO.names(TYPES))


@pytest.fixture(params=range(6))
def labelled(request):
    """Sentences, empty ones among them, with random BIO labels, and those of three heads that are mostly right."""
    rng = np.random.default_rng(request.param)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 12, 40))])
    gold = rng.choice(len(NAMES) - 2, offsets[-1], p=[0.4, *[0.1] * 6])
    noise = rng.integers(0, len(NAMES), (3, offsets[-1]))
    predicted = np.where(rng.random(noise.shape) < 0.3, noise, gold)
    return gold, predicted, offsets


def tags(labels, offsets):
    return [NAMES[labels[a:b]].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def test_entity_scores_are_those_of_seqeval_in_strict_mode(labelled):
    gold, predicted, offsets = labelled
    spans = BIO.spans(predicted, offsets)
    scores = entity_micro_f1(BIO.spans(gold, offsets), spans, len(TYPES), num_heads=3)
    for head in range(3):
        pair = tags(gold, offsets), tags(predicted[head], offsets)
        micro = precision_recall_fscore_support(*pair, scheme=IOB2, average="micro", zero_division=0)
        ours = (scores.precision_H[head], scores.recall_H[head], scores.f1_H[head])
        np.testing.assert_allclose(ours, micro[:3], rtol=1e-12)

        theirs = precision_recall_fscore_support(*pair, scheme=IOB2, average=None, zero_division=0)
        found = sorted({NAMES[label][2:] for label in [*gold, *predicted[head]] if NAMES[label].startswith("B-")})
        at = [TYPES.index(name) for name in found]
        np.testing.assert_allclose(scores.precision_HxT[head, at], theirs[0], rtol=1e-12)
        np.testing.assert_allclose(scores.recall_HxT[head, at], theirs[1], rtol=1e-12)
        np.testing.assert_allclose(scores.f1_HxT[head, at], theirs[2], rtol=1e-12)
        np.testing.assert_array_equal(scores.support_T[at], theirs[3])


def test_entity_scores_are_those_of_nervaluate_in_strict_mode(labelled):
    gold, predicted, offsets = labelled
    gold_spans, spans = BIO.spans(gold, offsets), BIO.spans(predicted, offsets)
    scores = entity_micro_f1(gold_spans, spans, len(TYPES), num_heads=3)

    def documents(spans, head):
        found = [[] for _ in offsets[1:]]
        for sentence, start, end, of_type in spans.mentions(head):
            found[sentence].append({"label": TYPES[of_type - 1], "start": start, "end": end - 1})
        return found

    for head in range(3):
        result = Evaluator(documents(gold_spans, 0), documents(spans, head), tags=list(TYPES)).evaluate()
        strict = result["overall"]["strict"]
        ours = (scores.precision_H[head], scores.recall_H[head], scores.f1_H[head])
        np.testing.assert_allclose(ours, (strict.precision, strict.recall, strict.f1), rtol=1e-9)
        for name, of_type in scores.per_type(head, TYPES).items():
            strict = result["entities"][name]["strict"]
            ours = (of_type["precision"], of_type["recall"], of_type["f1"], of_type["support"])
            np.testing.assert_allclose(ours, (strict.precision, strict.recall, strict.f1, strict.possible), rtol=1e-9)


def test_token_macro_f1_averages_the_types_that_occur():
    #                 two of type 1, one of type 2, none of type 3
    gold = np.array([0, 1, 1, 2, 0])
    predicted = np.array([0, 1, 3, 2, 2])
    scores = token_macro_f1(gold, predicted, num_types=3)
    np.testing.assert_allclose(scores.f1_HxT[0], [2 / 3, 2 / 3, 0])
    np.testing.assert_allclose(scores.f1_H, [2 / 3])
    np.testing.assert_allclose(scores.precision_H, [(1 + 1 / 2) / 2])
    np.testing.assert_allclose(scores.recall_H, [(1 / 2 + 1) / 2])
    np.testing.assert_array_equal(scores.support_T, [2, 1, 0])
    with_other = token_macro_f1(gold, predicted, num_types=3, include_other=True)
    np.testing.assert_allclose(with_other.f1_H, [(2 / 3 + 2 / 3 + 2 / 3) / 3])
    np.testing.assert_allclose(with_other.precision_H, [(1 + 1 / 2 + 1) / 3])


def test_token_scores_are_the_definition_for_every_head(labelled):
    gold, predicted = BIO.type_C[labelled[0]], BIO.type_C[labelled[1]]
    scores = token_macro_f1(gold, predicted, len(TYPES))
    for head in range(3):
        f1 = []
        for of_type in sorted(set(gold.tolist()) - {0}):
            both = ((gold == of_type) & (predicted[head] == of_type)).sum()
            f1.append(2 * both / ((gold == of_type).sum() + (predicted[head] == of_type).sum()))
            assert scores.f1_HxT[head, of_type - 1] == pytest.approx(f1[-1], rel=1e-12)
        assert scores.f1_H[head] == pytest.approx(np.mean(f1), rel=1e-12)


@pytest.mark.parametrize("include_other", [False, True])
def test_token_scores_are_those_of_scikit_learn(labelled, include_other):
    gold, predicted = BIO.type_C[labelled[0]], BIO.type_C[labelled[1]]
    scores = token_macro_f1(gold, predicted, len(TYPES), include_other)
    labels = sorted(set(gold.tolist()) - ({0} if not include_other else set()))
    for head in range(3):
        macro = words_scores(gold, predicted[head], labels=labels, average="macro", zero_division=0)
        ours = (scores.precision_H[head], scores.recall_H[head], scores.f1_H[head])
        np.testing.assert_allclose(ours, macro[:3], rtol=1e-12)


def test_confusion_counts_every_word_once(labelled):
    gold, predicted = BIO.type_C[labelled[0]], BIO.type_C[labelled[1]]
    counts = confusion(gold, predicted, len(TYPES))
    assert counts.shape == (3, 5, 5)
    for head in range(3):
        for word in range(len(gold)):
            counts[head, gold[word], predicted[head, word]] -= 1
    assert not counts.any()


def test_io_spans_end_where_the_type_changes_and_with_the_sentence():
    labels = np.array([[1, 1, 0, 2, 1, 1], [0, 0, 0, 0, 0, 2]])
    spans = io_spans(labels, np.array([0, 0, 2, 5, 6]))
    assert spans.mentions(0) == [(1, 0, 2, 1), (2, 1, 2, 2), (2, 2, 3, 1), (3, 0, 1, 1)]
    assert spans.mentions(1) == [(3, 0, 1, 2)]


def test_io_spans_are_those_of_the_io_scheme(labelled):
    io = Scheme.make("io", len(TYPES))
    types, offsets = BIO.type_C[labelled[1]], labelled[2]
    ours, theirs = io_spans(types, offsets), io.spans(types, offsets)
    assert [ours.mentions(head) for head in range(3)] == [theirs.mentions(head) for head in range(3)]


def test_spans_in_characters_are_the_words_of_the_text():
    texts = ["Fly to New York", "(New York)"]
    characters = np.array([[0, 3], [4, 6], [7, 10], [11, 15], [0, 1], [1, 4], [5, 9], [9, 10]])
    spans = io_spans(np.array([0, 0, 1, 1, 0, 2, 2, 0]), np.array([0, 4, 8]))
    found = spans.in_characters(characters, np.array([0, 4, 8])).mentions()
    assert [(texts[sentence][start:end], kind) for sentence, start, end, kind in found] == [("New York", 1)] + [
        ("New York", 2)
    ]


def test_string_f1_compares_different_normalised_strings_of_each_sentence_and_type():
    texts = ["The Alps, the Alps and the ALPS!", "Alps"]
    gold = Spans.of([(0, 0, 8, 1), (0, 10, 18, 1), (1, 0, 4, 2)])  # "The Alps", "the Alps"; "Alps"
    predicted = Spans.of([(0, 27, 32, 1), (1, 0, 4, 1)])  # "ALPS!" elsewhere; right string, wrong type
    scores = string_f1(gold, predicted, texts, num_types=2)
    np.testing.assert_array_equal(scores.support_T, [1, 1])
    np.testing.assert_allclose((scores.precision_H[0], scores.recall_H[0], scores.f1_H[0]), (1 / 2, 1 / 2, 1 / 2))
    np.testing.assert_allclose(entity_micro_f1(gold, predicted, num_types=2).f1_H, [0])


def test_string_f1_is_the_definition_for_every_head(labelled):
    gold, predicted, offsets = labelled
    rng = np.random.default_rng(len(gold))
    words = rng.choice(["a", "The", "U.S.", "us", "Alps", "alps,"], len(gold))
    texts = [" ".join(words[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]
    ends = np.concatenate([np.cumsum([len(word) + 1 for word in text.split()]) for text in texts]) - 1
    characters = np.stack([ends - [len(word) for word in words], ends], axis=1).astype(int)
    gold_spans = BIO.spans(gold, offsets).in_characters(characters, offsets)
    spans = BIO.spans(predicted, offsets).in_characters(characters, offsets)
    scores = string_f1(gold_spans, spans, texts, len(TYPES), num_heads=3)

    def strings(spans, head):
        return {(at, normalised(texts[at][start:end]), kind) for at, start, end, kind in spans.mentions(head)}

    wanted = strings(gold_spans, 0)
    for head in range(3):
        found = strings(spans, head)
        assert scores.f1_H[head] == pytest.approx(2 * len(wanted & found) / (len(wanted) + len(found)), rel=1e-12)


@pytest.mark.parametrize(
    ("text", "same"),
    [("The  U.S.", "us"), ("a\tman", "man"), ("Theatre", "theatre"), ("an-a", "ana"), ("the", ""), ("“Ö”", "“ö”")],
)
def test_strings_are_normalised_as_universalner_does(text, same):
    assert normalised(text) == same


def test_a_repeated_mention_counts_once():
    gold = Spans.of([(0, 0, 1, 1), (0, 0, 1, 1), (0, 2, 3, 1)])
    scores = entity_micro_f1(gold, Spans.of([(0, 0, 1, 1), (0, 0, 1, 1)]), num_types=1)
    assert (scores.precision_H[0], scores.recall_H[0]) == (1, 1 / 2)


def test_a_head_that_predicts_nothing_has_zeros():
    gold = Spans.of([(0, 0, 1, 1)])
    scores = entity_micro_f1(gold, Spans.of([]), num_types=2, num_heads=2)
    assert scores.f1_H.tolist() == scores.precision_H.tolist() == [0, 0]
    assert token_macro_f1(np.array([1, 0]), np.zeros((2, 2), int), num_types=2).f1_H.tolist() == [0, 0]


def test_per_type_holds_what_occurs_in_the_query_set():
    scores = token_macro_f1(np.array([1, 0, 0]), np.array([1, 2, 0]), num_types=3)
    assert scores.per_type(0, ("a", "b", "c")) == {"a": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}}


def test_a_query_set_without_mentions_is_refused():
    with pytest.raises(NunerError, match="no mention"):
        token_macro_f1(np.zeros(3, int), np.ones(3, int), num_types=1)
    with pytest.raises(NunerError, match="no mention"):
        entity_micro_f1(Spans.of([]), Spans.of([(0, 0, 1, 1)]), num_types=1)


def test_labels_and_types_out_of_range_are_refused():
    with pytest.raises(ValueError, match="outside 0 … 2: 0 … 3"):
        token_macro_f1(np.array([0, 3]), np.array([0, 1]), num_types=2)
    with pytest.raises(ValueError, match="outside 1 … 2: 1 … 3"):
        entity_micro_f1(Spans.of([(0, 0, 1, 1)]), Spans.of([(0, 0, 1, 3)]), num_types=2)
    with pytest.raises(ValueError, match="gold labels"):
        token_macro_f1(np.array([1, 0]), np.array([1]), num_types=1)
