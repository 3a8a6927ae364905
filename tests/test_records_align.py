"""Records hold valid spans only; alignment is the paper's exact match, at word boundaries, unless told otherwise."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nuner_jax.data.align import (
    AlignOptions,
    Annotation,
    MalformedAnnotation,
    align,
    concept_name,
    fold,
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


# --- The tolerant match, and the other options ---------------------------------------------------

TOLERANT = AlignOptions(match="tolerant")


def tolerant(text: str, surface: str) -> str | None:
    """What of the text the tolerant match takes for the surface; the exact one must not find it."""
    annotation = Annotation(surface, "thing")
    assert align(text, [annotation]).missing == (annotation,)
    aligned = align(text, [annotation], TOLERANT)
    assert len(aligned.entities) == aligned.inexact == len(aligned.found) <= 1
    return text[aligned.entities[0].start : aligned.entities[0].end] if aligned.entities else None


@pytest.mark.parametrize(
    ("text", "surface", "mention"),
    [
        ("in ROME.", "Rome", "ROME"),
        ("to Straße 5", "STRASSE", "Straße"),
        ('the "New York" bar', "“New York”", '"New York"'),
        ("rock ’n’ roll", "rock 'n' roll", "rock ’n’ roll"),
        ("1939–1945 war", "1939-1945", "1939–1945"),
        ("New\u00a0York", "New York", "New\u00a0York"),
        ("a New\n  York b", "New York", "New\n  York"),
        ("a New York b", "New\u2009 York", "New York"),
        ("Zoe\u0308 ran", "Zoë", "Zoe\u0308"),
        ("Zoë ran", "Zoe\u0308", "Zoë"),
        ("the ﬁrst one", "first", "ﬁrst"),
        ("２０２４ it", "2024", "２０２４"),
        ("한국에 in 한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8", "한국"),
        ("co\u00adoperate now", "cooperate", "co\u00adoperate"),
        ("Rome\u200b fell", "Rome \u200bfell", "Rome\u200b fell"),
        ("İstanbul", "i\u0307stanbul", "İstanbul"),
        ("… and Rome", "... AND rome", "… and Rome"),
        ("½ a cup", "1/2 a cup", "½ a cup"),
        ("a 1⁄2 cup", "½ CUP", "1⁄2 cup"),
        ("to \u212brhus", "ÅRHUS", "\u212brhus"),
        ("ｶﾞｽ", "ガス", "ｶﾞｽ"),
        ("wait...", "WAIT…", "wait..."),
        ("Gutenberg™", "GUTENBERG", "Gutenberg"),
    ],
)
def test_the_tolerant_match_sees_through_case_and_unicode_form(text, surface, mention):
    assert tolerant(text, surface) == mention


@pytest.mark.parametrize(
    ("text", "surface"),
    [
        ("ROMANS", "Rome"),
        ("a CAFE\u0301", "cafe"),  # the accent belongs to its letter
        ("हिन्दी", "हिन्द"),
        ("ﬁrst", "irst"),  # half of a ligature
        ("한국", "하"),  # half of a syllable
        ("co\u00adoperate", "Co"),  # a soft hyphen ends no word
        ("XROME ROMEX", "Rome"),
        ("Rome", "\u200b"),
        ("Rome", "Rome Rome"),
        ("1½ cups", "1/2 cups"),
        ("İstanbul", "istanbul"),  # a dotted capital is another letter
        ("wait…", "wait."),  # a third of an ellipsis
    ],
)
def test_the_tolerant_match_respects_words_and_letters(text, surface):
    assert tolerant(text, surface) is None


def test_several_tolerant_places_are_none_and_an_exact_one_is_preferred():
    rome = Annotation("Rome", "city")
    aligned = align("ROME or rome", [rome], TOLERANT)
    assert aligned.rejected == ((rome, "several_inexact_places"),)
    assert (aligned.entities, aligned.found, aligned.missing, aligned.inexact) == ((), (), (), 0)
    aligned = align("ROME or Rome", [rome], TOLERANT)
    assert [one.start for one in aligned.entities] == [8]
    assert aligned.inexact == 0


def test_only_the_first_place_counts_if_that_is_wanted():
    aligned = align("Rome, Rome", [Annotation("Rome", "city")], AlignOptions(occurrences="first"))
    assert [one.start for one in aligned.entities] == [0]
    assert aligned.ambiguous == 1  # still: the annotator may have meant the other one


def test_mentions_too_short_or_too_long_are_rejected_with_their_reason():
    names = [Annotation(surface, "x") for surface in ("a", "bb", "ccc", "z")]
    aligned = align("a bb ccc", names, AlignOptions(min_chars=2, max_chars=2))
    assert aligned.found == (names[1],)
    assert aligned.missing == (names[3],)
    assert aligned.rejected == ((names[0], "too_short"), (names[2], "too_long"), (names[3], "not_in_text"))


LETTERS = st.sampled_from(list("aAbB eéE\u0301ßﬁ\u00a0 \n-–'’\u200b\u00ad\u0345한क्षı İΣς"))
TEXTS = st.text(LETTERS | st.characters(exclude_categories=("Cs",)), max_size=40)


@st.composite
def texts_with_annotations(draw):
    """A text, and annotations of which many are pieces of it in another case or Unicode form."""
    text = draw(TEXTS)
    annotations = []
    for _ in range(draw(st.integers(1, 5))):
        start, end = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        change = draw(st.sampled_from([str, str.upper, str.lower, str.swapcase, *FORMS]))
        surface = change(text[start:end]).strip() or draw(TEXTS).strip() or "x"
        annotations.append(Annotation(surface, draw(st.sampled_from(["a", "b"]))))
    return text, annotations


FORMS = [lambda name, form=form: unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD")]


@given(texts_with_annotations())
@example(("a a a", [Annotation("a a", "a"), Annotation("A", "a")]))
def test_mentions_stand_in_the_text_verbatim_or_in_tolerant_mode_but_for_their_folded_form(case):
    text, annotations = case
    exact = align(text, annotations)
    assert {(text[one.start : one.end], one.concept) for one in exact.entities} <= {one[:2] for one in annotations}
    found = align(text, annotations, TOLERANT)
    assert {(fold(text[one.start : one.end]), one.concept) for one in found.entities} <= {
        (fold(one.surface), one.concept) for one in annotations
    }
    for one in (*exact.entities, *found.entities):
        assert not any(
            unicodedata.category(text[at]).startswith("M") for at in (one.start, one.end) if 0 < at < len(text)
        )
    assert set(exact.found) <= set(found.found)
    for aligned in (exact, found):
        assert len(aligned.found) + len(aligned.rejected) == len(annotations)
        by_concept = {}
        for one in aligned.entities:  # in order: mentions of one concept do not overlap
            assert by_concept.get(one.concept, 0) <= one.start
            by_concept[one.concept] = one.end


@given(TEXTS)
@example("a\u0307\u0323")  # in the order of typing, not in the one of Unicode
def test_a_folded_form_does_not_depend_on_unicode_form_quotes_and_dashes(name):
    for form in ("NFC", "NFD"):
        assert fold(unicodedata.normalize(form, name)) == fold(name)
    assert fold(name.replace("-", "—").replace("'", "’")) == fold(name)


def test_a_long_text_is_aligned_in_time_that_grows_with_its_length():
    text = "The Café in Rome, one of many — a bar. " * 25_000  # a million characters
    surfaces = ["Rome", "THE CAFÉ IN ROME", "Café", "many - a", "nowhere", "a"]
    names = [Annotation(surface, "x") for surface in surfaces] * 5
    start = time.perf_counter()
    aligned = align(text, names, TOLERANT)
    assert time.perf_counter() - start < 60  # where every mention is compared with every other, it takes hours
    assert {one.surface for one in aligned.found} == {"Rome", "Café", "a"}
