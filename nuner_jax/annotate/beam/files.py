"""What the Beam stages read and write: files that may lie in a bucket, and rows in one order written by many workers.

A path with "://" goes through Beam's file systems (gs:// needs `apache-beam[gcp]`, s3:// `apache-beam[aws]`);
everything else must be on a file system that all workers see.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nuner_jax.errors import NunerError

ROWS_PER_PART = 50_000  # a worker sorts so many in memory
_KEY_BITS = 32


def is_remote(path: str) -> bool:
    """Whether a path is the address of a bucket or the like."""
    return "://" in path


def join(folder: str, *names: str) -> str:
    """The path of a file below `folder`."""
    return "/".join([folder.rstrip("/"), *names])


def matching(pattern: str) -> list[str]:
    """The files that a path or glob means, sorted.

    Raises:
      NunerError: there is none.
    """
    with _named(pattern):
        (found,) = _file_systems().match([pattern])
    if not found.metadata_list:
        raise NunerError(f"{pattern}: no such file")
    return sorted(one.path for one in found.metadata_list)


def exists(path: str) -> bool:
    """Whether there is such a file."""
    with _named(path):
        return _file_systems().exists(path)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A file of this machine: the path itself, or a copy of a remote file for as long as it is needed."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="nuner_jax-") as folder:
        copy = Path(folder) / path.rpartition("/")[2]
        with open_binary(path) as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target)
        yield str(copy)


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file as they are, compressed or not; raises `NunerError` if it cannot be opened."""
    from apache_beam.io.filesystem import CompressionTypes

    with _named(path):
        file = _file_systems().open(path, compression_type=CompressionTypes.UNCOMPRESSED)
    with file:
        yield file


def upload(file: Path, path: str) -> None:
    """Copies a local file to `path`, which it replaces when it is complete."""
    with open(file, "rb") as source, replacing(path) as target:
        shutil.copyfileobj(source, target)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends without an error."""
    from apache_beam.io.filesystem import CompressionTypes

    partial = f"{path}.{uuid.uuid4().hex}.partial"
    with _named(path):
        with _file_systems().create(partial, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            yield file
        _file_systems().rename([partial], [path])


def write_json(content: Any, path: str) -> None:
    """Writes JSON, wholly or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n")


def remove(path: str) -> None:
    """Deletes a file if it is there."""
    with _named(path):
        if _file_systems().exists(path):
            _file_systems().delete([path])


def read_json(path: str) -> Any:
    """What `write_json` wrote; raises `NunerError` if it is missing."""
    with open_binary(path) as file:
        return json.loads(file.read())


@contextlib.contextmanager
def scratch(folder: str) -> Iterator[str]:
    """A folder below `folder` for what workers hand over; deleted at the end."""
    place = join(folder, f".beam-{uuid.uuid4().hex[:12]}")
    try:
        yield place
    finally:
        # What is left over harms nobody; an error here would hide the one that ended the block.
        with contextlib.suppress(Exception):
            _file_systems().delete([place if not is_remote(place) else f"{place}/"])


# --- Rows in order -----------------------------------------------------------------------------


def write_in_order(rows: Any, folder: str, name: str) -> None:
    """Adds to a pipeline that its rows are written in the order of their keys, for `parts_in_order`.

    Args:
      rows: PCollection of (key: bytes, line: bytes ending in a newline). Keys begin with a hash, so their first bytes
        divide them evenly: each part of about `ROWS_PER_PART` is sorted and written by one worker.
      folder: of the hand-over, see `scratch`.
      name: of these rows in it.
    """
    import apache_beam as beam

    count = beam.pvalue.AsSingleton(rows | f"count {name}" >> beam.combiners.Count.Globally())
    parts = (
        rows
        | f"divide {name}" >> beam.Map(_with_part, count)
        | f"group {name}" >> beam.GroupByKey()
        | f"write {name}" >> beam.Map(_write_part, folder, name)
    )
    collect(parts, join(folder, f"{name}.json"))


def collect(values: Any, path: str) -> None:
    """Adds to a pipeline that all elements of a small PCollection are written as one JSON list, in any order."""
    import apache_beam as beam

    label = path.rpartition("/")[2]
    _ = values | f"all {label}" >> beam.combiners.ToList() | f"save {label}" >> beam.Map(write_json, path)


def parts_in_order(folder: str, name: str) -> list[str]:
    """The gzip files that `write_in_order` wrote; one after the other they are the rows in order."""
    return [path for _, path in sorted(read_json(join(folder, f"{name}.json")))]


def lines_in_order(folder: str, name: str) -> Iterator[bytes]:
    """The lines that `write_in_order` wrote, in order."""
    for path in parts_in_order(folder, name):
        with open_binary(path) as raw, gzip.open(raw) as lines:
            yield from lines


def _with_part(row: tuple[bytes, bytes], count: int) -> tuple[int, tuple[bytes, bytes]]:
    parts = count // ROWS_PER_PART + 1
    return int.from_bytes(row[0][: _KEY_BITS // 8], "big") * parts >> _KEY_BITS, row


def _write_part(part: tuple[int, Iterable[tuple[bytes, bytes]]], folder: str, name: str) -> tuple[int, str]:
    number, rows = part
    path = join(folder, f"{name}-{number:06d}-{uuid.uuid4().hex[:8]}.gz")  # a part that is tried again is another file
    with replacing(path) as raw, gzip.GzipFile("", "wb", fileobj=raw, compresslevel=6, mtime=0) as file:
        for _, line in sorted(rows):
            file.write(line)
    return number, path


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Turns what Beam's file systems say into an error with the path."""
    from apache_beam.io.filesystem import BeamIOError

    try:
        yield
    except FileNotFoundError as error:
        raise NunerError(f"{path}: no such file") from error
    except (OSError, BeamIOError) as error:
        raise NunerError(f"{path}: cannot be read or written ({error})") from error
    except ValueError as error:
        if "Unable to get filesystem" not in str(error):
            raise
        raise NunerError(
            f"{path}: Beam has no file system for it; install Beam's own extra: pip install 'apache-beam[gcp]' for "
            "gs://, 'apache-beam[aws]' for s3://"
        ) from error


def _file_systems() -> Any:
    from apache_beam.io.filesystems import FileSystems

    return FileSystems
