"""From input files to a stream of records, with everything counted on the way."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nuner_jax.data.align import Alignment, Annotation, align, in_order
from nuner_jax.data.importers.conll import read_conll
from nuner_jax.data.importers.formats import (
    ROW_FORMATS,
    ParsedRow,
    detect_row_format,
    is_unicode,
    parse_row,
)
from nuner_jax.data.importers.hub import HUB_PREFIX, fetch
from nuner_jax.data.importers.report import Report, kind_lines
from nuner_jax.data.importers.rows import (
    ROW_SUFFIXES,
    MalformedRow,
    first_line,
    read_rows,
    suffix,
)
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError

FORMATS = (*ROW_FORMATS, "conll")
SAMPLE = "sample"
SAMPLE_FILE = Path(__file__).parents[1] / "sample" / "completions.jsonl.gz"
_CONLL_SUFFIXES = (".conll", ".txt", ".tsv", ".bio", ".iob", ".iob2")


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How rows become records.

    format: one of `FORMATS`, or "auto" to tell it from each file.
    drop_concept: rows annotated with it, in any case, are dropped, as the paper drops "concept";
      "" or None drops none.
    lower_concepts: make "Person" and "person" one concept.
    keep_unlabelled: keep rows without any entity. Off, because nobody says whether such a row holds
      no entity or its annotation failed, and unlabelled is not negative.
    max_malformed: the largest share of malformed rows, 0 to 1, at which the import still succeeds.
    """

    format: str = "auto"
    drop_concept: str | None = "concept"
    lower_concepts: bool = False
    keep_unlabelled: bool = False
    max_malformed: float = 0.05

    def __post_init__(self) -> None:
        if self.format not in ("auto", *FORMATS):
            raise NunerError(f"format {self.format!r} is unknown; known are: auto, {', '.join(FORMATS)}")
        if not 0 <= self.max_malformed <= 1:
            raise NunerError(f"max_malformed is a share between 0 and 1, not {self.max_malformed}")


def resolve_inputs(inputs: Sequence[str]) -> list[Path]:
    """Local files of the inputs: paths as they are, "sample" as the embedded sample, `hf:` fetched.

    Raises `NunerError` if there is no input, or one does not exist or cannot be fetched.
    """
    if not inputs:
        raise NunerError("no input given; name a file, hf:org/data_set or 'sample'")
    paths: list[Path] = []
    for name in inputs:
        if name == SAMPLE:
            paths.append(SAMPLE_FILE)
        elif name.startswith(HUB_PREFIX):
            paths.extend(fetch(name))
        else:
            paths.append(Path(name).expanduser())
    for path in paths:
        if not path.exists():
            raise NunerError(f"{path}: no such file")
        if path.is_dir():
            raise NunerError(f"{path}: is a folder, and no built data set; name its files")
    return paths


def import_records(paths: Sequence[Path], report: Report, options: ImportOptions | None = None) -> Iterator[Record]:
    """Yields the records of the files in order, and counts everything in `report`.

    Raises `NunerError` if a file is unreadable or of an unknown format, or, after the last row, if
    more than `max_malformed` of the rows were malformed or no row has an entity. So whoever
    writes must wait for the end before the result is called good.
    """
    options = options or ImportOptions()
    kept_texts: set[bytes] = set()
    for path in paths:
        rows_before = report.rows
        for number, row in read_file(path, options.format):
            record = _count_row(row, f"{path.name}:{number}", report, options, kept_texts)
            if record is not None:
                yield record
        if report.rows == rows_before:
            raise NunerError(f"{path}: the data set is empty")
    _check(report, options, paths)


def read_file(path: Path, format_name: str = "auto") -> Iterator[tuple[int, ParsedRow | MalformedRow]]:
    """Yields (line or row number, row) of one file, malformed rows included.

    "auto" tells the format from the extension and from the keys of the first readable row. Raises
    `NunerError` if the file is unreadable, or, listing the known formats, if nothing fits.
    """
    if format_name == "conll" or (format_name == "auto" and _looks_like_conll(path)):
        yield from read_conll(path)
        return
    known = None if format_name == "auto" else format_name
    for number, row in read_rows(path):
        if known is None and not isinstance(row, MalformedRow):
            known = detect_row_format(row)
            if known is None:
                keys = ", ".join(map(repr, row))
                raise _unknown_format(f"{path}:{number}", f"the row has the keys {keys}")
        yield number, parse_row(row, known)


def _looks_like_conll(path: Path) -> bool:
    ending = suffix(path)
    if ending in ROW_SUFFIXES:
        return False
    line = first_line(path)
    if ending in _CONLL_SUFFIXES:
        return not line.startswith('{"')  # JSONL under a text file's name
    if line.startswith(("{", "[")) or not line:
        return False
    raise _unknown_format(str(path), f"neither its extension {ending!r} nor its first line tells")


def _unknown_format(place: str, why: str) -> NunerError:
    known = [f"{name} ({', '.join(row.keys)})" for name, row in ROW_FORMATS.items()]
    return NunerError(
        f"{place}: its format is unknown: {why}; known are: {', '.join(known)} and conll"
        " (word and tag columns). Choose one with --format"
    )


def _count_row(
    row: ParsedRow | MalformedRow,
    place: str,
    report: Report,
    options: ImportOptions,
    kept_texts: set[bytes],
) -> Record | None:
    """The record of one row, `None` if it is not kept; either way it is counted once."""
    report.rows += 1
    if not isinstance(row, MalformedRow) and not is_unicode(_strings(row)):
        row = MalformedRow("lone_surrogate")
    if isinstance(row, MalformedRow):
        report.malformed.add(row.kind, place)
        return None
    for kind in row.malformed:
        report.bad_annotations.add(kind, place)
    if not row.text.strip():
        report.empty_text += 1
        return None
    if _has_concept(row, options.drop_concept):
        report.dropped += 1
        return None
    digest = hashlib.blake2b(row.text.encode(), digest_size=12).digest()
    if digest in kept_texts:
        report.duplicates += 1
        return None
    record, concepts = _align_row(row, report, options)
    if not record.entities:
        report.unlabelled += 1
        if not options.keep_unlabelled:
            report.left_out += 1
            return None
    kept_texts.add(digest)
    report.records += 1
    report.entities += len(record.entities)
    report.concept_counts.update(concepts)
    return record


def _align_row(row: ParsedRow, report: Report, options: ImportOptions) -> tuple[Record, list[str]]:
    """The record, and the concept of every annotation that was found in its text."""
    if options.lower_concepts:
        row = _lowered(row)
    aligned: Alignment = align(row.text, row.annotations)
    report.found += len(aligned.found) + len(row.entities)
    report.not_in_text += len(aligned.missing)
    report.ambiguous += aligned.ambiguous
    concepts = [one.concept for one in (*aligned.found, *row.entities)]
    return Record(row.text, in_order({*aligned.entities, *row.entities})), concepts


def _lowered(row: ParsedRow) -> ParsedRow:
    def lowered(one: Annotation) -> Annotation:
        return one._replace(concept=one.concept.lower())

    return dataclasses.replace(
        row,
        annotations=tuple(lowered(one) for one in row.annotations),
        entities=tuple(dataclasses.replace(one, concept=one.concept.lower()) for one in row.entities),
    )


def _has_concept(row: ParsedRow, concept: str | None) -> bool:
    if not concept:
        return False
    name = concept.lower()
    return any(one.concept.lower() == name for one in (*row.annotations, *row.entities))


def _strings(row: ParsedRow) -> list[str]:
    """All that a record keeps of the row."""
    strings = [row.text]
    for one in (*row.annotations, *row.entities):
        strings += (one.concept, one.description)
    return strings


def _check(report: Report, options: ImportOptions, paths: Sequence[Path]) -> None:
    files = ", ".join(str(path) for path in paths)
    malformed = report.malformed.total()
    if malformed > options.max_malformed * report.rows:
        raise NunerError(
            f"{files}: {malformed:,} of {report.rows:,} rows are malformed"
            f" ({malformed / report.rows:.1%}; max_malformed allows {options.max_malformed:.1%}):"
            f" {'; '.join(kind_lines(report.malformed.as_dict(), places=5))}. Nothing was written."
            " Repair these rows, or raise --max_malformed to skip them"
        )
    if report.entities == 0:
        raise NunerError(
            f"{files}: none of the {report.rows:,} rows gives a record with an entity"
            f" (empty text {report.empty_text:,}, dropped {report.dropped:,}, malformed"
            f" annotations {report.bad_annotations.total():,}, annotations not in their text"
            f" {report.not_in_text:,}); check --format and the delimiter '<>'"
        )
