"""The row formats: what each kind of dictionary row says about its text.

One function per format turns a row into a `ParsedRow`, or raises `MalformedRow`; the registry
`ROW_FORMATS` tells them apart by the keys of a row.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nuner_jax.data import completions
from nuner_jax.data.align import Annotation, concept_name, occurrences, parse_lines
from nuner_jax.data.importers.rows import MalformedRow
from nuner_jax.data.records import Entity


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row in the terms of this project, before alignment.

    annotations: still to be found in `text`. entities: mentions whose place the row gives.
    malformed: the kind of each annotation that could not be read.
    """

    text: str
    annotations: tuple[Annotation, ...] = ()
    entities: tuple[Entity, ...] = ()
    malformed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A format: the two keys that tell it, and the function that reads one of its rows."""

    keys: tuple[str, str]
    parse: Callable[[Mapping[str, Any]], ParsedRow]


def parse_nuner(row: Mapping[str, Any]) -> ParsedRow:
    """`input`, `output`: the released NuNER data set, and what is published in its form.

    `output` is a list of strings `surface <> concept [<> description]`, or its Python literal,
    which is parsed by `ast.literal_eval` and never evaluated.
    """
    lines = row["output"]
    if isinstance(lines, str):
        lines = _python_list(lines)
    if not isinstance(lines, list):
        raise MalformedRow("output_not_a_list")
    strings = [line for line in lines if isinstance(line, str)]
    annotations, malformed = parse_lines(strings)
    malformed += ("annotation_not_a_string",) * (len(lines) - len(strings))
    return ParsedRow(_text(row, "input"), annotations, malformed=malformed)


def parse_completion(row: Mapping[str, Any]) -> ParsedRow:
    """`text`, `completion`: an LLM's raw completion, one annotation per line; see `data/completions.py`."""
    if not isinstance(row["completion"], str):
        raise MalformedRow("completion_not_a_string")
    text = _text(row, "text")
    parsed = completions.parse_completion(row["completion"], text)
    return ParsedRow(text, parsed.annotations, malformed=tuple(line.reason for line in parsed.rejected))


def parse_gliner(row: Mapping[str, Any]) -> ParsedRow:
    """`tokenized_text`, `ner`: Pile-NER and GLiNER, `ner` = [[first word, last word, label], …].

    The text is the words joined by one space each. The last word belongs to the mention.
    """
    words, spans = row["tokenized_text"], row["ner"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise MalformedRow("tokenized_text_not_words")
    if not isinstance(spans, list):
        raise MalformedRow("ner_not_a_list")
    starts = word_starts(words)
    entities, malformed = [], []
    for span in spans:
        match span:
            case [int(first), int(last), str(label), *_] if 0 <= first <= last < len(words):
                start, end = starts[first], starts[last] + len(words[last])
                _add_entity(entities, malformed, start, end, label)
            case _:
                malformed.append("bad_span")
    return ParsedRow(" ".join(words), entities=tuple(entities), malformed=tuple(malformed))


def parse_spans(row: Mapping[str, Any]) -> ParsedRow:
    """`text`, `entities`: our record as JSON, or [[surface, concept], …] as they appear.

    An entity as dictionary has `start`, `end`, `concept` and may have a `description`. One as pair
    is found from the end of the entity before it on.
    """
    text, given = _text(row, "text"), row["entities"]
    if not isinstance(given, list):
        raise MalformedRow("entities_not_a_list")
    entities, malformed = [], []
    cursor = 0
    for entity in given:
        match entity:
            case {"start": int(start), "end": int(end), "concept": str(concept)}:
                if not 0 <= start < end <= len(text):
                    malformed.append("bad_span")
                    continue
                description = str(entity.get("description") or "")
                _add_entity(entities, malformed, start, end, concept, description)
            case [str(surface), str(concept)] if surface.strip():
                places = occurrences(text, surface.strip(), cursor)
                if not places:
                    malformed.append("not_in_text_in_order")
                    continue
                cursor = places[0][1]
                _add_entity(entities, malformed, *places[0], concept)
            case _:
                malformed.append("bad_entity")
    return ParsedRow(text, entities=tuple(entities), malformed=tuple(malformed))


ROW_FORMATS: dict[str, RowFormat] = {
    "nuner": RowFormat(("input", "output"), parse_nuner),
    "completions": RowFormat(("text", "completion"), parse_completion),
    "gliner": RowFormat(("tokenized_text", "ner"), parse_gliner),
    "spans": RowFormat(("text", "entities"), parse_spans),
}


def parse_row(row: Mapping[str, Any] | MalformedRow, name: str | None) -> ParsedRow | MalformedRow:
    """The row of the format `name` in the terms of this project, or why it cannot be read, such as `missing_<key>`.

    A row that was malformed before stays so, and needs no format.
    """
    if isinstance(row, MalformedRow):
        return row
    row_format = ROW_FORMATS[name]
    try:
        for key in row_format.keys:
            if key not in row:
                raise MalformedRow(f"missing_{key}")
        return row_format.parse(row)
    except MalformedRow as error:
        return error


def detect_row_format(row: Mapping[str, Any]) -> str | None:
    """The name of the format whose keys the row has, `None` if there is none."""
    for name, row_format in ROW_FORMATS.items():
        if all(key in row for key in row_format.keys):
            return name
    return None


def word_starts(words: list[str]) -> list[int]:
    """The character at which each word begins in `" ".join(words)`."""
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    return starts


def is_unicode(strings: Iterable[str]) -> bool:
    """Whether all can be stored as UTF-8, and given to a tokenizer; JSON escapes can spell half a character."""
    try:
        "".join(strings).encode()
    except UnicodeEncodeError:
        return False
    return True


def _python_list(literal: str) -> Any:
    """The value of a Python literal, read without evaluating anything."""
    try:
        if "\\" not in literal:
            return ast.literal_eval(literal.strip())
        with warnings.catch_warnings():  # an escape that Python does not know is only a warning
            warnings.simplefilter("ignore")
            return ast.literal_eval(literal.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise MalformedRow("output_not_a_literal") from error


def _text(row: Mapping[str, Any], key: str) -> str:
    """The row's text; an absent one (`None`) is empty, as in the released data."""
    text = row[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise MalformedRow(f"{key}_not_a_string")
    return text


def _add_entity(
    entities: list[Entity],
    malformed: list[str],
    start: int,
    end: int,
    concept: str,
    description: str = "",
) -> None:
    name = concept_name(concept)
    if not name:
        malformed.append("empty_concept")
    elif start == end:
        malformed.append("empty_surface")
    else:
        entities.append(Entity(start, end, name, description))
