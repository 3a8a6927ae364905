"""The stage `select` in Apache Beam: the same units in the same order as on one machine.

Workers read the files, each by itself, split and filter their texts, and find repetitions by grouping: equal texts by
their rank, near duplicates by the bands that they share. What may be in the sample is written in rank order; the
launching machine reads that once, from its beginning, and cuts the sample as one machine would.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nuner_jax.annotate.beam import files
from nuner_jax.annotate.beam.runner import Run
from nuner_jax.annotate.selection import select as one_machine
from nuner_jax.annotate.selection.duplicates import bands, near_in_group, rank, signature
from nuner_jax.annotate.selection.filters import UnitFilter, check_settings, unit_splitter
from nuner_jax.annotate.selection.sources import no_text, resolve
from nuner_jax.annotate.units import Unit
from nuner_jax.annotate.workdir import SELECTION_FILE, SELECTION_FOLDER, UNITS_FILE
from nuner_jax.data.importers import SAMPLE
from nuner_jax.data.importers.report import PLACES_KEPT, Tally
from nuner_jax.data.importers.rows import MalformedRow

_PREFIX_BYTES = 2  # of ranks that are counted together to find how far the sample may reach

# Of the rows between the steps: a unit read is (rank, ((source, file, row, place, text), how often the text came)).


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A file, or a TFDS or hub data set, that one worker reads: its place among all, and its path.

    source: the number of the entry of config.source.paths. number: of the file among those of the entry.
    """

    source: int
    number: int
    path: str


def select(config: ConfigDict, workdir: str, run: Run, say: Callable[[str], None], *, shards: int = 1) -> None:
    """Selects the units of config.source into `workdir`, as `nuner_jax.annotate.selection.select` does on one machine.

    Args:
      config: of annotation; only `source` and `seed` are looked at. Its paths may be in a bucket (gs://…, globs too).
      workdir: gets selection/; with several shards, shard-I-of-N/selection/ for each of N machines. May be in a bucket.
      run: runs what the function that it gets adds to a pipeline.
      say: takes lines for the user.
      shards: into how many parts the selection is divided.

    Raises:
      NunerError: as the stage on one machine.
    """
    began = time.monotonic()
    check_settings(config.source)
    limit = one_machine.units_held(config.source)
    parts = parts_of(config.source)
    with files.scratch(workdir) as folder:
        while True:
            run(functools.partial(_add, config=config, parts=parts, limit=limit, folder=folder))
            candidates = _Candidates(config, folder)
            if not candidates.too_few:
                break
            limit *= 2
            say(f"selection    too many near duplicates: reading again, and holding {limit:,}")
        for shard in range(shards):
            own, target, name = config, files.join(workdir, SELECTION_FOLDER), ""
            if shards > 1:
                own, name = config.copy_and_resolve_references(), f"shard-{shard}-of-{shards}"
                own.source.shard, target = f"{shard}/{shards}", files.join(workdir, name, SELECTION_FOLDER)
            for line in one_machine.summary_lines(candidates.write(own, target, began)):
                say(f"{name} {line}" if name else line)


def parts_of(source: ConfigDict) -> list[Part]:
    """What there is to read, in the order in which one machine reads it.

    Raises:
      NunerError: a file is missing, or a glob matches none.
    """
    parts = []
    for number, entry in enumerate(dict.fromkeys(source.paths)):
        if files.is_remote(entry):
            paths = files.matching(entry)
        else:
            (one,) = resolve(_only(source, entry))
            # The sample lies in the package, on every machine.
            paths = [entry] if entry == SAMPLE else [str(path.absolute()) for path in one.files] or [entry]
        parts += [Part(number, at, path) for at, path in enumerate(paths)]
    return parts


# --- In the pipeline ---------------------------------------------------------------------------


def _add(pipeline: Any, *, config: ConfigDict, parts: Sequence[Part], limit: int | None, folder: str) -> None:
    """Adds the steps from the parts to the candidates, in rank order, and the reports of the parts."""
    import apache_beam as beam

    source = config.source.to_dict()
    read = (
        pipeline
        | "parts" >> beam.Create(list(parts))
        | "spread" >> beam.Reshuffle()
        | "read" >> beam.FlatMap(_read, source, config.seed).with_outputs("reports", main="units")
    )
    files.collect(read.reports, files.join(folder, "reports.json"))
    units = read.units | "equal texts" >> beam.CombinePerKey(_first)
    if limit is not None:
        counts = units | "prefixes" >> beam.Map(_prefix) | "count" >> beam.combiners.Count.PerElement()
        reach = counts | "counts" >> beam.combiners.ToList() | "reach" >> beam.Map(_reach, limit)
        files.collect(reach, files.join(folder, "reach.json"))
        units = units | "within reach" >> beam.Filter(_within, beam.pvalue.AsSingleton(reach))
    flags = []
    if config.source.duplicates == "near":
        threshold = config.source.near_threshold
        near = (
            units
            | "bands" >> beam.FlatMap(_banded, threshold)
            | "share a band" >> beam.GroupByKey()
            | "near" >> beam.FlatMap(_near, threshold)
        )
        flags = [near]
    merged = (units, *flags) | "with flags" >> beam.CoGroupByKey()
    files.write_in_order(merged | "candidates" >> beam.Map(_candidate), folder, "candidates")


def _read(part: Part, source: Mapping[str, Any], seed: int) -> Iterator[Any]:
    """The units of a part that pass the filters; then, tagged, the report of what was read."""
    from apache_beam.pvalue import TaggedOutput

    source = ConfigDict(source)
    split, reason_of = unit_splitter(source.unit, source.language), UnitFilter(source).reason
    counts, malformed, empty = Counter(), Tally(), True
    with files.local_copy(part.path) as path:
        (one,) = resolve(_only(source, path))
        for row, (place, text) in enumerate(one.open()):
            if isinstance(text, MalformedRow):
                malformed.add(text.kind, place)
                continue
            empty = empty and not text.strip()
            units = split(text)
            counts.update(texts=1, units=len(units))
            for unit in units:
                reason = reason_of(unit)
                if reason is None:
                    yield rank(seed, unit.encode()), ((part.source, part.number, row, place, unit), 1)
                else:
                    counts[reason] += 1
        identity = one.identity()
    report = {"place": (part.source, part.number), "counts": counts, "empty": empty, "identity": identity}
    yield TaggedOutput("reports", {**report, "malformed": malformed.counts, "places": malformed.places})


def _first(values: Iterable[tuple[tuple, int]]) -> tuple[tuple, int]:
    """Of equal texts the one that is read first, and how many there are."""
    firsts, times = zip(*values, strict=True)
    return min(firsts), sum(times)


def _prefix(unit: tuple[bytes, Any]) -> int:
    return int.from_bytes(unit[0][:_PREFIX_BYTES], "big")


def _reach(counts: Iterable[tuple[int, int]], limit: int) -> dict[str, Any]:
    """The prefix up to which there are at least `limit` units, and whether there are units beyond."""
    counts = sorted(counts)
    reached = 0
    for prefix, count in counts:
        reached += count
        if reached >= limit:
            return {"prefix": prefix, "beyond": prefix < counts[-1][0]}
    return {"prefix": 1 << 8 * _PREFIX_BYTES, "beyond": False}


def _within(unit: tuple[bytes, Any], reach: Mapping[str, Any]) -> bool:
    return _prefix(unit) <= reach["prefix"]


def _banded(unit: tuple[bytes, Any], threshold: float) -> Iterator[tuple[bytes, tuple[bytes, str]]]:
    place, ((*_, text), _) = unit
    # The text goes along, not its signature: 512 bytes are more than most sentences have.
    return ((band, (place, text)) for band in bands(signature(text), threshold))


def _near(group: tuple[bytes, Iterable[tuple[bytes, str]]], threshold: float) -> Iterator[tuple[bytes, bool]]:
    members = sorted(group[1])
    if len(members) == 1:
        return
    near_N = near_in_group(np.stack([signature(text) for _, text in members]), threshold)
    yield from ((members[at][0], True) for at in np.flatnonzero(near_N))


def _candidate(merged: tuple[bytes, tuple]) -> tuple[bytes, bytes]:
    place, (units, *flags) = merged
    (((*_, source, text), times),) = units
    row = {"source": source, "text": text, "repeats": times - 1, "near": any(map(any, flags))}
    return place, json.dumps(row, ensure_ascii=False).encode() + b"\n"


# --- On the launching machine ------------------------------------------------------------------


class _Candidates:
    """What the pipeline wrote; it is read as a stream, once to count and once for every shard.

    too_few: near duplicates leave fewer units than are wanted, and there are more beyond the reach.
    """

    def __init__(self, config: ConfigDict, folder: str):
        """Raises `NunerError` if a source holds no text, or no unit is left."""
        self._folder = folder
        reports = sorted(files.read_json(files.join(folder, "reports.json")), key=lambda report: report["place"])
        _check_not_empty(list(dict.fromkeys(config.source.paths)), reports)
        self._inputs = [identity for report in reports for identity in report["identity"]]
        self._malformed = _merged(reports)
        self._counts = one_machine.no_counts()
        self._counts["malformed"] = self._malformed.total()
        for key, count in itertools.chain(*(report["counts"].items() for report in reports)):
            self._counts[key] += count
        chosen = self._count(config.source)
        self.too_few = config.source.size is not None and chosen < config.source.size and self._beyond()

    def _count(self, source: ConfigDict) -> int:
        """How many units are chosen; counts what is not."""
        chosen = repeats = 0
        self._reached = 0
        for row in self._rows():
            self._reached += 1
            repeats += row["repeats"]
            chosen += not row["near"]
            if chosen == source.size:
                break
        one_machine.count_left_out(self._counts, source, reached=self._reached, chosen=chosen, repeats=repeats)
        return chosen

    def _beyond(self) -> bool:
        return files.read_json(files.join(self._folder, "reach.json"))[0]["beyond"]

    def _rows(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, files.lines_in_order(self._folder, "candidates"))

    def write(self, config: ConfigDict, target: str, began: float) -> dict[str, Any]:
        """Writes the units of the config's shard, and what selection.json says of them, which is returned.

        Raises:
          NunerError: the shard has none.
        """
        chosen = (row for row in itertools.islice(self._rows(), self._reached) if not row["near"])
        units = (Unit.of(row["text"], row["source"]) for row in chosen)
        content = {
            "counts": dict(self._counts),
            "malformed": self._malformed.as_dict(),
            **one_machine.provenance(config, self._inputs),
        }
        if not files.is_remote(target):
            return one_machine.write_selection(Path(target), units, config.source.shard, content, began)
        with tempfile.TemporaryDirectory(prefix="nuner_jax-") as temporary:
            local = Path(temporary) / SELECTION_FOLDER
            content = one_machine.write_selection(local, units, config.source.shard, content, began)
            for name in (UNITS_FILE, SELECTION_FILE):
                files.upload(local / name, files.join(target, name))
        return content


def _merged(reports: Sequence[Mapping[str, Any]]) -> Tally:
    """The malformed rows of all parts, as one reading them in order counts them."""
    merged = Tally()
    for report in reports:
        merged.counts.update(report["malformed"])
        for kind, places in report["places"].items():
            known = merged.places.setdefault(kind, [])
            known += [place for place in places if place not in known][: PLACES_KEPT - len(known)]
    return merged


def _check_not_empty(entries: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> None:
    for number, entry in enumerate(entries):
        own = [report for report in reports if report["place"][0] == number]
        if all(report["empty"] for report in own):
            raise no_text(entry, _merged(own))


def _only(source: ConfigDict, entry: str) -> ConfigDict:
    """The same with one entry as its paths."""
    return ConfigDict({**source.to_dict(), "paths": (entry,)})
