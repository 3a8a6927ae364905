"""The stage `align` in Apache Beam: from one or many journals to the files that one machine writes of one.

Workers read the journals, each by itself, and align batches of units with `align_unit`. The records come in the order
of the whole selection, whichever journal they stand in: that of their texts' rank.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate import alignment
from nuner_jax.annotate.alignment import Counts, UnitOptions, align_unit, concept_names
from nuner_jax.annotate.beam import files
from nuner_jax.annotate.beam.runner import Run
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.selection.duplicates import rank
from nuner_jax.annotate.units import Completed
from nuner_jax.annotate.workdir import ALIGNED_FILE, COUNTS_FILE, REJECTED_FILE
from nuner_jax.data.concepts import plural_forms
from nuner_jax.errors import NunerError

_BATCH = 256  # units that are handed to a worker together
_FILES = {"aligned": ALIGNED_FILE, "rejected": REJECTED_FILE}


def align(config: ConfigDict, journals: Sequence[str], workdir: str, run: Run, say: Callable[[str], None]) -> None:
    """Aligns every answered unit of the journals; writes the files that `nuner_jax.annotate.alignment` writes.

    Args:
      config: its `align` and `build` count, and the seed, by which the selection was ordered.
      journals: files that all workers see, or in a bucket, to which nobody writes any more; globs too.
      workdir: where the files go; earlier ones are replaced when all is done. May be in a bucket.
      run: runs what the function that it gets adds to a pipeline.
      say: gets the summary.

    Raises:
      NunerError: a journal is missing or damaged, or a unit stands in two of them.
    """
    paths = [path for pattern in journals for path in files.matching(pattern)]
    options = UnitOptions.of(config)
    with files.scratch(workdir) as folder:
        run(functools.partial(_add, config=config, paths=paths, options=options, folder=folder))
        (twice,) = files.read_json(files.join(folder, "twice.json"))
        if twice:
            raise NunerError(f"{', '.join(journals)}: unit {twice[0]} stands in several; give each unit's journal once")
        (counts,) = files.read_json(files.join(folder, "counts.json"))
        for singulars in files.read_json(files.join(folder, "singulars.json")):
            options = dataclasses.replace(options, singulars=singulars)
        digest = hashlib.sha256()
        for line in files.lines_in_order(folder, "aligned"):
            digest.update(line)
        content = {
            **_counts_of(counts).as_dict(),
            "options": alignment.options_dict(config, options),
            "selection": ", ".join(sorted(set(files.read_json(files.join(folder, "selections.json"))))),
            "sha256": digest.hexdigest(),
        }
        files.remove(files.join(workdir, COUNTS_FILE))  # it vouches for the two others, so it comes last
        for name, target in _FILES.items():
            with files.replacing(files.join(workdir, target)) as whole:
                for part in files.parts_in_order(folder, name):  # gzip files one after the other are a gzip file
                    with files.open_binary(part) as file:
                        shutil.copyfileobj(file, whole)
        files.write_json(content, files.join(workdir, COUNTS_FILE))
    for line in alignment.summary_lines(content):
        say(line)


# --- In the pipeline ---------------------------------------------------------------------------


def _add(pipeline: Any, *, config: ConfigDict, paths: Sequence[str], options: UnitOptions, folder: str) -> None:
    """Adds the steps from the journals to records and rejected lines, in order, and their counts."""
    import apache_beam as beam

    read = (
        pipeline
        | "journals" >> beam.Create(list(paths))
        | "spread journals" >> beam.Reshuffle()
        | "read" >> beam.FlatMap(_read).with_outputs("selections", main="batches")
    )
    files.collect(read.selections, files.join(folder, "selections.json"))
    batches = read.batches | "spread units" >> beam.Reshuffle()
    singulars = pipeline | "no plurals" >> beam.Create([])
    if "plural" in config.align.normalise:
        singulars = (
            batches
            | "concepts" >> beam.FlatMap(_names, options)
            | "vocabulary" >> beam.Distinct()
            | "all concepts" >> beam.combiners.ToList()
            | "plurals" >> beam.Map(_plurals)
        )
    files.collect(singulars, files.join(folder, "singulars.json"))
    aligned = batches | "align" >> beam.FlatMap(
        _align, options, config.seed, beam.pvalue.AsSingleton(singulars, default_value={})
    ).with_outputs("rejected", "counts", "units", main="aligned")
    files.write_in_order(aligned.aligned, folder, "aligned")
    files.write_in_order(aligned.rejected, folder, "rejected")
    counts = aligned.counts | "sum" >> beam.CombineGlobally(_sum) | "as JSON" >> beam.Map(_as_json)
    files.collect(counts, files.join(folder, "counts.json"))
    twice = (
        aligned.units
        | "count units" >> beam.combiners.Count.PerElement()
        | "more than once" >> beam.FlatMap(_twice)
        | "any" >> beam.combiners.Top.Smallest(1)
    )
    files.collect(twice, files.join(folder, "twice.json"))


def _read(path: str) -> Iterator[Any]:
    """Batches of the units of a journal's selection; then, tagged, the fingerprint of that selection."""
    from apache_beam.pvalue import TaggedOutput

    if files.is_remote(path) and files.exists(f"{path}-wal"):
        raise NunerError(f"{path}-wal: {path} is not whole without it; copy a journal once no process has it open")
    with files.local_copy(path) as local, Journal.open(Path(local), read_only=True) as journal:
        units = journal.completions()
        while batch := list(itertools.islice(units, _BATCH)):
            yield batch
        yield TaggedOutput("selections", journal.fingerprint() or "")


def _names(batch: Sequence[Completed], options: UnitOptions) -> set[str]:
    return {name for completed in batch for name in concept_names(completed, options)}


def _plurals(names: Iterable[str]) -> dict[str, str]:
    return plural_forms(set(names))


def _align(batch: Sequence[Completed], options: UnitOptions, seed: int, singulars: Mapping[str, str]) -> Iterator[Any]:
    """The lines of a batch's records with their place in the order; the rest tagged."""
    from apache_beam.pvalue import TaggedOutput

    options = dataclasses.replace(options, singulars=singulars)
    counts = Counts()
    for completed in batch:
        unit = align_unit(completed, options)
        counts.add(unit)
        place = rank(seed, completed.text.encode())
        if unit.record:
            yield place, _line(unit.row())
        for number, row in enumerate(unit.rejected_rows()):
            yield TaggedOutput("rejected", (place + number.to_bytes(4, "big"), _line(row)))
        yield TaggedOutput("units", completed.id)
    yield TaggedOutput("counts", counts)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _sum(parts: Iterable[Counts]) -> Counts:
    total = Counts()
    for part in parts:
        total.update(part)
    return total


def _twice(unit: tuple[str, int]) -> list[str]:
    return [unit[0]] if unit[1] > 1 else []


def _as_json(counts: Counts) -> dict[str, list]:
    return {field.name: list(getattr(counts, field.name).items()) for field in dataclasses.fields(counts)}


def _counts_of(stored: Mapping[str, list]) -> Counts:
    return Counts(**{name: Counter(dict(pairs)) for name, pairs in stored.items()})
