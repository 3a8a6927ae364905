"""What became of every unit and every line, as rows: what it is called, how many there are, and what that means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nuner_jax.annotate.alignment import OUTCOMES, share
from nuner_jax.annotate.selection.select import LEFT_OUT

_SELECTION = {
    "texts": "documents, lines or rows that were read",
    "malformed": "rows that could not be read, and are in no other count",
    "units": "pieces of the texts; each is selected or left out for one reason",
    "control_characters": "holds characters of no text, such as a bell or an escape",
    "too_short": "fewer characters than source.min_chars",
    "too_long": "more characters than source.max_chars",
    "few_words": "fewer words than source.min_words",
    "other_script": "too few letters of source.script",
    "duplicate": "the same text as another unit",
    "near_duplicate": "nearly the same text as another unit",
    "beyond_sample": "not drawn for the random sample",
    "other_shard": "for another machine (source.shard)",
    "selected": "to be annotated",
}
_UNITS = {
    "kept": ("kept", "a record of the data set"),
    "dropped_concept": ("dropped by concept", "an annotation names the concept build.drop_concept"),
    "unlabelled_left_out": ("nothing found, left out", "answered, but no annotation has a place in the text"),
    "failed": ("failed", "no usable answer after all attempts"),
    "pending": ("without an answer yet", "not asked for, or not to its end; the same command goes on"),
}
_LINES = {
    "not_in_text": "its words do not stand in the text",
    "several_inexact_places": "its words stand nowhere letter by letter, and at several places in another form",
    "too_short": "fewer characters than align.min_chars",
    "too_long": "more characters than align.max_chars",
    "no_delimiter": "not of the form that was asked for",
    "too_many_fields": "more than entity, concept and description",
    "empty_surface": "names no entity",
    "empty_concept": "names no concept",
    "repeated_line": "the same annotation again",
    "cut_off": "where the answer reached its token limit",
    "lone_surrogate": "half a character, which no file can hold",
    "bad_json": "JSON that cannot be read from there on",
    "other_json": "JSON without a list of entities",
    "bad_item": "an item without entity and concept",
    "blank": "an empty line",
    "code_fence": "opens or closes a block of code",
    "separator": "neither letter nor digit",
    "header": "names the fields",
    "end_marker": "says that the answer ends",
    "reasoning": "what a model thinks before it answers",
    "empty_json": "a list without any entity",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A count: its name, its key in the stored counts ("" if it has none), and what it means.

    kind: "whole" (what the others add up to), "found", "inexact", "lost", "ignored", or "" where it does not matter.
    whole: the number that it is a part of; None if it is no part.
    """

    name: str
    count: int
    meaning: str
    whole: int | None = None
    kind: str = ""
    key: str = ""

    def share(self) -> str:
        """The part in percent of the whole; "" if it is no part."""
        return "" if self.whole is None else share(self.count, self.whole)


def selection_rows(counts: Mapping[str, int]) -> list[Row]:
    """From what was read to the units of the selection: the counts of selection.json."""
    parts = (*LEFT_OUT, "selected")
    return [
        Row(words(key), counts[key], meaning, counts["units"] if key in parts else None, key=key)
        for key, meaning in _SELECTION.items()
    ]


def unit_rows(counts: Mapping[str, Any]) -> list[Row]:
    """What became of the selected units: align.json's."""
    units = counts["units"]
    rows = [Row(_UNITS[key][0], units[key], _UNITS[key][1], units["all"], key=key) for key in OUTCOMES]
    return [Row("all", units["all"], "units of the selection", kind="whole"), *rows]


def line_rows(counts: Mapping[str, Any]) -> list[Row]:
    """What became of the lines of all completions: align.json's, each line in one row besides that of all."""
    lines, annotations = counts["lines"], counts["annotations"]
    every, inexact = lines["all"], annotations["inexact"]
    lost = [
        Row(f"{label}: {words(reason)}", count, meaning(reason), every, "lost", reason)
        for label, reasons in (("without a place", annotations["unplaced"]), ("rejected", lines["rejected"]))
        for reason, count in reasons.items()
    ]
    return [
        Row("all", every, "lines, or items of a JSON answer, of the answered units", kind="whole"),
        Row("found letter by letter", annotations["found"] - inexact, "an annotation with its place", every, "found"),
        Row("found by tolerant match", inexact, "but for case or Unicode form, at one place only", every, "inexact"),
        *sorted(lost, key=lambda row: -row.count),
        *(
            Row(f"ignored: {words(reason)}", count, meaning(reason), every, "ignored", reason)
            for reason, count in lines["ignored"].items()
        ),
    ]


def mention_notes(counts: Mapping[str, Any]) -> list[str]:
    """How the annotations that have a place become the mentions of the data set, in sentences."""
    annotations, records, options = counts["annotations"], counts["records"], counts["options"]
    several = "every one" if options["occurrences"] == "every" else "only the first"
    return [
        f"{annotations['found']:,} annotations have a place in their text; {annotations['ambiguous']:,} of them stand "
        f"at several places, of which {several} is a mention.",
        f"{records['entities']:,} mentions are in the data set: those of kept units, but for mentions within a longer "
        "one of the same concept.",
    ]


def meaning(reason: str) -> str:
    """What it means that a line ended for this reason."""
    return _LINES.get(reason, "")


def words(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")
