"""The stage `select`: from sources to the units that are annotated, in their random order.

    FOLDER/units.jsonl.gz    a line {"id", "text", "source"} for each unit, in the order in which they are asked for
    FOLDER/selection.json    fingerprint, counts, malformed rows, and what the selection was made of

The order of units is that of a hash of seed and text. So the sample is random, a sample of N begins every larger one,
and neither the order nor the division of the files matters.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nuner_jax.annotate.selection.duplicates import RANK_BYTES, near_duplicates, rank
from nuner_jax.annotate.selection.filters import REASONS, UnitFilter, check_settings, unit_splitter
from nuner_jax.annotate.selection.sources import Source, read_texts, resolve
from nuner_jax.annotate.units import Unit
from nuner_jax.annotate.workdir import SELECTION_FILE, UNITS_FILE
from nuner_jax.data.importers.report import Tally, kind_lines
from nuner_jax.data.importers.rows import text_lines
from nuner_jax.errors import NunerError
from nuner_jax.folders import workshop, writing
from nuner_jax.writers import duration

LEFT_OUT = (*REASONS, "duplicate", "near_duplicate", "beyond_sample", "other_shard")
"""Every unit that is read is selected or left out for one of these."""

_FORMAT_VERSION = 2  # raise it when the same input gives another selection
_SPARE, _SPARE_UNITS = 1.2, 1000  # units held for one of the sample, since some turn out as near duplicates
_OVERFLOW = 1.5  # times the limit, at which the largest ranks are let go: sorting now and then beats a heap
_PROGRESS_S = 30.0
_GZIP_LEVEL = 3  # as quick as everything else here

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Selection:
    """What `select` made.

    path: the file of units. fingerprint: sha256 over their ids in order. counts: "texts" that were read, their
    "malformed" rows, the "units" in them, each of `LEFT_OUT`, and "selected". reused: it was there already.
    """

    path: Path
    fingerprint: str
    counts: dict[str, int]
    reused: bool


def select(config: ConfigDict, folder: Path, say: Say) -> Selection:
    """Selects the units of config.source, or finds that `folder` holds just these.

    Memory: with config.source.size, at most 1.8 times as many units are held as are wanted (and 1,500); without, all
    that pass the filters. One takes about 160 bytes and its text in UTF-8; the search for near duplicates takes 112
    bytes more, and about 1 kB for one that may be or have a near duplicate.

    Equal texts are one unit, whatever config.source.duplicates says: nobody wants to pay for an answer twice.

    Args:
      config: of annotation; only `source` and `seed` are looked at.
      folder: made if need be; both files are written wholly or not at all.
      say: takes lines for the user.

    Raises:
      NunerError: bad input, see `check_settings` and `sources.read_texts`; no unit is left; `folder` cannot be written.
    """
    began = time.monotonic()
    check_settings(config.source)
    sources = resolve(config.source)
    made_of = provenance(config, [identity for source in sources for identity in source.identity()])
    stored = _stored(folder)
    if stored is not None and all(stored.get(key) == value for key, value in made_of.items()):
        say(f"selection    {stored['counts']['selected']:,} units: up to date")
        return Selection(folder / UNITS_FILE, stored["fingerprint"], stored["counts"], reused=True)
    units, counts, malformed = _choose(config, sources, say)
    content = {"counts": counts, "malformed": malformed.as_dict(), **made_of}
    content = write_selection(folder, units, config.source.shard, content, began)
    for line in summary_lines(content):
        say(line)
    return Selection(folder / UNITS_FILE, content["fingerprint"], counts, reused=False)


def read_units(path: Path) -> Iterator[Unit]:
    """Yields the units of a selection in order.

    Raises:
      NunerError: the file is missing or damaged.
    """
    for number, line in text_lines(path):
        try:
            yield Unit(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise NunerError(f"{path}:{number}: is no line of a selection; delete the file and select again") from error


# --- Rules that the stage in Beam has, too -----------------------------------------------------


def provenance(config: ConfigDict, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What decides a selection, as selection.json holds it; `inputs`: the identities of what is read."""
    return {
        "version": _FORMAT_VERSION,
        "source": json.loads(json.dumps(config.source.to_dict())),  # tuples become the lists that a file gives back
        "seed": config.seed,
        "inputs": list(inputs),
    }


def units_held(source: ConfigDict) -> int | None:
    """How many units of smallest rank are held for the sample, at first; None: all."""
    if source.size is None or source.duplicates != "near":
        return source.size
    return int(_SPARE * source.size) + _SPARE_UNITS


def no_counts() -> dict[str, int]:
    """The counts of selection.json, all 0."""
    return dict.fromkeys(("texts", "malformed", "units", *LEFT_OUT, "selected"), 0)


def count_left_out(counts: dict[str, int], source: ConfigDict, *, reached: int, chosen: int, repeats: int) -> None:
    """Counts what was left out of the ranked units: repetitions up to the last one chosen, and all beyond it.

    Args:
      counts: has those of units and of `REASONS`; gets the others.
      source: config.source, for the error.
      reached: different texts up to the last unit chosen, or all if they were too few.
      chosen: those of them that are no near duplicates.
      repeats: how often their texts came again.

    Raises:
      NunerError: no unit is chosen.
    """
    counts["near_duplicate"], counts["duplicate"] = reached - chosen, repeats
    offered = counts["units"] - sum(counts[reason] for reason in REASONS)
    counts["beyond_sample"] = offered - reached - repeats
    if not chosen:
        reasons = ", ".join(f"{reason} {counts[reason]:,}" for reason in LEFT_OUT if counts[reason])
        raise NunerError(f"{', '.join(source.paths)}: no unit is left ({reasons}); see config.source")


# --- Reading and choosing ----------------------------------------------------------------------


class _Pool:
    """The units of smallest rank among those offered, each text once.

    units: rank → source and text, as UTF-8 with a NUL between. repeats: how often a text came again. beyond: whether
    units were let go because there are more than the limit.
    """

    def __init__(self, seed: int, limit: int | None):
        self._seed, self._limit = seed, limit
        self._bound = b"\xff" * RANK_BYTES
        self.units: dict[bytes, bytes] = {}
        self.repeats: Counter[bytes] = Counter()
        self.beyond = False

    def offer(self, text: str, source: str) -> None:
        encoded = text.encode()
        place = rank(self._seed, encoded)
        if place > self._bound:
            return
        if place in self.units:
            self.repeats[place] += 1
            return
        self.units[place] = source.encode() + b"\0" + encoded
        if self._limit is not None and len(self.units) >= _OVERFLOW * self._limit:
            self._let_go()

    def ranked(self) -> list[bytes]:
        """The ranks of the units, ascending."""
        if self._limit is not None and len(self.units) > self._limit:
            self._let_go()
        return sorted(self.units)

    def _let_go(self) -> None:
        """Keeps the smallest ranks; whatever lies beyond the largest of them can never come back."""
        kept = sorted(self.units)[: self._limit]
        self.units = {place: self.units[place] for place in kept}
        self.repeats = Counter({place: times for place, times in self.repeats.items() if place in self.units})
        self._bound, self.beyond = kept[-1], True


class _Texts(Sequence[str]):
    """The texts of a pool in rank order, decoded when they are looked at."""

    def __init__(self, pool: _Pool, ranked: list[bytes]):
        self._pool, self._ranked = pool, ranked

    def __len__(self) -> int:
        return len(self._ranked)

    def __getitem__(self, index: int) -> str:
        return self._pool.units[self._ranked[index]].partition(b"\0")[2].decode()


def _choose(config: ConfigDict, sources: Sequence[Source], say: Say) -> tuple[Iterator[Unit], dict[str, int], Tally]:
    """The units of the sample, the counts and the malformed rows; reads again if near duplicates leave too few."""
    size, near_too = config.source.size, config.source.duplicates == "near"
    limit = units_held(config.source)
    while True:
        pool = _Pool(config.seed, limit)
        counts, malformed = _fill(pool, config.source, sources, say)
        ranked = pool.ranked()
        near = np.zeros(len(ranked), bool)
        if near_too:
            say(f"selection    looking for near duplicates among {len(ranked):,} units")
            near = near_duplicates(_Texts(pool, ranked), config.source.near_threshold)
        chosen = np.flatnonzero(~near)[:size]
        if not pool.beyond or len(chosen) == size:
            break
        limit *= 2
        say(
            f"selection    without near duplicates, {len(chosen):,} of the {size:,} units are left: reading again, and "
            f"holding {limit:,}"
        )
    reached = int(chosen[-1]) + 1 if len(chosen) == size else len(ranked)
    repeats = sum(pool.repeats[place] for place in itertools.islice(ranked, reached)) if pool.repeats else 0
    count_left_out(counts, config.source, reached=reached, chosen=len(chosen), repeats=repeats)
    return (_unit(pool.units[ranked[at]]) for at in chosen), counts, malformed


def _fill(pool: _Pool, source: ConfigDict, sources: Sequence[Source], say: Say) -> tuple[dict[str, int], Tally]:
    """Offers every unit that passes the filters; returns the counts, as far as they are known, and malformed rows."""
    malformed = Tally()
    split = unit_splitter(source.unit, source.language)
    reason_of = UnitFilter(source).reason
    counts = no_counts()
    last = time.monotonic()
    for text, place in read_texts(sources, malformed):
        counts["texts"] += 1
        units = split(text)
        counts["units"] += len(units)
        for unit in units:
            reason = reason_of(unit)
            if reason is None:
                pool.offer(unit, place)
            else:
                counts[reason] += 1
        if counts["texts"] % 4096 == 0 and time.monotonic() - last > _PROGRESS_S:
            last = time.monotonic()
            say(f"selection    {counts['units']:,} units in {counts['texts']:,} texts read")
    counts["malformed"] = malformed.total()
    return counts, malformed


def _unit(held: bytes) -> Unit:
    source, _, text = held.partition(b"\0")
    return Unit.of(text.decode(), source.decode())


# --- The folder --------------------------------------------------------------------------------


def _stored(folder: Path) -> dict[str, Any] | None:
    """What is stored of a whole selection; None if there is none."""
    if not (folder / UNITS_FILE).is_file():
        return None
    try:
        return json.loads((folder / SELECTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_selection(
    folder: Path, units: Iterator[Unit], shard: str, content: dict[str, Any], began: float
) -> dict[str, Any]:
    """Writes the units of the shard and all about them; returns what is in selection.json.

    Both files are complete before either is put in place. selection.json vouches for the units, so it is the last.
    """
    counts, digest = content["counts"], hashlib.sha256()
    part, parts = map(int, shard.split("/"))
    with writing(folder), workshop(folder) as temporary:
        with _unit_file(temporary / UNITS_FILE) as write:
            for unit in units:
                if int(unit.id[:8], 16) % parts != part:
                    counts["other_shard"] += 1
                    continue
                counts["selected"] += 1
                digest.update(f"{unit.id}\n".encode())
                write(unit)
        if not counts["selected"]:
            raise NunerError(f"config.source.shard = {shard}: none of the {counts['other_shard']:,} units is in it")
        content = {"fingerprint": digest.hexdigest(), **content, "seconds": time.monotonic() - began}
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (temporary / SELECTION_FILE).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        (folder / SELECTION_FILE).unlink(missing_ok=True)
        for name in (UNITS_FILE, SELECTION_FILE):
            os.replace(temporary / name, folder / name)
    return content


@contextlib.contextmanager
def _unit_file(path: Path) -> Iterator[Callable[[Unit], None]]:
    """Gives the function that writes a unit; equal units make equal bytes."""
    quoted = json.JSONEncoder(ensure_ascii=False).encode  # of one string: three times as fast as of the row

    def write(unit: Unit) -> None:
        lines.write(f'{{"id": "{unit.id}", "text": {quoted(unit.text)}, "source": {quoted(unit.source)}}}\n')

    with (
        open(path, "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=_GZIP_LEVEL, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as lines,
    ):
        yield write


def summary_lines(content: dict[str, Any]) -> Iterator[str]:
    """For a person: what selection.json says."""
    counts = content["counts"]
    yield (
        f"selection    {counts['selected']:,} of {counts['units']:,} units in {counts['texts']:,} texts, "
        f"{duration(content['seconds'])}"
    )
    if left_out := [f"{reason} {counts[reason]:,}" for reason in LEFT_OUT if counts[reason]]:
        yield f"      left out: {', '.join(left_out)}"
    if counts["malformed"]:
        yield f"      malformed rows: {'; '.join(kind_lines(content['malformed'], places=3))}"
