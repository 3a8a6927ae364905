"""The TFDS builder of record shards: the one module that needs tensorflow_datasets to be imported.

Building and reading ArrayRecord shards loads no TensorFlow, on one machine as with Apache Beam: both orders are those
of the hashed keys, so both give the same records in the same order.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import shuffle, writer
from tensorflow_datasets.proto import tf_example_pb2

from nuner_jax.data.records import Entity, Record

SplitOf = Callable[[str], tuple[str, int]]


def write_shards(
    spool: Path, folder: Path, splits: Sequence[str], split_of: SplitOf, beam_options: Any = None
) -> dict[str, int]:
    """Writes the records of `spool` as ArrayRecord shards, with TFDS's own files, below `folder`.

    `spool` holds one record as JSON per line; `split_of(text)` gives its split and a key that is
    unique, by whose hash TFDS orders the split. With `beam_options` (Beam's PipelineOptions) TFDS
    encodes, sorts and writes in Beam, whose workers must see both paths. Returns the number of
    records in each split. Raises `OSError` if the file system fails.
    """
    tfds.disable_progress_bar()
    # Above this size TFDS sorts on disk through TensorFlow's file system, which is not installed.
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    builder = NunerRecords(
        spool=spool,
        splits=splits,
        split_of=split_of,
        in_beam=beam_options is not None,
        data_dir=folder,
        file_format="array_record",
    )
    try:
        with _quiet():
            builder.download_and_prepare(
                download_dir=spool.parent / "downloads",
                download_config=tfds.download.DownloadConfig(beam_options=beam_options),
            )
    except RuntimeError as error:  # what array_record makes of a full disk
        if beam_options is not None:  # where it may be any error of a worker
            raise
        raise OSError(str(error)) from error
    return {split: builder.info.splits[split].num_examples for split in splits}


def open_shards(folder: Path, split: str) -> Any:
    """The serialised examples of a split, by number: TFDS takes several times as long to decode one as `to_record`."""
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return tfds.builder_from_directory(folder).as_data_source(split, deserialize_method=raw)


def to_record(example: bytes) -> Record:
    """The record of a serialised example of `NunerRecords`."""
    columns = tf_example_pb2.Example.FromString(example).features.feature
    entities = zip(
        columns["entities/start"].int64_list.value,
        columns["entities/end"].int64_list.value,
        columns["entities/concept"].bytes_list.value,
        columns["entities/description"].bytes_list.value,
        strict=True,
    )
    return Record(
        columns["text"].bytes_list.value[0].decode(),
        tuple(
            Entity(start, end, concept.decode(), description.decode()) for start, end, concept, description in entities
        ),
    )


class _LocalInfo(tfds.core.DatasetInfo):
    """Does not look for the data set in the bucket of the public ones, which leaves a folder in /tmp each time."""

    def initialize_from_bucket(self) -> None:
        """Does nothing."""


class NunerRecords(tfds.core.GeneratorBasedBuilder):
    """Texts with their entities: character spans, concepts and descriptions.

    The arguments are those of `write_shards`; without them a built data set can be read, which is
    how TFDS opens it by name.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Where TFDS looks for download checksums, through a package that it does not require
    # (importlib_resources); nothing is downloaded here.
    code_path = None

    def __init__(
        self,
        *,
        spool: Path | None = None,
        splits: Sequence[str] = (),
        split_of: SplitOf | None = None,
        in_beam: bool = False,
        **kwargs: Any,
    ):
        self._spool, self._splits, self._split_of, self._in_beam = spool, splits, split_of, in_beam
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "entities": tfds.features.Sequence(
                        {
                            "start": np.int32,
                            "end": np.int32,
                            "concept": tfds.features.Text(),
                            "description": tfds.features.Text(),
                        }
                    ),
                }
            ),
        )

    def _example_writer(self) -> writer.ExampleWriter:
        return _StableWriter(self.info.file_format)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        if self._in_beam:
            return {split: _beam_examples(self._spool, split, self._split_of) for split in self._splits}
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(self._spool, encoding="utf-8") as lines:
            for line in lines:
                yield from _example(line, split, self._split_of)


class _StableWriter(writer.ExampleWriter):
    """Gives equal records equal bytes: protobuf writes the columns of an example in another order in every process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes the shard `path` of (key, serialised example)."""
        return super().write(path, ((key, _in_stable_order(example)) for key, example in examples))


def _in_stable_order(example: bytes) -> bytes:
    return tf_example_pb2.Example.FromString(example).SerializeToString(deterministic=True)


def _example(line: str, split: str, split_of: SplitOf) -> list[tuple[int, dict[str, Any]]]:
    """The key and record of a line, if it is one of this split."""
    row = json.loads(line)
    own_split, key = split_of(row["text"])
    return [(key, row)] if own_split == split else []


def _beam_examples(spool: Path, split: str, split_of: SplitOf) -> Any:
    """The examples of a split as a PTransform, which reads ranges of the file in parallel."""
    import apache_beam as beam

    return beam.io.ReadFromText(str(spool)) | beam.FlatMap(_example, split, split_of)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from telling about downloads and temporary files; warnings still show."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))  # absl: lower is quieter
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
