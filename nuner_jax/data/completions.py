"""One parser for what a language model answers: lines `surface <> concept <> description`, or JSON.

Tolerant where the meaning is clear: bullets, numbers, quotes, bold, code fences, a repeated header, spaced, escaped or
full-width delimiters, end markers, the thoughts of a reasoning model. Strict otherwise: a line that is no annotation
is rejected with its reason, never guessed at. Where markup may be part of the surface ("1. FC Köln", '"Heroes"', a
surface with the delimiter in it), the text decides: the reading that stands in it wins.

Every line ends in exactly one place: `annotations`, `rejected` or `ignored`. Of a JSON answer, every item of its array
counts as a line, as does every line around it; without the items, the array counts as one.

Everything is linear in the completion: layers of markup are bounded, and no pattern backtracks over a run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from nuner_jax.data.align import Annotation, MalformedAnnotation, concept_name

_ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + _ZERO_WIDTH
_LAYERS = 8
"""Layers of markup that are taken off a field, such as `- **"Rome"**`; more is no markup."""

_DELIMITER = re.compile(rf"\\?(?:<|＜|&lt;)[\s\\{_ZERO_WIDTH}]{{0,3}}(?:>|＞|&gt;)")
_END_MARKER = re.compile(r"(?:<\|\w{1,30}\|+>?|</s>)[`\s]*$")
_BULLET = re.compile(rf"(?:(?:[-*+·–—>]|#{{1,6}})[\s{_ZERO_WIDTH}]+|[•▪◦‣●][\s{_ZERO_WIDTH}]*)")
_NUMBER = re.compile(r"(?:\d{1,3}[.)]|\(\d{1,3}\))\s+")
_TIGHT_BULLET = re.compile(r"(?:\d{1,3}[.)]|[-*+–—]|#{1,6})(?=[^\W\d]|[\"(])")
"""Only where the text is known: in "-ismus" and "4.x branch" it is part of the surface."""
_PAIRS = (
    ("```", "```"), ("**", "**"), ("__", "__"), ("``", "``"), ("`", "`"), ("*", "*"), ("_", "_"),
    ('"', '"'), ("“", "”"), ("„", "“"), ("”", "”"), ("«", "»"), ("'", "'"), ("‘", "’"), ("’", "’"),
    ("<", ">"), ("＜", "＞"), ("(", ")"), ("[", "]"),
)  # fmt: skip
_ROUND = ("<", "＜", "(", "[")
"""Openers that are markup only around a whole line, or around the concept too: "<div>" and "(a)" are surfaces."""
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_ESCAPES = re.compile(r"&(?:lt|gt|amp|quot|apos|nbsp|#39);|\\[][\\`*_<>|~#(){}-]")
_CHARACTERS = {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": '"', "&apos;": "'", "&#39;": "'", "&nbsp;": " "}
_TAG = re.compile(r"[\W\d]*entity\W*", re.IGNORECASE)
_HEADER_NAMES = frozenset(
    ["entity", "entities", "entity from the text", "entity from text", "entity name", "name", "surface", "mention"]
    + ["text", "concept", "entity concept", "entity type", "type"]
)
_JSON_START = re.compile(r'\s*(?:\{\s*(?:"|$)|\[\s*(?:[\[{"]|\]|$))')
_PLAIN_KEY = r'"\w{1,40}"\s*:\s*(?:-?\d{1,9}|"(?:[^"\\]|\\.)*")\s*,\s*'
_JSON_GAP = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder(strict=False)  # a raw line break within a string is clear enough


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that is no annotation, as it stands in the completion, and why, in one word for counting."""

    line: str
    reason: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of every line of a completion.

    annotations: in order, each once, unless repeats were asked for.
    rejected: "no_delimiter", "too_many_fields", "empty_surface", "empty_concept", "repeated_line" (the same annotation
      again), "cut_off" (the end of a cut answer), "lone_surrogate" (half a character); of JSON: "bad_json" (from
      there on unreadable), "other_json" (without a list of entities), "bad_item" (not the keys that were asked for).
    ignored: what never was meant to be one: "blank", "code_fence", "separator" (without a letter or digit), "header",
      "end_marker", "reasoning" (up to `</think>`), "empty_json" (no entity).
    """

    annotations: tuple[Annotation, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class JsonArray:
    """An array that was read as far as it is sound: each item with its source, and what stands behind.

    whole: the array was closed, and `rest` begins behind it; else `rest` begins where it is broken.
    """

    items: tuple[tuple[Any, str], ...]
    rest: str
    whole: bool


def parse_completion(completion: str, text: str = "", *, cut: bool = False, repeats: bool = False) -> Completion:
    """Sorts every line of a completion; no string is refused.

    text: what was annotated, to decide between readings; "" if it is not known.
    cut: the answer ended at its token limit, so its last line is not to be trusted.
    repeats: an annotation that comes again is one more, and no "repeated_line".
    """
    sorter = _Sorter(text, repeats)
    lines = [line.removesuffix("\r") for line in completion.split("\n")]
    answer = _answer_start(lines)
    sorter.ignored += [Rejected(line, "reasoning") for line in lines[:answer]]
    first = next((at for at in range(answer, len(lines)) if _JSON_START.match(lines[at])), None)
    if first is not None:
        rest = sorter.read_json("\n".join(lines[first:]), cut)
        if rest is not None:
            sorter.read_lines(lines[answer:first], cut=False)
            sorter.read_lines(rest, cut)
            return sorter.result()
    sorter.read_lines(lines[answer:], cut)
    return sorter.result()


def has_delimiter(line: str) -> bool:
    """Whether the line may be an annotation: it holds the delimiter in one of its forms."""
    return _DELIMITER.search(line) is not None


def read_array(source: str, key: str) -> JsonArray | None:
    """The array of `[`, or of `{"key": [` with plain keys before it, at the start of `source`; `None` if there is none.

    Item by item, so that of an array that was cut or is broken, what comes before is read.
    """
    opening = re.match(rf'\s*(?:\{{\s*(?:{_PLAIN_KEY})*"{key}"\s*:\s*)?\[', source)
    if opening is None:
        return None
    items, at = [], opening.end()
    while True:
        at = _JSON_GAP.match(source, at).end()
        if source.startswith("]", at):
            return JsonArray(tuple(items), source[at + 1 :], whole=True)
        try:
            value, end = _DECODER.raw_decode(source, at)
        except (ValueError, RecursionError):
            return JsonArray(tuple(items), source[at:], whole=False)
        items.append((value, source[at:end]))
        at = end


@dataclass
class _Sorter:
    """Where the lines of one completion go."""

    text: str
    repeats: bool
    annotations: list[Annotation] = field(default_factory=list)
    seen: set[Annotation] = field(default_factory=set)
    rejected: list[Rejected] = field(default_factory=list)
    ignored: list[Rejected] = field(default_factory=list)

    def result(self) -> Completion:
        return Completion(tuple(self.annotations), tuple(self.rejected), tuple(self.ignored))

    def read_lines(self, lines: list[str], cut: bool) -> None:
        for at, line in enumerate(lines, start=1):
            if reason := _ignorable(line):
                self.ignored.append(Rejected(line, reason))
            elif cut and at == len(lines):
                self.rejected.append(Rejected(line, "cut_off"))
            else:
                self._add(line, line)

    def read_json(self, source: str, cut: bool) -> list[str] | None:
        """Reads the JSON at the start of `source`; the lines behind it, or `None` if it is none."""
        array = read_array(source, "entities")
        if array is None:
            return self._other_json(source)
        tail, _, behind = array.rest.partition("\n")
        in_object = source.lstrip().startswith("{")
        framed = not tail.strip("]},;`" + _BLANK)
        objects = in_object or any(isinstance(item, dict) for item, _ in array.items)
        if not objects and not (array.whole and framed):  # a line that begins with a bracket
            return None
        for item, line in array.items:
            self._add(item, line)
        if not array.whole:
            self.rejected.append(Rejected(array.rest, "cut_off" if cut else "bad_json"))
            return []
        if not array.items:
            self.ignored.append(Rejected(source.removesuffix(array.rest), "empty_json"))
        rest = behind.split("\n") if behind else []
        return rest if framed else [tail, *rest]

    def _other_json(self, source: str) -> list[str] | None:
        start = len(source) - len(source.lstrip())
        try:
            _, end = _DECODER.raw_decode(source, start)
        except (ValueError, RecursionError):
            return None
        if source[end:].partition("\n")[0].strip():
            return None
        self.rejected.append(Rejected(source[start:end], "other_json"))
        return source[end:].split("\n")[1:]

    def _add(self, item: Any, line: str) -> None:
        """Sorts a line, or an item of a JSON array, whose source is `line`."""
        try:
            annotation = _from_line(item, self.text) if isinstance(item, str) else _from_item(item)
            if annotation is None:
                self.ignored.append(Rejected(line, "header"))
                return
            "".join(annotation).encode()
            if annotation in self.seen and not self.repeats:
                raise MalformedAnnotation("repeated_line")
            self.annotations.append(annotation)
            self.seen.add(annotation)
        except UnicodeEncodeError:
            self.rejected.append(Rejected(line, "lone_surrogate"))
        except MalformedAnnotation as error:
            self.rejected.append(Rejected(line, error.kind))


def _answer_start(lines: list[str]) -> int:
    """The line at which the answer begins, behind the thoughts of a reasoning model."""
    opened = lines[0].lstrip().startswith("<think>") and not has_delimiter(lines[0])
    for at, line in enumerate(lines):
        if line.strip() == "</think>" or (opened and line.rstrip().endswith("</think>")):
            return at + 1
    return len(lines) if opened else 0


def _ignorable(line: str) -> str:
    """Why a line is of no account, "" if it may be an annotation."""
    bare = line.strip(_BLANK)
    if not bare:
        return "blank"
    if not has_delimiter(bare):
        if bare.startswith(("```", "~~~")):
            return "code_fence"
        unmarked = _END_MARKER.sub("", bare)
        if not any(map(str.isalnum, unmarked)):
            return "separator" if unmarked == bare else "end_marker"
    elif all(part and not part.strip("-=:|") for part in map(str.strip, _DELIMITER.split(bare))):
        return "separator"
    return ""


def _from_item(item: Any) -> Annotation:
    match item:
        case {"entity": str(surface), "concept": str(concept)}:
            description = item.get("description")
            return _checked(surface.strip(), concept, description if isinstance(description, str) else "")
    raise MalformedAnnotation("bad_item")


def _from_line(line: str, text: str) -> Annotation | None:
    """The annotation of a line, `None` for a header; raises `MalformedAnnotation`."""
    bare = _END_MARKER.sub("", line).strip(_BLANK)
    if bare.startswith("|") or bare.endswith("|"):  # a row of a table
        bare = bare.strip("|" + _BLANK)
    fields = _fields(bare)
    if len(fields) == 1:
        raise MalformedAnnotation("no_delimiter")
    if len(fields) == 4 and _TAG.fullmatch(fields[0]):  # ("entity" <> surface <> concept <> description)
        fields = [*fields[1:3], fields[3].rstrip("#" + _BLANK).removesuffix(")")]
    annotation = _reading(fields, text) if len(fields) <= 3 else None
    if annotation is None or not annotation.concept or not annotation.surface or annotation.surface not in text:
        annotation = _with_delimiter(bare, text) or annotation
    if annotation is None:
        raise MalformedAnnotation("too_many_fields")
    return None if _is_header(annotation, text) else _checked(*annotation)


def _fields(bare: str) -> list[str]:
    """The fields of a line; a delimiter at its very end opens no field beyond the third."""
    fields = [part.strip(_BLANK) for part in _DELIMITER.split(bare)]
    while len(fields) > 3 and not fields[-1]:
        fields.pop()
    return fields


def _with_delimiter(bare: str, text: str) -> Annotation | None:
    """The reading in which the delimiter is part of the surface, if that stands in the text."""
    marks = list(_DELIMITER.finditer(bare)) if text else []
    for mark in marks[-2:]:
        surface, fields = bare[: mark.start()], _fields(bare[mark.end() :])
        if has_delimiter(surface) and len(fields) <= 2:
            annotation = _reading([surface.strip(_BLANK), *fields], text)
            if annotation.surface and annotation.surface in text:
                return annotation
    return None


def _reading(fields: list[str], text: str) -> Annotation:
    """Takes the markup off: of the surface as long as it does not stand in the text, or for sure."""
    surface, *others = fields
    for _ in range(_LAYERS):
        peeled = _peel(surface, others, known=bool(text))
        if peeled is None or (not peeled[2] and surface and surface in text):
            break
        surface, others[-1], _ = peeled
    concept = _tidied(others[0], ";,:")
    if concept.count(".") == 1:  # an abbreviation such as "U.S." has more
        concept = concept.removesuffix(".")
    return Annotation(surface, concept_name(concept), _tidied("".join(others[1:]), ";,|"))


def _peel(surface: str, others: list[str], known: bool) -> tuple[str, str, bool] | None:
    """One layer less: the surface, the last field, and whether it is markup for sure; `None`: bare.

    known: the text is known, so that a wrong guess costs nothing.
    """
    concept, last = others[0], others[-1]
    if not surface or (surface[0].isalnum() and surface[-1].isalnum() and not surface[0].isdigit()):
        unescaped = _unescaped(surface)
        return (unescaped, last, False) if unescaped != surface else None
    if bullet := _BULLET.match(surface):
        return surface[bullet.end() :], last, True
    for opener, closer in _PAIRS:
        if not surface.startswith(opener):
            continue
        if closer not in surface[len(opener) :] and _closes(last, opener, closer):  # around the whole line
            return surface[len(opener) :].lstrip(), last[: -len(closer)].rstrip(), True
        inner = _unwrapped(surface, opener, closer)
        sure = _unwrapped(concept, opener, closer) is not None
        if inner is not None and (sure or opener not in _ROUND):
            return inner, last, sure
    if bullet := _NUMBER.match(surface) or (known and _TIGHT_BULLET.match(surface)):
        return surface[bullet.end() :], last, False
    trimmed = _unescaped(surface).rstrip(",;:" + _BLANK)
    return (trimmed, last, False) if trimmed != surface else None


def _closes(last: str, opener: str, closer: str) -> bool:
    """Whether `last` ends with a mark that was not opened in it."""
    inner = last.removesuffix(closer)
    balanced = inner.count(opener) % 2 == 0 if closer == opener else inner.count(opener) == inner.count(closer)
    return inner != last and balanced


def _unwrapped(name: str, opener: str, closer: str) -> str | None:
    """What stands between two marks that enclose the whole of `name`, `None` if they do not."""
    if not (name.startswith(opener) and name.endswith(closer) and len(name) >= len(opener) + len(closer)):
        return None
    inner = name[len(opener) : -len(closer)]
    between = _APOSTROPHE.sub("", inner) if closer in "'’" else inner
    return None if opener in between or closer in between else inner.strip(_BLANK)


def _tidied(name: str, stray: str) -> str:
    """A concept or description without markup and without `stray` characters at its end."""
    for _ in range(_LAYERS):
        before, name = name, _unescaped(name)
        if not (name[:1].isalnum() and name[-1:].isalnum()):  # as nearly all do: then there is no markup
            name = name.rstrip(stray + _BLANK)
            inner = (_unwrapped(name, *pair) for pair in _PAIRS if pair[0] not in "([")
            name = next((one for one in inner if one is not None), name)
        if name == before:
            break
    return name


def _unescaped(name: str) -> str:
    if "&" not in name and "\\" not in name:
        return name
    return _ESCAPES.sub(lambda escape: _CHARACTERS.get(escape[0]) or escape[0][1:], name)


def _is_header(annotation: Annotation, text: str) -> bool:
    """Whether a line names the fields; "entity <> concept" may also be an annotation of a text."""
    surface, concept, description = (name.casefold().replace("_", " ") for name in annotation)
    if concept in _HEADER_NAMES and description.startswith("description"):
        return True
    return surface in _HEADER_NAMES and concept in _HEADER_NAMES and not description and annotation.surface not in text


def _checked(surface: str, concept: str, description: str) -> Annotation:
    name = concept_name(concept)
    if not surface:
        raise MalformedAnnotation("empty_surface")
    if not any(map(str.isalnum, name)):
        raise MalformedAnnotation("empty_concept")
    return Annotation(surface, name, description.strip())
