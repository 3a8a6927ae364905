"""Data sets of named entities with stated splits.

A set is given by its files, by a folder, by `hf:` or `tfds:` names, or by a name of named_sets.py; `SetSpec` says
how. Nothing is silent: a missing test split is an error, what had to be repaired is counted with its places, and the
report says what every split holds and how the splits overlap. A text without entities stays: it shows what is outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuner_jax.data.importers.formats import ParsedRow, detect_row_format, is_unicode, parse_row
from nuner_jax.data.importers.report import Tally, kind_lines
from nuner_jax.data.importers.rows import ROW_SUFFIXES, MalformedRow, first_line, suffix
from nuner_jax.data.importers.tfds_rows import TfdsSplit
from nuner_jax.data.ner.set_report import contents, overlaps, report_table
from nuner_jax.data.ner.set_spec import FORMATS, SPLITS, SetSpec, resolve, split_files, tag_layout
from nuner_jax.data.ner.tagged_files import TagLayout, name_of, open_rows, read_columns, read_tokens
from nuner_jax.data.ner.words import flat
from nuner_jax.data.records import TEXT_HASHES, Record, text_hash
from nuner_jax.errors import NunerError

__all__ = ["TaggedSet", "load", "report_table"]

_JOINED = ("conll", "tokens", "gliner")  # their texts are words joined by one space each

Rows = Iterable[tuple[int, ParsedRow | MalformedRow]]


@dataclass(frozen=True)
class TaggedSet:
    """A data set; the mentions of a text do not overlap.

    types: those of all splits, sorted. split_on_space: how texts divide into words, for `word_spans`.
    fingerprint: sha256 over the records of all splits and how they divide. report: JSON data; see `report_table`.
    """

    name: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    dev: tuple[Record, ...]
    types: tuple[str, ...]
    split_on_space: bool
    fingerprint: str
    report: dict[str, Any]


def load(given: Mapping[str, Any]) -> TaggedSet:
    """Loads a data set.

    Args:
      given: keys of `SetSpec`, at least `name`.

    Raises:
      NunerError: a key or value is unknown; a file is missing, unreadable, not UTF-8, malformed, or has invalid tags
        that are to be refused; there is no test split, or it has nothing that train lacks; a split is empty.
    """
    spec = resolve(given)
    layout = tag_layout(spec)
    read = {split: _SplitReader(spec, layout).read(paths) for split, paths in split_files(spec).items() if paths}
    split_on_space = _split_on_space(spec, {name for one in read.values() for name in one.formats})
    records = {split: tuple(read[split].records) if split in read else () for split in SPLITS}
    if shares := spec.shares():
        records |= _shared_out(records["train"], shares)
    _check_splits(spec, records)
    fingerprint = _fingerprint(records, split_on_space)
    return TaggedSet(
        name=spec.name,
        **records,
        types=tuple(sorted({one.concept for part in records.values() for record in part for one in record.entities})),
        split_on_space=split_on_space,
        fingerprint=fingerprint,
        report={
            "name": spec.name,
            "version": spec.version or ", ".join(dict.fromkeys(name for one in read.values() for name in one.versions)),
            "fingerprint": fingerprint,
            "words": "space" if split_on_space else "text",
            "shares": shares,
            "files": {split: one.report() for split, one in read.items()},
            "splits": {split: contents(part, split_on_space) for split, part in records.items() if part},
            **overlaps(records),
        },
    )


class _SplitReader:
    """Reads the files of one split, and counts what happens on the way."""

    def __init__(self, spec: SetSpec, layout: TagLayout):
        self.spec, self.layout = spec, layout
        self.records: list[Record] = []
        self.formats: dict[str, None] = {}  # in order
        self.schemes: dict[str, None] = {}
        self.versions: dict[str, None] = {}  # that the data themselves tell
        self.paths: list[str] = []
        self.repaired, self.malformed, self.bad_annotations = Tally(), Tally(), Tally()
        self.empty = self.overlapping = 0

    def read(self, sources: Sequence[Path | TfdsSplit]) -> _SplitReader:
        """Reads all in order; raises `NunerError`, after the last one, for what the spec refuses."""
        for source in sources:
            self.paths.append(str(source))
            if isinstance(source, TfdsSplit):
                self.versions[source.builder.info.full_name] = None
            for number, row in self._rows(source):
                self._add(row, f"{name_of(source)}:{number}")
        self._refuse()
        return self

    def report(self) -> dict[str, Any]:
        """What was read, as JSON data."""
        return {
            "paths": self.paths,
            "formats": list(self.formats),
            "schemes": list(self.schemes),
            "repaired_tags": self.repaired.as_dict(),
            "malformed_rows": self.malformed.as_dict(),
            "malformed_annotations": self.bad_annotations.as_dict(),
            "empty_sentences": self.empty,
            "overlapping_mentions": self.overlapping,
        }

    def _rows(self, source: Path | TfdsSplit) -> Rows:
        name = _format(source) if self.spec.format == "auto" else self.spec.format
        self.formats[name] = None
        if name not in ("conll", "tokens"):
            return ((number, parse_row(row, name)) for number, row in open_rows(source))
        if name == "conll" and isinstance(source, TfdsSplit):
            raise NunerError(f'{self.spec.key("format")} = "conll": {source} has rows, not lines')
        read_tagged = read_columns if name == "conll" else read_tokens
        scheme, rows = read_tagged(source, self.layout, self.repaired)
        self.schemes[scheme] = None
        return rows

    def _add(self, row: ParsedRow | MalformedRow, place: str) -> None:
        if not isinstance(row, MalformedRow) and not is_unicode([row.text, *(one.concept for one in row.entities)]):
            row = MalformedRow("lone_surrogate")
        if isinstance(row, MalformedRow):
            self.malformed.add(row.kind, place)
            return
        for kind in row.malformed:
            self.bad_annotations.add(kind, place)
        if not row.text.strip():
            self.empty += 1
            return
        record = flat(Record(row.text, row.entities))
        self.overlapping += len(row.entities) - len(record.entities)
        self.records.append(record)

    def _refuse(self) -> None:
        for tally, what, key, instead in (
            (self.repaired, "tags", "invalid_tags", "repair"),
            (self.malformed, "rows", "malformed", "skip"),
            (self.bad_annotations, "annotations", "malformed", "skip"),
        ):
            if tally.total() and getattr(self.spec, key) == "refuse":
                raise NunerError(
                    f"{', '.join(self.paths)}: {what} that are not valid ({', '.join([*self.formats, *self.schemes])}):"
                    f" {'; '.join(kind_lines(tally.as_dict(), places=5))}."
                    f' Correct them, or set {self.spec.key(key)} = "{instead}"'
                )


def _format(source: Path | TfdsSplit) -> str:
    """The format of a source, from its extension and its first readable row."""
    if isinstance(source, Path) and suffix(source) not in ROW_SUFFIXES and not _begins_as_rows(source):
        return "conll"
    for number, row in open_rows(source):
        if isinstance(row, MalformedRow):
            continue
        name = detect_row_format(row) or ("tokens" if "tokens" in row else None)
        if name in FORMATS:
            return name
        raise NunerError(
            f"{source}:{number}: a row with the keys {', '.join(map(repr, row))} does not say where each mention"
            f" stands; the formats that do are {', '.join(FORMATS)}"
        )
    raise NunerError(f"{source}: has no readable row")


def _begins_as_rows(path: Path) -> bool:
    return first_line(path).startswith(('{"', "[{"))


def _split_on_space(spec: SetSpec, formats: set[str]) -> bool:
    if spec.words != "auto":
        return spec.words == "space"
    joined = {name in _JOINED for name in formats}
    if len(joined) > 1:
        raise NunerError(
            f"{spec.key('words')} is not set, and the files differ ({', '.join(sorted(formats))}):"
            ' choose "space" if all texts are words joined by spaces, or "text"'
        )
    return joined.pop()


def _shared_out(records: Sequence[Record], shares: Mapping[str, float]) -> dict[str, tuple[Record, ...]]:
    """The splits of one file, by the hash of each text: the same text is never in two of them."""
    parts: dict[str, list[Record]] = {"train": [], **{split: [] for split in shares}}
    for record in records:
        place = text_hash(record.text) / TEXT_HASHES
        for split, share in shares.items():
            if place < share:
                parts[split].append(record)
                break
            place -= share
        else:
            parts["train"].append(record)
    return {split: tuple(part) for split, part in parts.items()}


def _check_splits(spec: SetSpec, records: Mapping[str, Sequence[Record]]) -> None:
    for split, part in records.items():
        stated = getattr(spec, split)
        if stated and not part:
            raise NunerError(f"{spec.key(split)} = {stated!r}: the {split} split has no sentence")
        if stated and not any(record.entities for record in part):
            raise NunerError(f"{spec.key(split)} = {stated!r}: no sentence of the {split} split has an entity")
    if {record.text for record in records["test"]} <= {record.text for record in records["train"]}:
        raise NunerError(f"{spec.key('test')} = {spec.test!r}: every sentence of it is in the train split too")


def _fingerprint(records: Mapping[str, Sequence[Record]], split_on_space: bool) -> str:
    digest = hashlib.sha256(str(split_on_space).encode())
    for split, part in records.items():
        rows = [[record.text, [[one.start, one.end, one.concept] for one in record.entities]] for record in part]
        digest.update(json.dumps([split, rows]).encode())
    return digest.hexdigest()
