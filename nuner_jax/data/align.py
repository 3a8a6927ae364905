"""From what an annotator wrote to character spans: the paper's exact string match.

NuNER (Bogdanov et al., 2024, section 3.1) asks an LLM for lines `surface <> concept <> description`
and finds each surface in the text by exact string match. Here a match is case-sensitive, stands at
word boundaries, and counts at every place where it occurs.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from nuner_jax.data.records import Entity

DELIMITER = "<>"

# Scripts written without spaces: between two of these letters a word may end anywhere.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Han
)


class Annotation(NamedTuple):
    """One line of an annotator: words of the text, their concept, and a gloss of the concept."""

    surface: str
    concept: str
    description: str = ""


class MalformedAnnotation(ValueError):
    """A line that is no annotation; `kind` is the reason, one word for counting."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Alignment:
    """What became of the annotations of one text.

    entities: the mentions, by start, the longer first, then by concept.
    found: annotations whose surface stands in the text (every one of its places became a mention,
      or lies inside a longer mention of the same concept).
    missing: annotations whose surface does not stand in the text at word boundaries.
    ambiguous: how many of `found` stand at more than one place, so that the annotator may have
      meant only one of them.
    """

    entities: tuple[Entity, ...]
    found: tuple[Annotation, ...]
    missing: tuple[Annotation, ...]
    ambiguous: int


def concept_name(name: str) -> str:
    """The name of a concept with its white space collapsed.

    Its case stays: the encoders are cased, and an acronym is another concept than the word. Who
    wants "Person" and "person" as one concept builds with `lower_concepts`.
    """
    return " ".join(name.split())


def parse_annotation(line: str) -> Annotation:
    """Parses `surface <> concept <> description`, the description being optional.

    Raises `MalformedAnnotation` of kind `no_delimiter`, `too_many_fields`, `empty_surface` or
    `empty_concept`.
    """
    fields = line.split(DELIMITER)
    if len(fields) == 1:
        raise MalformedAnnotation("no_delimiter")
    if len(fields) > 3:
        raise MalformedAnnotation("too_many_fields")
    surface, concept = fields[0].strip(), concept_name(fields[1])
    if not surface:
        raise MalformedAnnotation("empty_surface")
    if not concept:
        raise MalformedAnnotation("empty_concept")
    return Annotation(surface, concept, fields[2].strip() if len(fields) == 3 else "")


def parse_lines(lines: Iterable[str]) -> tuple[tuple[Annotation, ...], tuple[str, ...]]:
    """Parses many lines: the annotations, and the kind of each malformed line. Blank lines pass."""
    annotations, malformed = [], []
    for line in lines:
        if not line.strip():
            continue
        try:
            annotations.append(parse_annotation(line))
        except MalformedAnnotation as error:
            malformed.append(error.kind)
    return tuple(annotations), tuple(malformed)


def occurrences(text: str, surface: str, start: int = 0) -> list[tuple[int, int]]:
    """Every place `[start, end)` where `surface` stands in `text` at word boundaries, in order.

    A boundary is missing only between two characters of one word, so a surface that begins or ends
    with punctuation needs none on that side. Places may overlap each other ("a a" in "a a a").
    """
    spans = []
    at = text.find(surface, start)
    while at >= 0:
        end = at + len(surface)
        if _is_boundary(text, at) and _is_boundary(text, end):
            spans.append((at, end))
        at = text.find(surface, at + 1)
    return spans


def align(text: str, annotations: Iterable[Annotation]) -> Alignment:
    """Finds every mention of every annotation in `text` by exact string match.

    Mentions of one concept never overlap: the longest wins, then the leftmost. Mentions of
    different concepts may overlap or coincide, as in the released data.
    """
    found, missing, ambiguous = [], [], 0
    by_concept: dict[str, list[Entity]] = {}
    for annotation in annotations:
        spans = occurrences(text, annotation.surface)
        (found if spans else missing).append(annotation)
        ambiguous += len(spans) > 1
        by_concept.setdefault(annotation.concept, []).extend(
            Entity(start, end, annotation.concept, annotation.description) for start, end in spans
        )
    entities = [entity for mentions in by_concept.values() for entity in _longest_first(mentions)]
    return Alignment(in_order(entities), tuple(found), tuple(missing), ambiguous)


def in_order(entities: Iterable[Entity]) -> tuple[Entity, ...]:
    """Entities by start, the longer first, then by concept."""
    return tuple(sorted(entities, key=lambda entity: (entity.start, -entity.end, entity.concept)))


def _longest_first(mentions: list[Entity]) -> list[Entity]:
    """The mentions of one concept without those that overlap a longer, or an earlier, one."""
    kept: list[Entity] = []
    for mention in sorted(mentions, key=lambda one: (one.start - one.end, one.start)):
        if all(mention.end <= other.start or other.end <= mention.start for other in kept):
            kept.append(mention)
    return kept


def _is_boundary(text: str, at: int) -> bool:
    """Whether a word may begin or end between `text[at - 1]` and `text[at]`."""
    if at == 0 or at == len(text):
        return True
    if _is_mark(text[at]):  # an accent or vowel sign belongs to the letter before it
        return False
    return not (_is_word(text[at - 1]) and _is_word(text[at]))


@functools.cache
def _is_word(character: str) -> bool:
    if _UNSPACED.match(character):
        return False
    return character.isalnum() or character == "_" or _is_mark(character)


@functools.cache
def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
