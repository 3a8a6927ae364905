"""Writes a built data set as rows of the published NuNER format, for others to read.

python -m nuner_jax.data.export_rows --data=data/mine --out=rows.jsonl.gz
python -m nuner_jax.data.export_rows --data=data/mine --out=rows.parquet --form=entity

A row is {"input": text, "output": "['surface <> concept <> description', …]"}, its output being the literal of a
Python list; the form "entity" leaves the description out. Rows hold no places: an importer looks for every
occurrence of a surface again.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from absl import flags

from nuner_jax.data import builder
from nuner_jax.data.align import DELIMITER
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError, run_command
from nuner_jax.folders import local_path, workshop, writing

FORMS = ("full", "entity")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_PARQUET_ROWS = 10_000  # of one row group: bounds the memory


@dataclass
class Written:
    """What was written; `left_out` counts the annotations that hold the delimiter and so cannot be told apart."""

    rows: int = 0
    annotations: int = 0
    left_out: int = 0


def main(argv: Sequence[str]) -> None:
    """Exports what the flags say, then tells what was written."""
    if len(argv) > 1:
        raise NunerError(f"unexpected argument {argv[1]!r}; the data set is given as --data=DIR")
    given = flags.FLAGS
    if not given.data or not given.out:
        raise NunerError("--data=DIR and --out=FILE are needed; see --helpshort")
    written = export_rows(local_path(given.data), local_path(given.out), form=given.form, overwrite=given.overwrite)
    print(f"{given.out}: {written.rows:,} rows with {written.annotations:,} annotations")
    if written.left_out:
        print(f"left out: {written.left_out:,} annotations with {DELIMITER!r} inside, which no reader could take apart")
    print("rows hold no places: importing them finds every occurrence of a surface in its text again")


def export_rows(data_dir: Path, out: Path, *, form: str = "full", overwrite: bool = False) -> Written:
    """Writes all splits of the data set `data_dir` to the file `out`, one after the other, in the data set's order.

    Equal data sets give equal bytes. The file is there wholly or not at all.

    Args:
      data_dir: the folder of a built data set.
      out: a file of one of `SUFFIXES`.
      form: one of `FORMS`.
      overwrite: replace a file that is there.

    Raises:
      NunerError: no such data set, another kind of file, or one that is there or cannot be written.
    """
    if not out.name.endswith(SUFFIXES):
        raise NunerError(f"{out}: the name tells the kind of file, and must end with {', '.join(SUFFIXES)}")
    splits = builder.splits(data_dir)
    if out.is_dir() or (out.exists() and not overwrite):
        raise NunerError(f"{out} is there already; choose another name, or replace the file with --overwrite")
    written = Written()
    records = (record for split in splits for record in builder.open_split(data_dir, split))
    rows = _rows(records, form, written)
    with writing(out), workshop(out) as temporary:
        partial = temporary / out.name
        (_write_parquet if out.suffix == ".parquet" else _write_jsonl)(rows, partial)
        os.replace(partial, out)
    return written


def annotation_lines(record: Record, form: str = "full") -> tuple[list[str], int]:
    """The distinct annotations of a record in order of first appearance, and how many had to be left out."""
    lines, left_out = {}, set()
    for entity in record.entities:
        parts = (record.text[entity.start : entity.end], entity.concept, entity.description)
        fields = [part for part in parts[: 3 if form == "full" else 2] if part]
        if any(DELIMITER in field for field in fields):
            left_out.add(tuple(fields))
        else:
            lines[f" {DELIMITER} ".join(fields)] = None
    return list(lines), len(left_out)


def _rows(records: Iterable[Record], form: str, written: Written) -> Iterator[dict[str, str]]:
    for record in records:
        lines, left_out = annotation_lines(record, form)
        written.rows += 1
        written.annotations += len(lines)
        written.left_out += left_out
        yield {"input": record.text, "output": repr(lines)}


def _write_jsonl(rows: Iterable[dict[str, str]], path: Path) -> None:
    # Neither a time nor a name in the gzip header: the same rows give the same bytes.
    with open(path, "wb") as plain:
        file = gzip.GzipFile("", "wb", fileobj=plain, mtime=0) if path.suffix == ".gz" else plain
        with file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_parquet(rows: Iterator[dict[str, str]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("input", pyarrow.string()), ("output", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _PARQUET_ROWS)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "The folder of a built data set; all its splits are written.")
    flags.DEFINE_string("out", None, f"The file to write: {', '.join(SUFFIXES)}.")
    flags.DEFINE_enum("form", "full", FORMS, "full: surface, concept, description; entity: without description.")
    flags.DEFINE_bool("overwrite", False, "Replace the file --out.")
    run_command(main)
