"""The parser of completions: what is clear is read, what is not is rejected, and every line is accounted for."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
from fuzz_completions import assert_accounted
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nuner_jax.data.align import Annotation, align
from nuner_jax.data.completions import Completion, parse_completion, read_array

SAMPLE = Path(__file__).parents[1] / "nuner_jax" / "data" / "sample" / "completions.jsonl.gz"
ROME = Annotation("Rome", "city", "a large town")
FC = Annotation("1. FC Köln", "club")


def reasons(parsed: Completion) -> tuple[list[str], list[str]]:
    return [one.reason for one in parsed.rejected], [one.reason for one in parsed.ignored]


def parse(completion: str, text: str = "", cut: bool = False) -> Completion:
    parsed = parse_completion(completion, text, cut=cut)
    assert_accounted(completion, parsed)
    return parsed


# --- Tolerant where the meaning is clear ---------------------------------------------------------

CLEAR = [
    "Rome <> city <> a large town",
    "Rome<>city<>a large town",
    "  Rome \t<>  city <> a large town  ",
    "- Rome <> city <> a large town",
    "* Rome <> city <> a large town",
    "• Rome <> city <> a large town",
    "•Rome <> city <> a large town",
    "– Rome <> city <> a large town",
    "> Rome <> city <> a large town",
    "1. Rome <> city <> a large town",
    "12) Rome <> city <> a large town",
    "(3) Rome <> city <> a large town",
    '"Rome" <> "city" <> "a large town"',
    "“Rome” <> “city” <> “a large town”",
    "'Rome' <> 'city' <> 'a large town'",
    "‘Rome’ <> city <> a large town",
    "`Rome` <> `city` <> `a large town`",
    "`Rome <> city <> a large town`",
    '"Rome <> city <> a large town"',
    "(Rome <> city <> a large town)",
    "[Rome <> city <> a large town]",
    "<Rome> <> <city> <> <a large town>",
    "**Rome** <> city <> a large town",
    "__Rome__ <> city <> a large town",
    "*Rome* <> _city_ <> a large town",
    "**Rome <> city <> a large town**",
    "- **Rome** <> *city* <> a large town",
    '1. "**Rome**" <> city <> a large town',
    "**1. Rome** <> city <> a large town",
    "2) `Rome <> city <> a large town`",
    "| Rome <> city <> a large town |",
    "Rome < > city < > a large town",
    "Rome ＜＞ city ＜＞ a large town",
    "Rome &lt;&gt; city &lt;&gt; a large town",
    r"Rome \<\> city \<> a large town",
    "Rome <\u200b> city <> a large town",
    "\u200bRome\ufeff <> city\u200b <> a large town\u2060",
    "Rome\u3000<>\u00a0city <> a large town",
    "Rome <> city; <> a large town;",
    "Rome <> city. <> a large town",
    "Rome <> city <> a large town <>",
    "Rome <> city <> a large town<|im_end|>",
    "Rome <> city <> a large town</s>",
    "Rome <> city <> a large town\r",
    "Rome: <> city <> a large town",
    '("entity" <> "Rome" <> "city" <> "a large town")',
    '##("entity" <> "Rome" <> "city" <> "a large town"',
]


@pytest.mark.parametrize("text", ["", "Rome fell.", "to ROME."])
@pytest.mark.parametrize("line", CLEAR)
def test_a_clear_line_is_read_whether_its_text_is_known_or_not(line, text):
    assert parse(line, text) == Completion((ROME,), (), ())


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("1. FC Köln <> club", "1. FC Köln won.", FC),
        ("- 1. FC Köln <> club", "1. FC Köln won.", FC),
        ("3. 1. FC Köln <> club", "1. FC Köln won.", FC),
        ("1. Rome <> city", "Rome, 1 May", Annotation("Rome", "city")),
        ('"Heroes" <> song', 'He wrote "Heroes" then.', Annotation('"Heroes"', "song")),
        ('"Heroes" <> song', "He wrote Heroes then.", Annotation("Heroes", "song")),
        ('"Heroes" <> "song"', 'He wrote "Heroes" then.', Annotation("Heroes", "song")),
        ("**kwargs <> argument", "Use **kwargs here", Annotation("**kwargs", "argument")),
        ("__init__ <> method", "the __init__ method", Annotation("__init__", "method")),
        ("<div> <> tag", "a <div> here", Annotation("<div>", "tag")),
        ("-Rome <> city", "In Rome", Annotation("Rome", "city")),
        ("-ismus <> suffix", "the suffix -ismus", Annotation("-ismus", "suffix")),
        ("- Rome <> city", "Italy - Rome", Annotation("Rome", "city")),
        ("AT&amp;T <> firm", "AT&T said", Annotation("AT&T", "firm")),
        ("AT&amp;T <> firm", "AT&amp;T said", Annotation("AT&amp;T", "firm")),
        (r"snake\_case <> style", "in snake_case", Annotation("snake_case", "style")),
        ("a <> b <> operator <> compares", "if a <> b then", Annotation("a <> b", "operator", "compares")),
        ("x <> y <> operator", "if x <> y then", Annotation("x", "y", "operator")),  # as the format says
        ("<> <> operator", "the <> sign", Annotation("<>", "operator")),
        ("`<>` <> operator <> not equal", "the <> sign", Annotation("<>", "operator", "not equal")),
        ("Rome &lt;&gt; <> odd", "Rome &lt;&gt; is", Annotation("Rome &lt;&gt;", "odd")),
        ('"Weird Al" Yankovic <> singer', "", Annotation('"Weird Al" Yankovic', "singer")),
        ("'Rome's walls' <> place", "", Annotation("Rome's walls", "place")),
        ("-5 °C <> temperature", "", Annotation("-5 °C", "temperature")),
        ("4.x branch <> version", "", Annotation("4.x branch", "version")),
        ("Mr. X <> person <> of the U.S.", "", Annotation("Mr. X", "person", "of the U.S.")),
        ("X <> Navy of the U.S.", "", Annotation("X", "Navy of the U.S.")),
        ('Rome <> city <> the "eternal" one', "", Annotation("Rome", "city", 'the "eternal" one')),
        ('"Rome <> city <> the "eternal" one"', "", Annotation("Rome", "city", 'the "eternal" one')),
        ("(Rome <> city <> a town (big)", "", Annotation("(Rome", "city", "a town (big)")),  # it closes nothing outside
        ('"Rome <> city <> a "big"', "", Annotation('"Rome', "city", 'a "big"')),
        ("entity <> concept", "An entity is", Annotation("entity", "concept")),
        ("entity <> term <> a thing", "An entity is", Annotation("entity", "term", "a thing")),
    ],
)
def test_where_markup_may_belong_to_the_surface_the_text_decides(line, text, expected):
    assert parse(line, text).annotations == (expected,)


def test_what_stands_around_an_answer_is_ignored_by_its_reason():
    completion = (
        "```text\n"
        "entity from the text <> entity concept <> description of entity group/concept\n"
        "--- <> --- <> ---\n"
        "\n"
        "Rome <> city <> a large town\n"
        "***\n"
        "```\n"
        "<|COMPLETE|>"
    )
    parsed = parse(completion)
    assert parsed.annotations == (ROME,)
    expected = ["code_fence", "header", "separator", "blank", "separator", "code_fence", "end_marker"]
    assert reasons(parsed) == ([], expected)


@pytest.mark.parametrize(
    "header",
    ["entity <> concept <> description", "**Entity** <> **Type**", "| Entity<>Concept |", "No. <> Type <> Description"],
)
def test_a_header_is_no_annotation(header):
    assert reasons(parse(header)) == ([], ["header"])


def test_the_thoughts_of_a_reasoning_model_are_no_answer():
    parsed = parse("<think>\nParis <> city?\nno\n</think>\n\nRome <> city <> a large town")
    assert parsed.annotations == (ROME,)
    assert reasons(parsed) == ([], ["reasoning"] * 4 + ["blank"])
    assert parse("<think>\nParis <> city", cut=True).annotations == ()
    assert parse("a <> b\n</think> <> tag", "</think>").annotations[1] == Annotation("</think>", "tag")


# --- Strict otherwise ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Here are the entities:", "no_delimiter"),
        ("Rome | city | a town", "no_delimiter"),
        ("Rome - city", "no_delimiter"),
        ("{Rome}", "no_delimiter"),
        (" <> ", "empty_surface"),
        ("<> city", "empty_surface"),
        ('"" <> city', "empty_surface"),
        ("Rome <>", "empty_concept"),
        ("Rome <> - <> x", "empty_concept"),
        ("Rome <> <> a town", "empty_concept"),
        ("a <> b <> c <> d", "too_many_fields"),
        ('("relationship" <> "Rome" <> "Italy" <> "lies in" <> 9)', "too_many_fields"),
        ("Rome <> city \ud800", "lone_surrogate"),
    ],
)
def test_what_is_no_annotation_is_rejected_by_its_reason(line, reason):
    parsed = parse(line)
    assert parsed.annotations == ()
    assert [(one.line, one.reason) for one in parsed.rejected] == [(line, reason)]


def test_an_annotation_counts_once():
    parsed = parse("Rome <> city\n- Rome <> city\nRome <> place\nRome <> city <> big")
    assert [one.concept for one in parsed.annotations] == ["city", "place", "city"]
    assert reasons(parsed) == (["repeated_line"], [])


def test_the_last_line_of_a_cut_answer_is_not_trusted():
    parsed = parse("Rome <> city\nParis <> ci", cut=True)
    assert parsed.annotations == (Annotation("Rome", "city"),)
    assert [(one.line, one.reason) for one in parsed.rejected] == [("Paris <> ci", "cut_off")]
    assert len(parse("Rome <> city\nParis <> city\n", cut=True).annotations) == 2


# --- JSON ----------------------------------------------------------------------------------------


def items(*annotations: Annotation) -> list[dict]:
    return [dict(zip(("entity", "concept", "description"), one, strict=True)) for one in annotations]


PARIS = Annotation("Paris", "city", 'the one in "France"')


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("frame", ["{}", "```json\n{}\n```", "Here you are:\n```\n{}\n```\nAnything else?", " {}\r\n"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_json_answer_is_read_with_and_without_its_frame(indent, frame, bare):
    answer = items(ROME, PARIS) if bare else {"entities": items(ROME, PARIS)}
    parsed = parse(frame.replace("{}", json.dumps(answer, indent=indent)))
    assert parsed.annotations == (ROME, PARIS)
    assert {one.reason for one in parsed.rejected} <= {"no_delimiter"}
    assert len(parsed.rejected) == (2 if "else" in frame else 0)


def test_every_item_of_a_json_answer_is_accounted_for():
    answer = [*items(ROME, ROME, Annotation(" ", "x"), Annotation("x", "")), {"entity": "x"}, 7, "Oslo <> city", "no"]
    parsed = parse(json.dumps({"entities": answer}))
    assert parsed.annotations == (ROME, Annotation("Oslo", "city"))
    assert reasons(parsed)[0] == ["repeated_line", "empty_surface", "empty_concept", "bad_item", "bad_item"] + [
        "no_delimiter"
    ]
    assert json.loads(parsed.rejected[3].line) == {"entity": "x"}


def test_half_a_character_in_json_cannot_be_stored_and_is_rejected():
    parsed = parse(
        '{"entities": [{"entity": "\\ud83d", "concept": "emoji"}, {"entity": "a", "concept": "\\ud83d\\ude00b"}]}'
    )
    assert parsed.annotations == (Annotation("a", "😀b"),)
    assert reasons(parsed)[0] == ["lone_surrogate"]


@pytest.mark.parametrize("cut", [True, False])
def test_of_broken_json_the_sound_items_are_read(cut):
    whole = json.dumps({"entities": items(ROME, PARIS)})
    parsed = parse(whole[:-30], cut=cut)
    assert parsed.annotations == (ROME,)
    assert reasons(parsed)[0] == ["cut_off" if cut else "bad_json"]


def test_json_without_entities_is_accounted_for_as_one():
    assert reasons(parse('{"entities": []}')) == ([], ["empty_json"])
    assert reasons(parse("[]")) == ([], ["empty_json"])
    other = '{\n "title": "Rome",\n "findings": [{"summary": "a <> b"}]\n}'
    parsed = parse(other + "\nRome <> city <> a large town")
    assert parsed.annotations == (ROME,)
    assert [(one.line, one.reason) for one in parsed.rejected] == [(other, "other_json")]


def test_what_stands_behind_the_entities_of_a_json_answer_is_accounted_for():
    parsed = parse(json.dumps({"entities": items(ROME), "note": "done"}) + "\nBye")
    assert parsed.annotations == (ROME,)
    assert [one.line for one in parsed.rejected] == [', "note": "done"}', "Bye"]


def test_a_line_that_begins_with_a_bracket_is_still_a_line():
    assert parse("[1] <> footnote").annotations == (Annotation("[1]", "footnote"),)
    assert parse('["x"] <> list\n{y} <> set').annotations == (Annotation('["x"]', "list"), Annotation("{y}", "set"))
    assert parse('{"a": 1} <> JSON').annotations == (Annotation('{"a": 1}', "JSON"),)


def test_an_array_is_read_up_to_where_it_breaks():
    array = read_array('{"number": 1, "of": "a \\" b", "xs": [1, {"a": [2]}, oops', "xs")
    assert array.items == ((1, "1"), ({"a": [2]}, '{"a": [2]}'))
    assert (array.rest, array.whole) == ("oops", False)
    assert read_array('{"ys": [1]}', "xs") is None


# --- Every string, quickly -----------------------------------------------------------------------

PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            ["<>", " <> ", "\n", "\r\n", "- ", "1. ", '"', "**", "`", "```", "|", "{", "[", '{"entities": [']
        )
        | st.sampled_from(
            ["Rome", "city", "<think>", "</think>", "&lt;&gt;", "\u200b", "'", "“", "}", "]", ",", '"a"']
        ),
        st.text(max_size=5),
    ),
    max_size=30,
).map("".join)


@given(completion=PIECES, text=PIECES, cut=st.booleans())
@example("[[[[" * 5000, "", True)
@example('[{"entity":' * 5000, "", False)
@example("{" + '"a":1,' * 5000, "", False)
def test_any_string_is_sorted_line_by_line(completion, text, cut):
    parse(completion, text, cut)


WORD = st.text(st.characters(categories=("Lu", "Ll")), min_size=1, max_size=8)
NAME = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
QUOTES = ["{}", '"{}"', "“{}”", "`{}`", "**{}**", "__{}__", "'{}'"]
LINES = ["{}", "- {}", "3. {}", "• {}", "  {} ", "| {} |", "{};", "`{}`", "- **{}**"]


@given(
    st.tuples(NAME, NAME, NAME),
    st.sampled_from(QUOTES),
    st.sampled_from(LINES),
    st.sampled_from(["<>", " < > ", " <> "]),
)
def test_markup_around_an_annotation_comes_off_whole(fields, quote, line, delimiter):
    assume(quote == "{}" or quote[0] not in line)  # the same mark twice, "``Rome` <> `city``", is not clear
    quoted = delimiter.join(quote.replace("{}", one) for one in fields)
    parsed = parse(line.replace("{}", quoted), f"of {fields[0]} here")
    if parsed.annotations:
        assert parsed.annotations == (Annotation(*fields),)
    else:
        assert reasons(parsed) == ([], ["header"])


@pytest.mark.parametrize(
    "unit",
    [
        "<> ",
        "- ",
        '"',
        "**",
        "*",
        "(",
        "{",
        '{"a',
        "[",
        '["a",',
        "<",
        "< ",
        "&lt;",
        "</s> ",
        "\\",
        "a ",
        "\n",
        "<|a|",
        "# ",
    ],
)
def test_a_long_line_takes_no_longer_than_its_length(unit):
    completion = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    for one in (completion, completion + "x <> y", '{"entities": [' + completion):
        parse_completion(one, "x" + completion[:1000])
    assert time.perf_counter() - start < 20  # a quadratic one takes hours


def test_the_sample_is_read_without_loss():
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::10]
    aligned = lines = 0
    for row in rows:
        parsed = parse(row["completion"], row["text"])
        lines += row["completion"].count("\n") + 1
        aligned += len(align(row["text"], parsed.annotations).found)
    assert aligned / lines >= 0.995
