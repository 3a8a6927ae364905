"""Rows of data sets that TFDS has prepared, read without TensorFlow: `tfds:NAME_OR_FOLDER[:SPLIT]`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nuner_jax.data.importers.rows import MalformedRow, NumberedRow
from nuner_jax.errors import NunerError

TFDS_PREFIX = "tfds:"
_ENTRY = re.compile(r"tfds:(?P<name>[^:]+(?::[\d*]+\.[\d*]+\.[\d*]+)?)(?::(?P<split>.+))?")
_BATCH = 1024  # rows in one read


@dataclass(frozen=True)
class TfdsSplit:
    """A split of a prepared data set.

    entry: how the user wrote it. name: a folder, or a name that is looked up in TFDS's data folders.
    """

    entry: str
    name: str
    split: str

    @classmethod
    def parse(cls, entry: str, split: str = "train") -> TfdsSplit:
        """From how it is written; `split` is the one that is meant where none is named.

        Raises:
          NunerError: it is written otherwise.
        """
        match = _ENTRY.fullmatch(entry)
        if not match:
            raise NunerError(f"{entry}: a TFDS data set is tfds:NAME_OR_FOLDER[:SPLIT]")
        return cls(entry, match["name"], match["split"] or split)

    def __str__(self) -> str:
        return self.entry

    @functools.cached_property
    def builder(self) -> Any:
        """TFDS's builder; the code of the data set is not needed.

        Raises:
          NunerError: the data set is not there.
        """
        import tensorflow_datasets as tfds

        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return tfds.builder_from_directory(self._version_folder(folder))
        if self.name.startswith(("/", ".", "~")):
            raise NunerError(f"{self.entry}: no such folder")
        try:
            return tfds.core.read_only_builder.builder_from_files(self.name)
        except Exception as error:  # it has many for what amounts to one
            raise NunerError(
                f"{self.entry}: TFDS has no prepared data set {self.name!r} in {tfds.core.constants.DATA_DIR} "
                f"(TFDS_DATA_DIR names another folder); prepare it once with `tfds build {self.name} "
                "--file_format=array_record`, or give its folder"
            ) from error

    def rows(self) -> Iterator[NumberedRow]:
        """The rows as TFDS gives them, numbered from 1.

        Raises:
          NunerError: at once, if there is no such split or its format needs TensorFlow; else where a file is damaged.
        """
        builder = self.builder
        try:
            source = builder.as_data_source(self.split)
        except NotImplementedError as error:
            raise NunerError(
                f"{self.entry}: is prepared as {builder.info.file_format.value}, which only TensorFlow reads; prepare "
                f"it with `tfds build {builder.name} --file_format=array_record --data_dir=ANOTHER_FOLDER` and name its"
                " folder"
            ) from error
        except ValueError as error:
            known = ", ".join(builder.info.splits)
            raise NunerError(f"{self.entry}: has no split {self.split!r}; it has: {known}") from error
        return self._read(source)

    def plain_rows(self) -> Iterator[NumberedRow]:
        """The rows as JSON would hold them: text for bytes, lists for arrays, and for a table its rows."""
        for number, row in self.rows():
            try:
                yield number, {key: _plain(value) for key, value in row.items()}
            except UnicodeDecodeError:
                yield number, MalformedRow("not_utf8")

    def class_names(self, key: str) -> tuple[str, ...]:
        """What the class numbers of a column stand for; () if it holds no such numbers."""
        column = dict(self.builder.info.features.items()).get(key)
        return tuple(getattr(getattr(column, "feature", None), "names", None) or ())

    def _version_folder(self, folder: Path) -> Path:
        versions = sorted(path.parent for path in folder.rglob("dataset_info.json"))
        if not versions:
            raise NunerError(f"{self.entry}: holds no data set of TFDS")
        if len(versions) > 1:
            raise NunerError(f"{self.entry}: holds several, name one of: {', '.join(map(str, versions))}")
        return versions[0]

    def _read(self, source: Any) -> Iterator[NumberedRow]:
        for start in range(0, len(source), _BATCH):
            try:
                batch = source.__getitems__(list(range(start, min(start + _BATCH, len(source)))))
            except (RuntimeError, OSError) as error:  # array_record's word for a missing or damaged file
                reason = (str(error).strip() or "no details").splitlines()[0]
                raise NunerError(
                    f"{self.entry}: cannot be read after row {start} ({type(error).__name__}: {reason})"
                ) from error
            yield from enumerate(batch, start=start + 1)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
        return _plain(value) if isinstance(value, list | bytes) else value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        columns = {key: _plain(one) for key, one in value.items()}
        if columns and all(isinstance(column, list) for column in columns.values()):
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return columns
    return value
