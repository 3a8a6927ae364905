"""The tables of a few-shot evaluation, for the terminal and as Markdown, CSV and JSON.

WORKDIR/results.md     every metric, with what the signs mean
WORKDIR/results.csv    a line for each cell, between -1 and 1
WORKDIR/results.json   the cells, and a manifest: all that is needed to get them again
"""

from __future__ import annotations

import csv
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import nuner_jax
from nuner_jax.fewshot.results import METRICS, MIN_VALUES, Cell, Grid, Results, distinct_samples
from nuner_jax.folders import writing

_LIBRARIES = ("jax", "flax", "optax", "transformers", "tokenizers", "numpy")
_LISTED = 10  # gaps that are named one by one

Table = list[tuple[str, ...]]
"""Rows of a table, its head first."""


def score_table(cells: Sequence[Cell], grid: Grid, metric: str) -> Table:
    """A row for every set and encoder with a head, and below it one for its difference to the baseline; points."""
    found = {(cell.set, cell.encoder, cell.head, cell.minus, cell.k): cell for cell in cells if cell.metric == metric}
    table: Table = [("set", "encoder", *(f"k = {k}" for k in grid.k))]
    for name in (*grid.sets, None):
        label = f"mean of {len(grid.sets)} sets" if name is None else name
        for head in grid.heads:
            for encoder in grid.encoders:
                for minus in dict.fromkeys((None, grid.baseline)):
                    row = [found.get((name, encoder, head, minus, k)) for k in grid.k]
                    if None in row:
                        continue
                    system = grid.name_of(encoder, head) if minus is None else f"… minus {minus}"
                    table.append((label, system, *map(_written, row)))
                    label = ""
                    if any(cell.interval_over_sets for cell in row):
                        intervals = (_bounds(cell.interval_over_sets, minus) for cell in row)
                        table.append(("", "… interval over sets", *intervals))
    return table


def type_table(results: Results, set_name: str) -> Table:
    """Mean F1 over words of each type of a set, over all seeds, in points; – where a seed is missing."""
    grid = results.grid
    columns = [(encoder, head, k) for head in grid.heads for encoder in grid.encoders for k in grid.k]
    rows_of = {column: [*results.of(set_name, *column).values()] for column in columns}
    supports = {
        name: scores["support"] for rows in rows_of.values() for row in rows for name, scores in row["per_type"].items()
    }
    head = ("type", "words", *(f"{grid.name_of(encoder, head)}, k = {k}" for encoder, head, k in columns))
    table: Table = [head]
    for name in sorted(supports):
        means = []
        for column in columns:
            scores = [row["per_type"][name]["f1"] for row in rows_of[column]]
            complete = len(scores) == len(grid.seeds)
            means.append(f"{100 * sum(scores) / len(scores):.1f}" if complete else "–")
        table.append((name, f"{supports[name]:,}", *means))
    return table


def explanations(results: Results, notes: Sequence[str] = ()) -> list[str]:
    """What the signs in the tables mean, then what is missing or out of the ordinary.

    Args:
      results: of the tables.
      notes: lines to add, such as what a pool was too small for.
    """
    grid = results.grid
    lines = [
        f"Points (0 to 100), mean ± standard deviation (n - 1) over {len(grid.seeds)} seeds; sampling {grid.rule}.",
        "[ ]: 95% bootstrap interval of the mean over seeds (expanded percentiles)."
        if len(grid.seeds) >= MIN_VALUES
        else f"No intervals: fewer than {MIN_VALUES} seeds cannot give one of 95%.",
    ]
    if grid.baseline is not None and len(grid.encoders) > 1:
        lines.append(f"“… minus {grid.baseline}”: paired, seed by seed on the same sample; its ± and [ ] are its own.")
    if len(grid.sets) > 1:
        lines.append("Mean over sets: its ± and [ ] are over seeds, for these very sets.")
    if len(grid.sets) >= MIN_VALUES:
        lines.append("“… interval over sets”: the sets' means resampled, for other sets like these.")
    return [*lines, *_gaps(results), *_repeated_samples(results), *notes]


def as_text(table: Table) -> str:
    """For the terminal: aligned columns; lines end without spaces."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_markdown(table: Table) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def write_tables(
    results: Results, cells: Sequence[Cell], manifest: Mapping[str, Any], folder: Path, notes: Sequence[str] = ()
) -> list[Path]:
    """Writes results.md, results.csv and results.json in place of earlier ones, and gives their paths.

    Raises:
      NunerError: they cannot be written.
    """
    lines = explanations(results, notes)
    parts = [f"## {title}\n\n{as_markdown(score_table(cells, results.grid, name))}" for name, title in METRICS.items()]
    meaning = "\n".join(f"- {line}" for line in lines)
    whole = {
        "manifest": manifest,
        "explanations": lines,
        "missing": results.missing,
        "cells": [asdict(cell) for cell in cells],
    }
    paths = [folder / f"results.{kind}" for kind in ("md", "csv", "json")]
    with writing(folder):
        paths[0].write_text("\n\n".join(["# Few-shot results", meaning, *parts]) + "\n", encoding="utf-8")
        with open(paths[1], "w", encoding="utf-8", newline="") as file:
            _write_csv(cells, file)
        paths[2].write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def make_manifest(
    config: ConfigDict, results: Results, data: Mapping[str, str], encoders: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """All that is needed to get the results again, as plain data.

    Args:
      config: the resolved one.
      results: for the hashes of their samples.
      data: the fingerprint of each set.
      encoders: the fingerprint of each encoder.
      seconds: how long it took.
    """
    samples: dict[str, dict[str, dict[str, str]]] = {}
    for (name, k, seed), sample in sorted(results.hashes.items()):
        samples.setdefault(name, {}).setdefault(str(k), {})[str(seed)] = sample
    return {
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "config": json.loads(config.to_json_best_effort()),
        "seeds": results.grid.seeds,
        "sample_hashes": samples,
        "data_fingerprints": dict(data),
        "encoder_fingerprints": dict(encoders),
        "versions": {"python": platform.python_version(), "nuner_jax": nuner_jax.__version__}
        | {name: metadata.version(name) for name in _LIBRARIES},
        "seconds": round(seconds, 1),
    }


def _written(cell: Cell) -> str:
    """A cell as the tables show it."""
    if cell.mean is None:
        if cell.set is None and cell.n:
            return f"incomplete ({cell.n}/{cell.expected} seeds)"
        return "incomplete" if cell.set is None else "missing"
    parts = [_points(cell.mean, cell.minus)]
    if cell.deviation is not None:
        parts.append(f"± {100 * cell.deviation:.1f}")
    if cell.interval:
        parts.append(_bounds(cell.interval, cell.minus))
    if cell.n < cell.expected:
        parts.append(f"({cell.n}/{cell.expected} seeds)")
    return " ".join(parts)


def _bounds(interval: tuple[float, float] | None, minus: str | None) -> str:
    return f"[{_points(interval[0], minus)}, {_points(interval[1], minus)}]" if interval else "–"


def _points(value: float, minus: str | None) -> str:
    return f"{100 * value:+.1f}" if minus else f"{100 * value:.1f}"


def _gaps(results: Results) -> list[str]:
    if not results.missing:
        return []
    counts: dict[tuple[str, str, int], int] = {}
    for name, encoder, head, k, _, _ in results.missing:
        gap = (name, results.grid.name_of(encoder, head), k)
        counts[gap] = counts.get(gap, 0) + 1
    whole = len(results.missing) + len(results.rows)
    lines = [f"INCOMPLETE: {len(results.missing):,} of {whole:,} results are missing."]
    lines += [
        f"missing: {name}, {system}, k = {k}: {count} of {len(results.grid.seeds)} seeds"
        for (name, system, k), count in [*counts.items()][:_LISTED]
    ]
    if len(counts) > _LISTED:
        lines.append(f"missing: {len(counts) - _LISTED} more sets, encoders and k (results.json has them all)")
    return lines


def _repeated_samples(results: Results) -> list[str]:
    return [
        f"{name}, k = {k}: {len(results.grid.seeds)} seeds, but the pool holds no more than {count} different "
        f"{'sample' if count == 1 else 'samples'}; ± is mostly that of the heads"
        for (name, k), count in distinct_samples(results).items()
    ]


def _write_csv(cells: Sequence[Cell], file: Any) -> None:
    names = ("metric", "set", "encoder", "head", "minus", "k", "n", "expected", "mean", "deviation")
    writer = csv.writer(file)
    writer.writerow([*names, "low", "high", "low_over_sets", "high_over_sets"])
    for cell in cells:
        values = asdict(cell) | {"set": cell.set or "(mean over sets)"}
        bounds = [*(cell.interval or ("", "")), *(cell.interval_over_sets or ("", ""))]
        writer.writerow([*(values[name] for name in names), *bounds])
