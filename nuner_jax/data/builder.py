"""Record data sets on disk: ArrayRecord shards written and read by TFDS, without TensorFlow.

A data set is a folder:

  report.json                   fingerprint, options, what the import counted, split sizes
  nuner_records/1.0.0/…         what `tfds.data_source("nuner_records", data_dir=folder)` reads

It is built in a temporary folder beside its place and renamed when complete, so it is there wholly
or not at all. The split of a text depends on the text alone, so no text is in two splits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from nuner_jax.data.importers import SAMPLE, ImportOptions, Report, import_records, resolve_inputs
from nuner_jax.data.records import TEXT_HASHES, Record, text_hash
from nuner_jax.errors import NunerError
from nuner_jax.folders import locked, workshop, writing

FORMAT_VERSION = 2  # raise it when the same input gives other shards: it is part of every key
REPORT_FILE = "report.json"
SHARDS_FOLDER = Path("nuner_records", "1.0.0")  # TFDS: data_dir/name/version
_READ_AHEAD = 1024  # records per batched read when iterating over a split
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BuildOptions(ImportOptions):
    """How to import, and `validation_fraction`, the share of texts in the validation split.

    The share is one of hash values, so it holds on average. A tiny data set still gets at least one
    text in either split; 0 writes a train split only.
    """

    validation_fraction: float = 0.02

    def __post_init__(self) -> None:
        ImportOptions.__post_init__(self)
        if not 0 <= self.validation_fraction < 1:
            raise NunerError(
                f"validation_fraction is a share of at least 0 and below 1, not {self.validation_fraction}"
            )


class RecordSource(Sequence[Record]):
    """Random access to the records of one split; iterating reads ahead in batches."""

    def __init__(self, source: Any, to_record: Callable[[bytes], Record]):
        """Reads the serialised examples of `source`."""
        self._source, self._to_record = source, to_record

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._to_record(self._source[index % len(self)])

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Many records in one read."""
        return [self._to_record(example) for example in self._source.__getitems__(list(indices))]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), _READ_AHEAD):
            yield from self.__getitems__(range(start, min(start + _READ_AHEAD, len(self))))


def is_built(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a complete data set of this program."""
    return (Path(folder) / REPORT_FILE).is_file() and (Path(folder) / SHARDS_FOLDER).is_dir()


def read_report(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What is stored beside the shards; `NunerError` if there is no data set in `data_dir`."""
    path = Path(data_dir) / REPORT_FILE
    if not is_built(data_dir):
        raise NunerError(
            f"{data_dir}: holds no data set; make one with `python -m nuner_jax.data.build"
            f" --input=FILE --out={data_dir}`"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NunerError(f"{path}: cannot be read ({error}); build the data set again") from error


def fingerprint(data_dir: str | os.PathLike[str]) -> str:
    """The sha256 over the records and what decides their splits; it names the data set's content.

    The same input gives the same one on every machine. Raises `NunerError` as `read_report`.
    """
    return read_report(data_dir)["fingerprint"]


def splits(data_dir: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the splits; raises `NunerError` as `read_report`."""
    return tuple(read_report(data_dir)["splits"])


def open_split(data_dir: str | os.PathLike[str], split: str) -> RecordSource:
    """The records of "train" or "validation", in an order fixed by the data set.

    Raises `NunerError` if there is no data set, no such split, or a file is missing or cut.
    """
    stored = read_report(data_dir)
    if split not in stored["splits"]:
        known = ", ".join(stored["splits"])
        raise NunerError(f"{data_dir}: has no split {split!r}; it has: {known}")
    from nuner_jax.data.tfds_records import open_shards, to_record

    _check_files(Path(data_dir), stored["files"])
    return RecordSource(open_shards(Path(data_dir) / SHARDS_FOLDER, split), to_record)


def build(
    records: Iterable[Record],
    out_dir: str | os.PathLike[str],
    *,
    validation_fraction: float = 0.02,
    overwrite: bool = False,
    report: Report | None = None,
    provenance: dict[str, Any] | None = None,
    beam_options: Any = None,
) -> bool:
    """Writes `records`, each text once, as the data set `out_dir`; False if it was there already.

    `records` is read once, as a stream; whatever it raises leaves `out_dir` as it was. `report`, if
    it is what the stream fills, and `provenance` are stored in `report.json`. TFDS sorts each split
    in memory: about 1 kB per record. With `beam_options` (Beam's PipelineOptions) TFDS encodes, sorts
    and writes in Apache Beam, with the same result; its workers must see the folder of `out_dir`.

    Raises `NunerError` if there are fewer records than splits, a text comes twice, `out_dir` cannot
    be written, or it holds something else: another data set needs `overwrite`, and what is no data
    set is never replaced.
    """
    from nuner_jax.data.tfds_records import write_shards

    out = Path(out_dir)
    _check_place(out)
    with writing(out), workshop(out) as temporary:
        spool = temporary / "records.jsonl"
        splitter, digest, count = _spool(records, spool, validation_fraction)
        if is_built(out) and not overwrite:
            return _same_or_error(out, digest)
        finished = temporary / "data"
        sizes = write_shards(spool, finished, splitter.splits, splitter, beam_options)
        content = {
            "fingerprint": digest,
            "format_version": FORMAT_VERSION,
            "records": count,
            "splits": sizes,
            "files": _file_sizes(finished),
            "validation_fraction": validation_fraction,
            **(provenance or {}),
            "report": report.as_dict() if report else None,
        }
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (finished / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        return _put_in_place(finished, out, digest, overwrite)


def build_inputs(
    inputs: Sequence[str],
    out_dir: str | os.PathLike[str],
    options: BuildOptions | None = None,
    *,
    overwrite: bool = False,
) -> bool:
    """Imports files (or "sample", or `hf:` names) and builds `out_dir`; False if it was up to date.

    A data set made from the same bytes with the same options is recognised without reading a row,
    and made again only with `overwrite`.
    Raises `NunerError` as `build`, and for every kind of bad input.
    """
    options = options or BuildOptions()
    paths = resolve_inputs(inputs)
    key = input_key(paths, options)
    if not overwrite and is_built(out_dir) and read_report(out_dir).get("input_key") == key:
        return False
    report = Report()
    return build(
        import_records(paths, report, options),
        out_dir,
        validation_fraction=options.validation_fraction,
        overwrite=overwrite,
        report=report,
        provenance={
            "inputs": list(inputs),
            "input_key": key,
            "options": dataclasses.asdict(options),
        },
    )


def ensure_built(path_or_input: str | Sequence[str], cache_dir: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of a data set, which is built first if need be; for the trainer.

    `path_or_input` is the folder of a built data set, which is returned as it is, or one or several
    inputs of `build_inputs`. These are built once below `cache_dir`, under a name with the key of
    their bytes and options; processes that race for it wait for the first, and if they share no
    locks, the later ones discard their work. `options` are the fields of `BuildOptions`.

    Raises `NunerError` as `build_inputs`, and for an unknown option.
    """
    inputs = [path_or_input] if isinstance(path_or_input, str | os.PathLike) else path_or_input
    inputs = [os.path.expanduser(one) for one in inputs]
    if len(inputs) == 1 and is_built(inputs[0]):
        return Path(inputs[0])
    known = [field.name for field in dataclasses.fields(BuildOptions)]
    for name in options:
        if name not in known:
            raise NunerError(f"unknown data option {name!r}; known are: {', '.join(known)}")
    build_options = BuildOptions(**options)
    paths = resolve_inputs(inputs)
    names = [SAMPLE if one == SAMPLE else Path(one).name.split(".")[0] for one in inputs]
    name = "+".join(names)[:60].replace(":", "-")
    target = Path(cache_dir) / f"{name}-{input_key(paths, build_options)[:12]}"
    if not is_built(target):
        with locked(target):
            if build_inputs(inputs, target, build_options):
                logging.info("built %s from %s", target, ", ".join(inputs))
    return target


def input_key(paths: Sequence[Path], options: BuildOptions) -> str:
    """The sha256 over the bytes of the input files, the options, and this module's version."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, dataclasses.asdict(options)]).encode())
    for path in paths:
        try:
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            with open(path, "rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise NunerError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Splitter:
    """The split of a text: validation where its hash lies below `bound`."""

    bound: int

    def __call__(self, text: str) -> tuple[str, int]:
        key = text_hash(text)
        return ("validation" if key < self.bound else "train"), key

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation") if self.bound else ("train",)


def _spool(records: Iterable[Record], spool: Path, validation_fraction: float) -> tuple[_Splitter, str, int]:
    """Writes the records to one file and returns how to split them, their fingerprint and number.

    So the input is parsed once although TFDS asks for one split after the other, and nothing is
    written for good before the last row is known to be sound.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {float(validation_fraction)!r}\n".encode())
    hashes: set[int] = set()
    with open(spool, "wb") as file:
        for count, record in enumerate(records, start=1):
            hashes.add(text_hash(record.text))
            if len(hashes) < count:
                raise NunerError(f"record {count:,}: this text comes twice: {record.text[:60]!r}")
            line = json.dumps(record.as_dict(), ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            file.write(line)
    bound = int(validation_fraction * TEXT_HASHES)
    if len(hashes) < (2 if bound else 1):
        raise NunerError(
            f"{len(hashes)} records are too few for the splits: at least two texts are needed for"
            " train and validation (with validation_fraction=0, one for train)"
        )
    if bound:  # at least one text on either side
        bound = min(max(bound, min(hashes) + 1), max(hashes))
    return _Splitter(bound), digest.hexdigest(), len(hashes)


def _file_sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file of TFDS, by its path below `folder`."""
    files = sorted(path for path in (folder / SHARDS_FOLDER).iterdir() if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_files(folder: Path, files: dict[str, int]) -> None:
    """Finds what a half copied data set lacks, which array_record would tell only when reading."""
    for name, size in files.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there:,} of its {size:,} bytes"
            raise NunerError(f"{path}: {state}; copy or build the data set again")


def _check_place(out: Path) -> None:
    if out.exists() and not is_built(out) and (not out.is_dir() or any(out.iterdir())):
        raise NunerError(f"{out}: exists and is no data set of this program; it is left alone, choose another")


def _same_or_error(out: Path, digest: str) -> bool:
    there = fingerprint(out)
    if there != digest:
        raise NunerError(
            f"{out}: holds another data set (fingerprint {there[:12]}, the new one is"
            f" {digest[:12]}); choose another folder, or replace it with --overwrite"
        )
    return False


def _put_in_place(finished: Path, out: Path, digest: str, overwrite: bool) -> bool:
    """Renames the finished folder to `out`; a racing builder's equal data set is left in place."""
    if overwrite and is_built(out):
        retired = finished.parent / "retired"  # deleted with the workshop
        out.rename(retired)
        try:
            finished.rename(out)
        except OSError:
            retired.rename(out)
            raise
        return True
    try:
        finished.rename(out)
    except OSError:
        if is_built(out):
            return _same_or_error(out, digest)
        raise
    return True
