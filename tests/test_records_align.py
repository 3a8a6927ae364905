"""Records hold valid spans only; alignment is the paper's exact match, at word boundaries."""

from __future__ import annotations

import pytest

from nuner_jax.data.align import (
    Annotation,
    MalformedAnnotation,
    align,
    concept_name,
    occurrences,
    parse_annotation,
    parse_lines,
)
from nuner_jax.data.records import Entity, Record


def mentions(text: str, *annotations: tuple[str, str]) -> list[tuple[str, str]]:
    """(surface, concept) of every mention that alignment finds, in order."""
    aligned = align(text, [Annotation(*annotation) for annotation in annotations])
    return [(text[one.start : one.end], one.concept) for one in aligned.entities]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 2), (3, 1)])
def test_an_entity_without_a_proper_span_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start < end"):
        Entity(start, end, "city")


def test_an_entity_needs_a_concept_and_must_end_in_its_text():
    with pytest.raises(ValueError, match="empty concept"):
        Entity(0, 1, " ")
    assert Record("Rome", (Entity(0, 4, "city"),)).entities[0].end == 4
    with pytest.raises(ValueError, match="beyond its text of 4 characters"):
        Record("Rome", (Entity(0, 5, "city"),))


def test_a_record_comes_back_from_plain_data():
    record = Record("Rome fell", (Entity(0, 4, "city", "a place"), Entity(5, 9, "event")))
    assert Record.from_dict(record.as_dict()) == record


def test_every_occurrence_is_a_mention():
    assert occurrences("Rome, Rome and Rome.", "Rome") == [(0, 4), (6, 10), (15, 19)]


def test_matching_is_case_sensitive():
    assert occurrences("rome ROME", "Rome") == []


@pytest.mark.parametrize(
    ("text", "surface", "count"),
    [
        ("cats and a cat", "cat", 1),
        ("concat", "cat", 0),
        ("cat_food cat-food", "cat", 1),  # an underscore joins, a hyphen divides
        ("cat2 2cat", "cat", 0),
        ("the neck's pain", "neck", 1),
        ("Zoë's zoo, Zoëë", "Zoë", 1),  # letters beyond ASCII are letters
        ("Łódź, Łódźki", "Łódź", 1),
        ("caf\u0065\u0301 cafe", "cafe", 1),  # a combining accent belongs to its letter
        ("हिन्दी", "हिन्द", 0),  # and so does a vowel sign
        ("我在北京工作", "北京", 1),  # scripts without spaces have no visible boundaries
        ("東京タワーへ", "タワー", 1),
        ("iPhone手机", "iPhone", 1),
    ],
)
def test_a_match_stands_at_word_boundaries(text, surface, count):
    assert len(occurrences(text, surface)) == count


@pytest.mark.parametrize(
    ("text", "surface"),
    [("C++14 is C++", "C++"), ("x.NET and .NETx", ".NET"), ("a$5", "$5"), ("(a)b", "(a)")],
)
def test_punctuation_at_an_end_needs_no_boundary_there(text, surface):
    expected = {"C++": 2, ".NET": 1, "$5": 1, "(a)": 1}
    assert len(occurrences(text, surface)) == expected[surface]


def test_of_one_concept_the_longest_mention_wins_wherever_it_stands():
    text = "New York City and York"
    concept = "place"
    found = mentions(text, ("York", concept), ("New York", concept), ("New York City", concept))
    assert found == [("New York City", concept), ("York", concept)]


def test_of_equally_long_overlapping_mentions_the_leftmost_wins():
    assert [one.start for one in align("a a a a a", [Annotation("a a", "pair")]).entities] == [0, 4]


def test_different_concepts_may_overlap_and_coincide():
    found = mentions("New York", ("New York", "city"), ("New York", "place"), ("York", "name"))
    assert found == [("New York", "city"), ("New York", "place"), ("York", "name")]


def test_outcomes_are_counted_per_annotation():
    annotations = [
        Annotation("Rome", "city"),
        Annotation("Paris", "city"),
        Annotation("man", "person"),
    ]
    aligned = align("Rome, a Roman, and Rome.", annotations)
    assert aligned.found == (annotations[0],)
    assert aligned.missing == (annotations[1], annotations[2])  # "man" only within "Roman"
    assert aligned.ambiguous == 1
    assert len(aligned.entities) == 2


def test_a_mention_keeps_its_description():
    (entity,) = align("Rome", [Annotation("Rome", "city", "a large town")]).entities
    assert entity == Entity(0, 4, "city", "a large town")


def test_a_repeated_annotation_adds_no_second_mention():
    assert mentions("Rome", ("Rome", "city"), ("Rome", "city")) == [("Rome", "city")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Rome <> city <> a large town", Annotation("Rome", "city", "a large town")),
        ("Rome <> city", Annotation("Rome", "city", "")),
        ("  Rome<>city <>", Annotation("Rome", "city", "")),
        ("New  York <> large \t city", Annotation("New  York", "large city", "")),
        ("IT <> IT System", Annotation("IT", "IT System", "")),
    ],
)
def test_a_line_is_parsed(line, expected):
    assert parse_annotation(line) == expected


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Here are the entities:", "no_delimiter"),
        ("Rome | city", "no_delimiter"),
        (" <> city", "empty_surface"),
        ("Rome <>  <> a town", "empty_concept"),
        ("Rome <> ", "empty_concept"),
        ("a <> b <> c <> d", "too_many_fields"),
    ],
)
def test_a_malformed_line_tells_its_kind(line, kind):
    with pytest.raises(MalformedAnnotation) as error:
        parse_annotation(line)
    assert error.value.kind == kind


def test_lines_are_sorted_into_annotations_and_kinds_and_blank_ones_pass():
    annotations, malformed = parse_lines(["Rome <> city", "", "  ", "Sure!", "<> x"])
    assert annotations == (Annotation("Rome", "city"),)
    assert malformed == ("no_delimiter", "empty_surface")


def test_a_concept_name_keeps_its_case_and_loses_its_spare_white_space():
    assert concept_name("  IT \n company ") == "IT company"
