"""Where the texts come from: files, the embedded sample, TFDS data sets and Hugging Face data sets, as one stream.

`resolve` says what config.source.paths means and finds what is missing; `read_texts` reads it, as often as need be.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.data.importers import SAMPLE
from nuner_jax.data.importers.report import Tally, kind_lines
from nuner_jax.data.importers.rows import (
    ROW_SUFFIXES,
    MalformedRow,
    NumberedRow,
    first_line,
    read_rows,
    suffix,
    text_lines,
)
from nuner_jax.data.importers.stream import SAMPLE_FILE
from nuner_jax.data.importers.tfds_rows import TFDS_PREFIX, TfdsSplit
from nuner_jax.errors import NunerError

_HUB_NAME = re.compile(r"hf:(?P<name>[^:]+)(?::(?P<config>[^:]*))?(?::(?P<split>.+))?")
_SNIFFED_CHARS = 1 << 16  # in which a binary file shows a NUL

Text = tuple[str, str | MalformedRow]  # (place as "file:line", text or why there is none)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One entry of config.source.paths.

    name: the entry. files: the local files that it means; none for TFDS and the hub. open: its texts from the first
    one on; it raises `NunerError` at once for what cannot be opened, and while reading for what cannot be read.
    """

    name: str
    files: tuple[Path, ...]
    open: Callable[[], Iterator[Text]]

    def identity(self) -> list[dict[str, Any]]:
        """What tells that the texts are the same: name, size and sha256 of each file; else the name alone."""
        return [_file_identity(path) for path in self.files] or [{"name": self.name}]


def resolve(source: ConfigDict) -> list[Source]:
    """The sources of config.source, without reading any.

    An entry of `paths` is a file or glob (text, JSONL, JSON, CSV or parquet, plain or gzip), "sample",
    `tfds:NAME_OR_FOLDER[:SPLIT]` or `hf:ORG/NAME_OR_FOLDER[:CONFIG[:SPLIT]]`; the split is "train" if none is named.

    Raises:
      NunerError: a file is missing, a glob matches none, an entry is a folder, or a name is malformed.
    """
    return [_first(source.documents, _resolve_one(entry, source)) for entry in dict.fromkeys(source.paths)]


def _first(documents: int | None, source: Source) -> Source:
    """The source without what comes after its first rows or lines."""
    return dataclasses.replace(source, open=lambda: itertools.islice(source.open(), documents))


def read_texts(sources: Sequence[Source], malformed: Tally) -> Iterator[tuple[str, str]]:
    """Yields (text, place as "file:line") of all sources in order; rows without a text are counted in `malformed`.

    Raises:
      NunerError: a source cannot be opened, which is found before the first is read; a file is binary, not UTF-8 or
        corrupt; the first row has no such field; a source holds no text.
    """
    opened = [(source.name, source.open()) for source in sources]
    for name, texts in opened:
        empty = True
        faults = Tally()
        for place, text in texts:
            if isinstance(text, MalformedRow):
                malformed.add(text.kind, place)
                faults.add(text.kind, place)
                continue
            empty = empty and not text.strip()
            yield text, place
        if empty:
            raise no_text(name, faults)


def no_text(name: str, malformed: Tally) -> NunerError:
    """The error for a source without any text; `malformed` has its rows that could not be read."""
    why = f"; malformed rows: {'; '.join(kind_lines(malformed.as_dict(), places=3))}" if malformed.total() else ""
    return NunerError(f"{name}: holds no text{why}")


def _resolve_one(entry: str, source: ConfigDict) -> Source:
    if entry == SAMPLE:
        return Source(entry, (SAMPLE_FILE,), functools.partial(_row_file, SAMPLE_FILE, "text"))
    if entry.startswith(TFDS_PREFIX):
        try:
            split = TfdsSplit.parse(entry)
        except NunerError as error:
            raise NunerError(f"config.source.paths: {error}") from error
        return Source(entry, (), functools.partial(_tfds, split, source.field))
    if entry.startswith("hf:"):
        match = _HUB_NAME.fullmatch(entry)
        if not match:
            raise NunerError(f"config.source.paths: {entry}: a hub data set is hf:ORG/NAME[:CONFIG[:SPLIT]]")
        parts = (match["name"], match["config"] or None, match["split"] or "train")
        return Source(entry, (), functools.partial(_hub, entry, *parts, source.field))
    files = _files(entry)
    return Source(entry, files, lambda: (text for path in files for text in _file(path, source)))


# --- Files -------------------------------------------------------------------------------------


def _files(entry: str) -> tuple[Path, ...]:
    path = Path(entry).expanduser()
    if path.is_dir():
        raise NunerError(f"{entry}: is a folder; name its files, such as {path / '*.jsonl.gz'}")
    if path.exists():
        return (path,)
    if glob.has_magic(entry):
        matches = (Path(match) for match in sorted(glob.glob(str(path), recursive=True)))
        if files := tuple(match for match in matches if match.is_file()):
            return files
        raise NunerError(f"{entry}: no file matches")
    raise NunerError(f"{entry}: no such file")


def _file(path: Path, source: ConfigDict) -> Iterator[Text]:
    ending = suffix(path)
    if ending != ".parquet":
        _refuse_binary(path)
    if ending in ROW_SUFFIXES or (ending != ".txt" and first_line(path).startswith(("{", "["))):
        return _row_file(path, source.field)
    lines = text_lines(path)
    documents = _passages(lines, source.max_chars) if source.unit == "passage" else lines
    label = _label(path)
    return ((f"{label}:{number}", text) for number, text in documents if text.strip())


def _refuse_binary(path: Path) -> None:
    seen = 0
    for number, line in text_lines(path):
        if "\0" in line:
            raise NunerError(
                f"{path}:{number}: a binary file (it has a NUL byte), or text in UTF-16; what can be read is text in "
                "UTF-8, JSONL, JSON, CSV and parquet, plain or gzip"
            )
        seen += len(line)
        if seen > _SNIFFED_CHARS:
            return


def _passages(lines: Iterable[tuple[int, str]], max_chars: int) -> Iterator[tuple[int, str]]:
    """Yields (number of its first line, lines up to a blank one, joined by spaces).

    Of a passage that is too long only the beginning is held, just enough to be seen as too long: a large file without
    a blank line must not fill the memory.
    """
    held: list[str] = []
    first = chars = 0
    for number, line in lines:
        line = line.strip()
        if not line:
            if held:
                yield first, " ".join(held)
            held, chars = [], 0
            continue
        if not held:
            first = number
        if chars <= max_chars:
            held.append(line)
            chars += len(line)
    if held:
        yield first, " ".join(held)


def _row_file(path: Path, field: str) -> Iterator[Text]:
    return _row_texts(read_rows(path, only=field), field, str(path), _label(path))


def _row_texts(rows: Iterable[NumberedRow], field: str, name: str, label: str) -> Iterator[Text]:
    """The texts of numbered rows. A field that the first row lacks is a wrong name; one lacking later is a bad row."""
    found = False
    for number, row in rows:
        place = f"{label}:{number}"
        if isinstance(row, MalformedRow):
            yield place, row
        elif field in row:
            found = True
            yield place, _text(row[field])
        elif found:
            yield place, MalformedRow("missing_field")
        else:
            keys = ", ".join(map(repr, row))
            raise NunerError(f"{name}:{number}: has no {field!r} (config.source.field); its keys are: {keys}")


def _text(value: Any) -> str | MalformedRow:
    """The text of a field: TFDS has bytes; JSON can spell half a character, which no file can hold."""
    if value is None:
        return ""
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeDecodeError:
        return MalformedRow("not_utf8")
    except UnicodeEncodeError:
        return MalformedRow("lone_surrogate")
    return MalformedRow("not_a_string")


def _label(path: Path) -> str:
    """A file's name for places, always valid Unicode."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def _file_identity(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": _label(path), "bytes": path.stat().st_size, "sha256": digest}
    except OSError as error:
        raise NunerError(f"{path}: cannot be read ({error.strerror})") from error


# --- TFDS and the Hugging Face hub -------------------------------------------------------------


def _tfds(split: TfdsSplit, field: str) -> Iterator[Text]:
    return _row_texts(split.rows(), field, split.entry, split.entry)


def _hub(entry: str, name: str, config: str | None, split: str, field: str) -> Iterator[Text]:
    """Opens a data set of the hub, or a local folder of data files, for streaming."""
    try:
        import datasets
    except ImportError as error:
        raise NunerError(
            f"{entry}: needs the package datasets; install the extra: pip install 'nuner_jax[annotate]'"
        ) from error
    folder = Path(name).expanduser()
    try:
        rows = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=split, streaming=True)
        if field in (rows.column_names or ()):
            rows = rows.select_columns([field])  # others may hold images, or cost a download
    except Exception as error:  # its exceptions, and those of its network libraries, have no common base
        raise NunerError(
            f"{entry}: cannot be opened ({_first_line(error)}); check the name, the configuration, the split and the "
            "network"
        ) from error
    return _row_texts(_hub_rows(entry, rows), field, entry, entry)


def _hub_rows(entry: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[NumberedRow]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield number, row
    except Exception as error:  # as above; what the reader of these rows raises does not pass through here
        raise NunerError(f"{entry}: cannot be read after row {number} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"
