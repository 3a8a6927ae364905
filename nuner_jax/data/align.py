"""From what an annotator wrote to character spans: the paper's exact string match.

NuNER (Bogdanov et al., 2024, section 3.1) asks an LLM for lines `surface <> concept <> description`
and finds each surface in the text by exact string match. Here a match is case-sensitive, stands at
word boundaries, and counts at every place where it occurs. `AlignOptions` has what may be chosen
differently; its defaults are the paper's.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
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


# What the tolerant match takes for the same: quotes, dashes, slashes, and what is not seen.
_SAME = {
    **dict.fromkeys("'`´‘’‚‛‹›′ʼ＇", "'"),
    **dict.fromkeys('"“”„‟″«»＂', '"'),
    **dict.fromkeys("-‐‑‒–—―−﹘﹣－", "-"),
    **dict.fromkeys("/⁄∕／", "/"),  # the first foreign one is in "½", decomposed
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", ""),
}
_JOINERS = "\u00ad\u200c\u200d\u2060\ufeff"  # a word goes on behind a soft hyphen; a zero-width space divides
_MARKS = 30  # of one letter; sorting more, as Unicode asks for, takes its time (Unicode's stream-safe form)


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
class AlignOptions:
    """What counts as a mention.

    occurrences: "every" place of a surface, or its "first" only.
    match: "exact", or "tolerant": a surface without an exact place is looked for without regard to
      case, Unicode form, the kinds of quotes, dashes, slashes and white space, and counts if that leaves one
      place only.
    min_chars, max_chars: characters of a mention; None: no limit.
    """

    occurrences: str = "every"
    match: str = "exact"
    min_chars: int = 1
    max_chars: int | None = None


PAPER = AlignOptions()


@dataclass(frozen=True, slots=True)
class Alignment:
    """What became of the annotations of one text.

    entities: the mentions, by start, the longer first, then by concept.
    found: annotations whose surface stands in the text (every one of its places became a mention,
      or lies inside a longer mention of the same concept).
    missing: annotations whose surface does not stand in the text at word boundaries.
    ambiguous: how many of `found` stand at more than one place, so that the annotator may have
      meant only one of them.
    inexact: how many of `found` needed the tolerant match.
    rejected: every annotation that is not in `found`, with the reason: "not_in_text" (these are
      `missing`), "several_inexact_places", "too_short" or "too_long".
    """

    entities: tuple[Entity, ...]
    found: tuple[Annotation, ...]
    missing: tuple[Annotation, ...]
    ambiguous: int
    inexact: int = 0
    rejected: tuple[tuple[Annotation, str], ...] = ()


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


def align(text: str, annotations: Iterable[Annotation], options: AlignOptions = PAPER) -> Alignment:
    """Finds every mention of every annotation in `text`, by exact string match unless `options` say otherwise.

    Mentions of one concept never overlap: the longest wins, then the leftmost. Mentions of
    different concepts may overlap or coincide, as in the released data.
    """
    found, rejected, ambiguous, inexact = [], [], 0, 0
    by_concept: dict[str, list[Entity]] = {}
    folded = _FoldedText(text)
    for annotation in annotations:
        spans = exact = occurrences(text, annotation.surface)
        if not exact and options.match == "tolerant":
            spans = folded.occurrences(annotation.surface)
        if reason := _why_not(spans, bool(exact), options):
            rejected.append((annotation, reason))
            continue
        found.append(annotation)
        ambiguous += len(spans) > 1
        inexact += not exact
        by_concept.setdefault(annotation.concept, []).extend(
            Entity(start, end, annotation.concept, annotation.description)
            for start, end in (spans if options.occurrences == "every" else spans[:1])
        )
    entities = [entity for mentions in by_concept.values() for entity in _longest_first(mentions)]
    missing = tuple(annotation for annotation, reason in rejected if reason == "not_in_text")
    return Alignment(in_order(entities), tuple(found), missing, ambiguous, inexact, tuple(rejected))


def fold(name: str) -> str:
    """`name` without regard to case, Unicode form (NFKC), the kinds of quotes, dashes, slashes and white space.

    Two strings that differ in nothing else have the same folded form; zero-width characters and soft hyphens have none.
    """
    return "".join(piece for _, _, piece in _folded_pieces(name)).strip()


def in_order(entities: Iterable[Entity]) -> tuple[Entity, ...]:
    """Entities by start, the longer first, then by concept."""
    return tuple(sorted(entities, key=lambda entity: (entity.start, -entity.end, entity.concept)))


def _why_not(spans: list[tuple[int, int]], exact: bool, options: AlignOptions) -> str:
    """Why the places of a surface do not count, "" if they do. They differ in length only if there are several."""
    if not spans:
        return "not_in_text"
    if len(spans) > 1 and not exact:
        return "several_inexact_places"
    start, end = spans[0]
    if end - start < options.min_chars:
        return "too_short"
    if options.max_chars is not None and end - start > options.max_chars:
        return "too_long"
    return ""


def _longest_first(mentions: list[Entity]) -> list[Entity]:
    """The mentions of one concept without those that overlap a longer, or an earlier, one."""
    kept: list[Entity] = []  # by start, and so by end
    for mention in sorted(mentions, key=lambda one: (one.start - one.end, one.start)):
        at = bisect.bisect_left(kept, mention.end, key=lambda one: one.start)
        if at == 0 or kept[at - 1].end <= mention.start:  # the last one that begins before this one ends
            kept.insert(at, mention)
    return kept


class _FoldedText:
    """A text with its folded form, and the way back from a place in that to one in the text."""

    def __init__(self, text: str):
        self._text = text

    @functools.cached_property
    def _index(self) -> tuple[str, array, array]:
        """The folded text, and for each of its positions the character where a piece begins, and where
        the one before ends, -1 if none does: made when it is needed first."""
        pieces = list(_folded_pieces(self._text))
        size = sum(len(folded) for _, _, folded in pieces)
        begins, ends = array("q", [-1]) * (size + 1), array("q", [-1]) * (size + 1)
        at = 0
        for start, end, folded in pieces:
            begins[at], ends[at + len(folded)] = start, end
            at += len(folded)
        return "".join(folded for _, _, folded in pieces), begins, ends

    def occurrences(self, surface: str) -> list[tuple[int, int]]:
        """Where `surface` stands at word boundaries but for its folded form: two places at most are looked for."""
        sought = fold(surface)
        folded, begins, ends = self._index
        spans = []
        at = folded.find(sought) if sought else -1
        while at >= 0 and len(spans) < 2:
            start, end = begins[at], ends[at + len(sought)]
            if 0 <= start < end and self._is_boundary(start) and self._is_boundary(end):
                spans.append((start, end))
            at = folded.find(sought, at + 1)
        return spans

    def _is_boundary(self, at: int) -> bool:
        before, text = at, self._text
        while before and text[before - 1] in _JOINERS:
            before -= 1
        while at < len(text) and text[at] in _JOINERS:
            at += 1
        return _is_boundary(text[before - 1 : before] + text[at : at + 1], min(before, 1))


def _folded_pieces(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, folded) of the smallest pieces that fold by themselves: a letter with its marks, or a run of
    white space. Those that fold to nothing are left out."""
    start = 0
    while start < len(text):
        end = start + 1
        if text[start].isspace():
            while end < len(text) and (text[end].isspace() or not _SAME.get(text[end], "seen")):
                end += 1
            yield start, end, " "
        else:
            while end < len(text) and end - start <= _MARKS and _is_mark(text[end]):
                end += 1
            if folded := _fold_piece(text[start:end]):
                yield start, end, folded
        start = end


@functools.lru_cache(maxsize=1 << 16)
def _fold_piece(piece: str) -> str:
    """A letter with its marks, decomposed, for then the letters of a text fold one by one; NFKC composes the same."""
    plain = _SAME.get(piece[0], piece[0]) + piece[1:]
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", plain).casefold())
    return "".join(_SAME.get(character, character) for character in folded)


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
