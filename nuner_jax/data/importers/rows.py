"""Files of rows: JSONL, JSON arrays, CSV and parquet, plain or gzip, as numbered dictionaries.

A file that cannot be read at all is a `NunerError`; a row that cannot be read is yielded as a
`MalformedRow`, so that the caller may count it and go on.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nuner_jax.errors import NunerError

GZIP_MAGIC = b"\x1f\x8b"
ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PARQUET_BATCH_ROWS = 1024  # bounds the memory of one batch; larger is not faster here


class MalformedRow(ValueError):
    """A row that cannot be read; `kind` is the reason, one word for counting."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


NumberedRow = tuple[int, dict[str, Any] | MalformedRow]


def suffix(path: Path) -> str:
    """The lower-case file extension without a trailing `.gz`: ".jsonl" for "a.JSONL.gz"."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_rows(path: Path, only: str | None = None) -> Iterator[NumberedRow]:
    """Yields (line number, row) of a JSONL, JSON, CSV or parquet file.

    Numbers count from 1: lines of JSONL and CSV (where the row begins), rows of a JSON array and
    of parquet. `only` is a column that is enough for the caller: of parquet that has it, no other is
    read. Raises `NunerError` if the file is missing, corrupt or not UTF-8.
    """
    if suffix(path) == ".parquet":
        return _parquet_rows(path, only)
    if suffix(path) == ".csv":
        return _csv_rows(path)
    if first_line(path).startswith("["):
        return _json_array_rows(path)
    return _jsonl_rows(path)


def first_line(path: Path) -> str:
    """The first line of a text file that is not blank, stripped; "" if there is none."""
    return next((line.strip() for _, line in text_lines(path) if line.strip()), "")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line without its end) of a UTF-8 file, plain or gzip.

    Raises `NunerError`, naming file and line, if the file cannot be read or is not UTF-8.
    """
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, error) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _corrupt_gzip(path, number, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for reading bytes, decompressed if its first bytes say gzip.

    Raises `NunerError` if it cannot be opened, or is named `.gz` and is not gzip.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
        if path.name.lower().endswith(".gz") and not is_gzip:
            raise NunerError(f"{path}: named .gz, but it is not a gzip file; rename or rewrite it")
        return gzip.open(path, "rb") if is_gzip else open(path, "rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def _jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield number, MalformedRow("invalid_json")
            continue
        yield number, row if isinstance(row, dict) else MalformedRow("not_an_object")


def _json_array_rows(path: Path) -> Iterator[NumberedRow]:
    """Rows of one JSON array, which is read whole: there is no other way to know that it is valid.

    Pile-NER and most GLiNER files come so; they hold tens of thousands of rows.
    """
    text = "\n".join(line for _, line in text_lines(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise NunerError(f"{path}:{line}: the JSON array is truncated or invalid ({error}); fetch it again") from error
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else MalformedRow("not_an_object")


def _csv_rows(path: Path) -> Iterator[NumberedRow]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB is less than a long document
    number = 0
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            number = reader.line_num
            for cells in reader:
                first_line, number = number + 1, reader.line_num
                if not cells:
                    continue
                right = len(cells) == len(header)
                row = dict(zip(header, cells, strict=True)) if right else None
                yield first_line, row or MalformedRow("wrong_column_count")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number + 1, error) from error
    except csv.Error as error:
        raise NunerError(f"{path}:{number + 1}: not readable as CSV ({error})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _corrupt_gzip(path, number, error) from error


def _parquet_rows(path: Path, only: str | None) -> Iterator[NumberedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open_binary(path) as file:
            # Parquet needs random access: a compressed one is unpacked into memory.
            seekable = io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file
            parquet = pyarrow.parquet.ParquetFile(seekable)
            columns = [only] if only in parquet.schema_arrow.names else None
            for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise NunerError(f"{path}: corrupt parquet after row {number} ({error})") from error


def _unreadable(path: Path, error: OSError) -> NunerError:
    if isinstance(error, FileNotFoundError):
        return NunerError(f"{path}: no such file")
    return NunerError(f"{path}: cannot be read ({error.strerror or error})")


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> NunerError:
    byte = error.object[error.start]
    return NunerError(
        f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}); convert it, for instance with `iconv -f latin1 -t utf-8`"
    )


def _corrupt_gzip(path: Path, line: int, error: Exception) -> NunerError:
    return NunerError(f"{path}:{line + 1}: the gzip data is corrupt or truncated here ({error}); fetch it again")
