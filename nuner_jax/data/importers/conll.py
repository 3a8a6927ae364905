"""CoNLL files: one word per line in columns, its tag last, a blank line between sentences."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

from nuner_jax.data.align import concept_name
from nuner_jax.data.importers.formats import ParsedRow, word_starts
from nuner_jax.data.importers.rows import MalformedRow, text_lines
from nuner_jax.data.records import Entity
from nuner_jax.errors import NunerError

_PREFIXED = re.compile(r"([BIESLU])-(.+)")
_BEGINS, _ENDS = {"B", "S", "U"}, {"E", "S", "L", "U"}

Sentence = list[tuple[int, str]]  # (line number, line)


def read_conll(path: Path) -> Iterator[tuple[int, ParsedRow | MalformedRow]]:
    """Yields (number of its first line, sentence) of a CoNLL file, plain or gzip.

    Words stand in the first column and IOB1, IOB2, BIOES, BILOU or IO tags in the last; columns are
    divided by tabs, or by spaces in a file whose first line has no tab. `-DOCSTART-` is skipped.
    The text is the words joined by one space each. A concept is the label with its underscores as
    spaces ("body_part" becomes "body part"); its case stays.

    A sentence with a line of another number of columns than the file's first, or without a word or
    tag, is malformed (`ragged_line`, `empty_word`, `empty_tag`), reported at that line. Raises
    `NunerError` if the file is unreadable or its first line has one column only.
    """
    separator, columns = "", 0
    for sentence in read_sentences(path):
        if not separator:
            number, line = sentence[0]
            separator, columns = division(f"{path}:{number}", line)
        yield _parse_sentence(sentence, separator, columns)


def tag_spans(tags: list[str]) -> list[tuple[int, int, str]]:
    """Decodes tags to [(first word, word after the last, label), …].

    One rule serves IOB1, IOB2, BIOES, BILOU and IO: a mention begins at a tag B, S or U, after a
    word outside or ended by E, S, L or U, and where the label changes. A tag without a prefix is
    its label.
    """
    spans: list[tuple[int, int, str]] = []
    begin, label, closed = 0, "", True
    for at, tag in enumerate([*tags, "O"]):
        prefix, now = tag_parts(tag)
        if now and now == label and not closed and prefix not in _BEGINS:
            closed = prefix in _ENDS
            continue
        if label:
            spans.append((begin, at, label))
        begin, label, closed = at, now, prefix in _ENDS
    return spans


@functools.lru_cache(maxsize=100_000)
def tag_parts(tag: str) -> tuple[str, str]:
    """Prefix and label of a tag: ("O", "") outside, ("", tag) for a label alone."""
    if tag == "O":
        return "O", ""
    prefixed = _PREFIXED.fullmatch(tag)
    return prefixed.groups() if prefixed else ("", tag)


def tagged_row(words: list[str], tags: list[str]) -> ParsedRow:
    """The words joined by one space each; a concept is the label of the tags with its underscores as spaces."""
    starts = word_starts(words)
    entities = tuple(
        Entity(starts[first], starts[after - 1] + len(words[after - 1]), name)
        for first, after, label in tag_spans(tags)
        if (name := concept_name(label.replace("_", " ")))
    )
    return ParsedRow(" ".join(words), entities=entities)


def read_sentences(path: Path) -> Iterator[Sentence]:
    """The sentences of a file, which blank and -DOCSTART- lines divide: (line number, line) of each word."""
    sentence: Sentence = []
    for number, line in text_lines(path):
        if line.strip() and not line.startswith("-DOCSTART-"):
            sentence.append((number, line))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _parse_sentence(sentence: Sentence, separator: str, columns: int) -> tuple[int, ParsedRow | MalformedRow]:
    words, tags = [], []
    for number, line in sentence:
        cells = split_cells(line, separator)
        if len(cells) != columns:
            return number, MalformedRow("ragged_line")
        if not cells[0] or not cells[-1]:
            return number, MalformedRow("empty_tag" if cells[0] else "empty_word")
        words.append(cells[0])
        tags.append(cells[-1])
    return sentence[0][0], tagged_row(words, tags)


def division(place: str, line: str) -> tuple[str, int]:
    """What divides the columns of a file with this first line, and how many they are.

    Raises `NunerError`, with the `place` of the line, if there is one only.
    """
    separator = "\t" if "\t" in line else " "
    columns = len(split_cells(line, separator))
    if columns < 2:
        raise NunerError(f"{place}: CoNLL needs a word and a tag divided by a tab or spaces, not {line[:40]!r}")
    return separator, columns


def split_cells(line: str, separator: str) -> list[str]:
    """Only tabs or spaces divide: other Unicode spaces may be part of a word."""
    if separator == "\t":
        return [cell.strip(" ") for cell in line.split("\t")]
    return re.split(" +", line.strip(" "))
