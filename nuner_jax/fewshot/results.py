"""From the rows of single runs to tables: means over seeds with intervals, and paired differences between encoders.

A row is the outcome of one head: one set, encoder, head, k and seed. WORKDIR/results.jsonl holds them, one a line:

  set, encoder, head, k, rule, seed   which run it is; no two rows share all six
  sample_hash                         of the sentences learnt from: the same for every encoder and head
  token_macro_f1, entity_f1, string_f1   between 0 and 1; each with its …_precision and …_recall
  per_type                            {metric: {type: {"precision", "recall", "f1", "support"}}}
  sentences, short_types              of the sample: how many, and the types of which it has fewer than k mentions
  settings                            hash of what else decides it; a start with other settings refuses the row
  seconds, words_without_tokens       of an encoder: time of the head, query words that its tokenizer leaves out
  answers                             of a language model: what became of its answers

What is computed of them, for each set, encoder, head and k:

  mean ± deviation   over seeds; the deviation is that of a sample (n - 1), in points like the mean
  interval           95%, of the mean over seeds: see `interval`
  difference         of an encoder to the baseline, seed by seed on the same sample (paired); it has a mean, a deviation
                     and an interval of its own, which is narrower than those of the two scores suggest
  mean over sets     of each seed's mean over the sets. Its interval takes these sets as they are: it tells what other
                     samples and seeds would do. The interval over sets resamples the sets' means instead: it tells
                     what other sets like these would do, and it contains the noise of the seeds too.

Where rows are missing, a mean over the seeds that are there is marked with their number, and a mean over sets is not
made at all.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from nuner_jax.errors import NunerError

METRICS = {
    "token_macro_f1": "token macro F1",
    "entity_f1": "entity micro F1, strict",
    "string_f1": "string F1, as UniversalNER",
}
FURTHER = {
    "token_macro_precision": "token macro precision",
    "token_macro_recall": "token macro recall",
    "entity_precision": "entity micro precision, strict",
    "entity_recall": "entity micro recall, strict",
    "string_precision": "string precision, as UniversalNER",
    "string_recall": "string recall, as UniversalNER",
}
ROWS_FILE = "results.jsonl"
IN_CONTEXT = "in context"
"""The head of a language model: nothing is trained."""
MIN_VALUES = 5
"""Values that an interval needs: of 4, even the whole range holds the mean of a normal distribution 87 times in 100."""

_KEY = ("set", "encoder", "head", "k", "rule", "seed")
_VALUES = ("sample_hash", *METRICS, *FURTHER, "per_type", "short_types")
_RESAMPLES = 20_000

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """The runs that a config asks for: a row for each combination.

    llms: language models, which stand among the encoders of rows and tables, with the head `IN_CONTEXT`.
    baseline: the encoder or language model that the others are compared with, or None.
    """

    sets: tuple[str, ...]
    encoders: tuple[str, ...]
    heads: tuple[str, ...]
    k: tuple[int, ...]
    seeds: tuple[int, ...]
    rule: str
    baseline: str | None
    llms: tuple[str, ...] = ()

    def runs(self) -> Iterator[tuple]:
        """(set, encoder, head, k, rule, seed) of every row."""
        for name, (encoder, head) in itertools.product(self.sets, self.systems):
            for k in self.k_of(encoder):
                yield from ((name, encoder, head, k, self.rule, seed) for seed in self.seeds_at(k))

    @property
    def systems(self) -> list[tuple[str, str]]:
        """(encoder, head) of every line of a table, in its order."""
        encoders = [(encoder, head) for head in self.heads for encoder in self.encoders]
        llms = [(name, IN_CONTEXT) for name in self.llms]
        return [*llms, *encoders] if self.baseline in self.llms else [*encoders, *llms]

    def heads_of(self, encoder: str) -> tuple[str, ...]:
        """The heads that an encoder has."""
        return (IN_CONTEXT,) if encoder in self.llms else self.heads

    def k_of(self, encoder: str) -> tuple[int, ...]:
        """The k that an encoder is measured at: only a language model needs no example."""
        return self.k if encoder in self.llms else tuple(k for k in self.k if k)

    def seeds_at(self, k: int) -> tuple[int, ...]:
        """The seeds of a k: without examples all are alike, so there is one."""
        return self.seeds if k else self.seeds[:1]

    def name_of(self, encoder: str, head: str) -> str:
        """How a table names an encoder with its head: the head only where there are several, or none is trained."""
        return encoder if head in self.heads and len(self.heads) == 1 else f"{encoder}, {head}"

    def rival_of(self, encoder: str, head: str) -> tuple[str, str] | None:
        """The (encoder, head) that one is compared with: the baseline with the same head, or with its first one."""
        if self.baseline is None or encoder == self.baseline:
            return None
        heads = self.heads_of(self.baseline)
        return self.baseline, head if head in heads else heads[0]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of one metric of an encoder with a head, or of its difference to `minus`; between -1 and 1.

    set: None is the mean over sets. n: seeds that are there, of the `expected` ones.
    short_types: how many types some sample has fewer than k mentions of; over the sets together for their mean.
    mean, deviation, interval: None where n is too small, or the mean over sets is incomplete.
    interval_over_sets: of the mean over sets alone, where there are enough sets.
    """

    metric: str
    set: str | None
    encoder: str
    head: str
    minus: str | None
    k: int
    n: int
    expected: int
    short_types: int
    mean: float | None = None
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    interval_over_sets: tuple[float, float] | None = None


class Results:
    """The rows of a grid; others are left aside."""

    def __init__(self, rows: Iterable[Row], grid: Grid):
        """Takes rows in any order.

        Raises:
          NunerError: a run has two rows, or encoders did not learn from the same sample.
        """
        self.grid = grid
        self.hashes: dict[tuple[str, int, int], str] = {}
        self._rows: dict[tuple, Row] = {}
        wanted = set(grid.runs())
        for row in rows:
            key = tuple(row[name] for name in _KEY)
            if key not in wanted:
                continue
            run = ", ".join(f"{name} {value}" for name, value in zip(_KEY, key, strict=True))
            if key in self._rows:
                raise NunerError(f"{ROWS_FILE} has two rows for {run}: take one of them away")
            sample = (row["set"], row["k"], row["seed"])
            if self.hashes.setdefault(sample, row["sample_hash"]) != row["sample_hash"]:
                raise NunerError(
                    f"{ROWS_FILE}: {run} has the sample {row['sample_hash']}, but another row of the same set, k and "
                    f"seed has {self.hashes[sample]}: results are only compared on the same sentences, so start again "
                    "in a new workdir"
                )
            self._rows[key] = row

    @property
    def rows(self) -> list[Row]:
        """The rows that are there, in the order of the grid."""
        return [self._rows[key] for key in self.grid.runs() if key in self._rows]

    @property
    def missing(self) -> list[tuple]:
        """The keys of the rows that are not there, in the order of the grid."""
        return [key for key in self.grid.runs() if key not in self._rows]

    def of(self, set_name: str, encoder: str, head: str, k: int) -> dict[int, Row]:
        """Seed → row of those that are there."""
        keys = {seed: (set_name, encoder, head, k, self.grid.rule, seed) for seed in self.grid.seeds_at(k)}
        return {seed: self._rows[key] for seed, key in keys.items() if key in self._rows}

    def short_types(self, set_name: str, k: int) -> set[str]:
        """The types that some sample of a set has fewer than k mentions of."""
        rows = (row for row in self._rows.values() if (row["set"], row["k"]) == (set_name, k))
        return {name for row in rows for name in row["short_types"]}


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none if it does not exist yet.

    A last line without an end, which a killed process left, is left out.

    Raises:
      NunerError: a line is not a row.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")  # what was torn may end within a letter
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line.decode())
            lacking = [name for name in (*_KEY, *_VALUES) if name not in row]
        except (ValueError, TypeError) as error:
            raise NunerError(f"{path}:{number}: not a row ({error}): take the line away") from error
        if lacking:
            raise NunerError(f"{path}:{number}: the row has no {', '.join(lacking)}: take the line away")
        rows.append(row)
    return rows


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows at the end of a results file; what a killed process left of a line goes first."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)


def remove_rows(path: Path, unwanted: Callable[[Row], bool]) -> None:
    """Takes rows out of a results file, wholly or not at all; raises as `read_rows`."""
    rows = read_rows(path)
    kept = [row for row in rows if not unwanted(row)]
    if len(kept) < len(rows):
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"")
        append_rows(partial, kept)
        os.replace(partial, path)


def summarise(results: Results) -> list[Cell]:
    """All that is printed of the results: every metric, encoder with head, set and k; scores, then differences."""
    grid, cells = results.grid, []
    short = {(name, k): len(results.short_types(name, k)) for name in grid.sets for k in grid.k}
    for metric, (encoder, head) in itertools.product((*METRICS, *FURTHER), grid.systems):
        rival = grid.rival_of(encoder, head)
        compared = [(k, None) for k in grid.k_of(encoder)]
        compared += [(k, rival) for k in grid.k_of(encoder) if rival and k in grid.k_of(rival[0])]
        for k, other in compared:
            minus = other[0] if other else None
            values = {name: _values(results, metric, name, (encoder, head), k, other) for name in grid.sets}
            key = {"metric": metric, "encoder": encoder, "head": head, "minus": minus, "k": k}
            key["expected"] = len(grid.seeds_at(k))
            for name, found in values.items():
                cells.append(Cell(set=name, **key, short_types=short[name, k], **_over_seeds([*found.values()])))
            if len(grid.sets) > 1:
                together = sum(short[name, k] for name in grid.sets)
                cells.append(Cell(set=None, **key, short_types=together, **_over_sets(values, grid.seeds_at(k))))
    return cells


def interval(values_N: Sequence[float]) -> tuple[float, float] | None:
    """The 95% bootstrap interval of the mean of independent values; None for fewer than `MIN_VALUES`.

    The percentiles of the means of 20,000 resamples, the same ones for all values. The plain percentiles, 2.5 and
    97.5, hold the mean too rarely for so few values (measured on normal ones: 85 times in 100 for 5 of them, 92 for
    10), so they are moved outwards to where a normal distribution has the bounds of Student's t (93 and 95 times).
    This is the expanded percentile interval of Hesterberg (2015, doi 10.1080/00031305.2015.1089789).
    """
    values_N = np.asarray(values_N, np.float64)
    n = len(values_N)
    if n < MIN_VALUES:
        return None
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _student_t(n - 1))
    low, high = np.quantile(_shares(n) @ values_N, [tail, 1 - tail])
    return float(low), float(high)


def distinct_samples(results: Results) -> dict[tuple[str, int], tuple[int, int]]:
    """(set, k) → (different samples, seeds that are there), where some seeds drew the same sentences."""
    found: dict[tuple[str, int], list[str]] = {}
    for (name, k, _), sample in results.hashes.items():
        found.setdefault((name, k), []).append(sample)
    counts = {key: (len(set(samples)), len(samples)) for key, samples in sorted(found.items())}
    return {key: (different, seeds) for key, (different, seeds) in counts.items() if different < seeds}


def _values(
    results: Results, metric: str, set_name: str, system: tuple[str, str], k: int, other: tuple[str, str] | None
) -> dict[int, float]:
    """Seed → score, or difference of two scores on the same sample."""
    scores = {seed: row[metric] for seed, row in results.of(set_name, *system, k).items()}
    if other is None:
        return scores
    others = results.of(set_name, *other, k)
    return {seed: score - others[seed][metric] for seed, score in scores.items() if seed in others}


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"n": 0}
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(np.mean(values)), "deviation": deviation, "interval": interval(values)}


def _over_sets(values: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> dict[str, Any]:
    shared = [seed for seed in seeds if all(seed in found for found in values.values())]
    if len(shared) < len(seeds):
        return {"n": len(shared)}
    table_SxN = np.array([[found[seed] for seed in seeds] for found in values.values()])
    return {
        **_over_seeds(table_SxN.mean(axis=0).tolist()),
        "interval_over_sets": interval(table_SxN.mean(axis=1).tolist()),
    }


@lru_cache(maxsize=16)
def _shares(n: int) -> np.ndarray:
    """What each of n values has in the mean of each resample: float64 [R, n]."""
    drawn_RxN = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    return np.stack([np.count_nonzero(drawn_RxN == value, axis=1) for value in range(n)], axis=1) / n


def _student_t(freedom: int) -> float:
    """The 97.5th percentile of Student's t, within 0.01 from 4 degrees on (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
