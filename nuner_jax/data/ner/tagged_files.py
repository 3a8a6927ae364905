"""Data in which every word has a tag: CoNLL columns, and rows of `tokens` with a list of tags.

The scheme (IOB1, IOB2, BIOES, BILOU or IO) is told from all tags of a file, since a single sentence may fit
several. Decoding is that of `data/importers/conll.py`, which is the same for all of them; the scheme tells which
sequences are not valid, and so were repaired by decoding them.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nuner_jax.data.importers.conll import division, read_sentences, split_cells, tag_parts, tagged_row
from nuner_jax.data.importers.formats import ParsedRow
from nuner_jax.data.importers.report import Tally
from nuner_jax.data.importers.rows import MalformedRow, NumberedRow, read_rows, suffix
from nuner_jax.data.importers.tfds_rows import TfdsSplit
from nuner_jax.errors import NunerError

_BRACKETED = re.compile(r"\(|\*")  # "(PERSON*", "*)": how CoNLL-2012 writes names


@dataclass(frozen=True, slots=True)
class TagLayout:
    """Where the words and their tags stand.

    word_column, tag_column: of a CoNLL file, from 0; from the end if negative.
    comment: lines of a CoNLL file that begin so are passed over; "": none.
    tag_key: of rows, the key of the tags.
    labels: of rows with numbers as tags, the tag of each number; (): as a parquet file itself says.
    """

    word_column: int = 0
    tag_column: int = -1
    comment: str = ""
    tag_key: str = "ner_tags"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sentence:
    lines: list[int]  # one per word
    words: list[str]
    tags: list[str]


_Read = tuple[int, _Sentence | MalformedRow]
Rows = list[tuple[int, ParsedRow | MalformedRow]]


def read_columns(path: Path, layout: TagLayout, invalid: Tally) -> tuple[str, Rows]:
    """Reads a CoNLL file, plain or gzip; columns are divided by tabs, or by spaces if the first line has no tab.

    A sentence with a line of another number of columns than the first, or without a word or a tag, is malformed
    (`ragged_line`, `empty_word`, `empty_tag`), as is one with a tag that has no prefix in a file where others
    have one (`tag_without_prefix`).

    Returns:
      The scheme, "none" if all words are outside, and (line of the first word, sentence) of every sentence, malformed
      ones included. Tags that may not stand where they do are counted in `invalid`.

    Raises:
      NunerError: the file is unreadable or not UTF-8, has no such column, or brackets in place of tags.
    """
    return _decoded(path, list(_columns(path, layout)), invalid)


def open_rows(source: Path | TfdsSplit) -> Iterator[NumberedRow]:
    """The rows of a file (JSONL, JSON, CSV or parquet) or of a TFDS data set, as JSON would hold them.

    Raises:
      NunerError: it cannot be read.
    """
    return source.plain_rows() if isinstance(source, TfdsSplit) else read_rows(source)


def name_of(source: Path | TfdsSplit) -> str:
    """What stands before the number of a line or row."""
    return str(source) if isinstance(source, TfdsSplit) else source.name


def read_tokens(source: Path | TfdsSplit, layout: TagLayout, invalid: Tally) -> tuple[str, Rows]:
    """Reads rows with `tokens` and a list of tags, or of their numbers, under `tag_key`.

    Malformed are rows whose `tokens` or tags are no such lists (`tokens_not_words`, `tags_not_a_list`), differ in
    number (`tokens_and_tags_differ`), or have a number beyond the labels (`unknown_tag_number`).

    Returns:
      As `read_columns`.

    Raises:
      NunerError: the source is unreadable, lacks the key, or has numbers as tags and no labels.
    """
    labels = layout.labels or _class_names(source, layout.tag_key)
    return _decoded(source, list(_token_rows(source, layout.tag_key, labels)), invalid)


def detect_scheme(pairs: Counter[tuple[str, str]]) -> str:
    """The scheme of the tags, from how often each tag follows each other one ("O" before and after a sentence)."""
    prefixes = {tag_parts(tag)[0] for pair in pairs for tag in pair} - {"O"}
    if not prefixes:
        return "none"
    if prefixes & set("ES"):
        return "BIOES"
    if prefixes & set("LU"):
        return "BILOU"
    if "B" not in prefixes:
        return "IO"
    # The two differ in when a mention begins with B. A file with errors fits neither: the nearer one it is.
    return min(("IOB2", "IOB1"), key=lambda scheme: _count_invalid(scheme, pairs))


def _columns(path: Path, layout: TagLayout) -> Iterator[_Read]:
    separator, columns = "", 0
    for sentence in read_sentences(path):
        if layout.comment:
            sentence = [(number, line) for number, line in sentence if not line.startswith(layout.comment)]
            if not sentence:
                continue
        if not separator:
            number, line = sentence[0]
            separator, columns = division(f"{path}:{number}", line)
            _check_columns(f"{path}:{number}", columns, layout)
        rows = [split_cells(line, separator) for _, line in sentence]
        lines = [number for number, _ in sentence]
        words = [cells[layout.word_column] for cells in rows if len(cells) == columns]
        tags = [cells[layout.tag_column] for cells in rows if len(cells) == columns]
        if len(words) < len(rows):
            ragged = next(at for at, cells in enumerate(rows) if len(cells) != columns)
            yield lines[ragged], MalformedRow("ragged_line")
        elif not all(words):
            yield lines[words.index("")], MalformedRow("empty_word")
        elif not all(tags):
            yield lines[tags.index("")], MalformedRow("empty_tag")
        else:
            yield lines[0], _Sentence(lines, words, tags)


def _check_columns(place: str, columns: int, layout: TagLayout) -> None:
    for name in ("word_column", "tag_column"):
        column = getattr(layout, name)
        if not -columns <= column < columns:
            raise NunerError(f"{place}: the line has {columns} columns, and so none of number {name} = {column}")
    if layout.word_column % columns == layout.tag_column % columns:
        raise NunerError(f"{place}: word_column and tag_column are both column {layout.word_column % columns}")


def _token_rows(source: Path | TfdsSplit, key: str, labels: tuple[str, ...]) -> Iterator[_Read]:
    for number, row in open_rows(source):
        if isinstance(row, MalformedRow):
            yield number, row
            continue
        for name in ("tokens", key):
            if name not in row:
                keys = ", ".join(map(repr, row))
                raise NunerError(f"{source}:{number}: the row has no {name!r} but {keys}; say which by tag_key")
        words, tags = row["tokens"], row[key]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            yield number, MalformedRow("tokens_not_words")
        elif not isinstance(tags, list) or not all(isinstance(tag, str | int) for tag in tags):
            yield number, MalformedRow("tags_not_a_list")
        elif len(words) != len(tags):
            yield number, MalformedRow("tokens_and_tags_differ")
        elif not all(word.strip() for word in words):
            yield number, MalformedRow("empty_word")
        else:
            yield number, _with_tag_names(f"{source}:{number}", _Sentence([number] * len(words), words, tags), labels)


def _with_tag_names(place: str, sentence: _Sentence, labels: tuple[str, ...]) -> _Sentence | MalformedRow:
    if all(isinstance(tag, str) for tag in sentence.tags):
        return sentence
    if not labels:
        raise NunerError(f"{place}: its tags are numbers; say what they mean by `labels`, the tag of each number")
    if any(isinstance(tag, int) and not 0 <= tag < len(labels) for tag in sentence.tags):
        return MalformedRow("unknown_tag_number")
    tags = [tag if isinstance(tag, str) else labels[tag] for tag in sentence.tags]
    return _Sentence(sentence.lines, sentence.words, tags)


def _class_names(source: Path | TfdsSplit, key: str) -> tuple[str, ...]:
    """The tags that the numbers of a column stand for, as far as the data themselves tell."""
    if isinstance(source, TfdsSplit):
        return source.class_names(key)
    return _parquet_labels(source, key) if suffix(source) == ".parquet" else ()


def _parquet_labels(path: Path, key: str) -> tuple[str, ...]:
    """The names of a column's class numbers, which the `datasets` package stores in the file; () if it has none."""
    import pyarrow.parquet

    try:
        stored = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
        feature = json.loads(stored)["info"]["features"][key]["feature"]
        return tuple(feature["names"])
    except (KeyError, TypeError, ValueError, OSError):  # no such metadata, or no parquet: reading the rows tells
        return ()


def _decoded(source: Path | TfdsSplit, read: list[_Read], invalid: Tally) -> tuple[str, Rows]:
    sentences = [sentence for _, sentence in read if isinstance(sentence, _Sentence)]
    pairs: Counter[tuple[str, str]] = Counter()
    for sentence in sentences:
        pairs.update(zip(["O", *sentence.tags], [*sentence.tags, "O"], strict=True))
    _refuse_brackets(source, pairs)
    scheme = detect_scheme(pairs)
    if _count_invalid(scheme, pairs):
        for sentence in sentences:
            for at in _invalid_places(scheme, sentence.tags):
                invalid.add("invalid_sequence", f"{name_of(source)}:{sentence.lines[at]}")
    bare = {tag for pair in pairs for tag in pair if scheme != "IO" and not tag_parts(tag)[0]}
    rows: Rows = []
    for number, sentence in read:
        if isinstance(sentence, _Sentence) and not bare.isdisjoint(sentence.tags):
            number = next(line for line, tag in zip(sentence.lines, sentence.tags, strict=True) if tag in bare)
            sentence = MalformedRow("tag_without_prefix")
        rows.append(
            (number, sentence if isinstance(sentence, MalformedRow) else tagged_row(sentence.words, sentence.tags))
        )
    return scheme, rows


def _refuse_brackets(source: Path | TfdsSplit, pairs: Counter[tuple[str, str]]) -> None:
    for tag in sorted({tag for pair in pairs for tag in pair}):
        if _BRACKETED.search(tag):
            raise NunerError(
                f"{source}: {tag!r} is no IOB tag; CoNLL-2012 writes names with brackets: convert the file to"
                " one tag per word, or choose another tag_column"
            )


def _invalid_places(scheme: str, tags: list[str]) -> list[int]:
    """The words at which the sequence is not valid; a mention left open at the end counts at its last word."""
    pairs = zip(["O", *tags], [*tags, "O"], strict=True)
    return [min(at, len(tags) - 1) for at, pair in enumerate(pairs) if not _follows(scheme, *pair)]


def _count_invalid(scheme: str, pairs: Counter[tuple[str, str]]) -> int:
    return sum(count for pair, count in pairs.items() if not _follows(scheme, *pair))


@functools.lru_cache(maxsize=100_000)
def _follows(scheme: str, before: str, tag: str) -> bool:
    """Whether `tag` may follow `before`."""
    (_, label_before), (prefix, label) = tag_parts(before), tag_parts(tag)
    same = label == label_before
    match scheme:
        case "IOB2":
            return prefix != "I" or same
        case "IOB1":
            return prefix != "B" or same
        case "BIOES" | "BILOU":
            goes_on = prefix in ("I", "E", "L")
            return goes_on == (tag_parts(before)[0] in ("B", "I")) and (same or not goes_on)
    return True
