"""The tables of a few-shot evaluation, for the terminal and as Markdown, CSV and JSON.

WORKDIR/results.md     the F1 of every metric, with what the signs mean, and what the data sets hold
WORKDIR/results.csv    a line for each cell, precision and recall among them, between -1 and 1
WORKDIR/types.csv      a line for each type: its mean precision, recall and F1 over seeds
WORKDIR/results.json   the cells, and a manifest: all that is needed to get them again
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nuner_jax.data.ner.set_report import report_table
from nuner_jax.fewshot.results import METRICS, MIN_VALUES, Cell, Grid, Results, distinct_samples
from nuner_jax.fewshot.sampling import RULES
from nuner_jax.fewshot.starts import Starts
from nuner_jax.folders import writing
from nuner_jax.workdir import versions

_LIBRARIES = ("jax", "flax", "optax", "transformers", "tokenizers", "numpy")
_UNITS = {"token_macro_f1": "words", "entity_f1": "mentions", "string_f1": "strings"}  # what each metric counts
_RULES = {
    "k~2k": "sentences are drawn at random, those without a mention like all others and skipping those that would lift"
    " a type above 2k mentions, until every type has k",
    "kw": "as k~2k, but words are counted in place of mentions",
}
_SHORT = "†"
_LISTED = 10  # gaps that are named one by one

Table = list[tuple[str, ...]]
"""Rows of a table, its head first."""


def score_table(cells: Sequence[Cell], grid: Grid, metric: str) -> Table:
    """A row for every set and encoder with a head, and below it one for its difference to the baseline; points.

    The first columns are set, encoder, and the seeds that the config asks for.
    """
    found = {(cell.set, cell.encoder, cell.head, cell.minus, cell.k): cell for cell in cells if cell.metric == metric}
    table: Table = [("set", "encoder", "seeds", *(f"k = {k}" for k in grid.k))]
    for name in (*grid.sets, None):
        label = f"mean of {len(grid.sets)} sets" if name is None else name
        for encoder, head in grid.systems:
            for minus in dict.fromkeys((None, grid.baseline)):
                row = [found.get((name, encoder, head, minus, k)) for k in grid.k]
                if not any(row):
                    continue
                system = grid.name_of(encoder, head) if minus is None else f"… minus {minus}"
                table.append((label, system, str(len(grid.seeds)), *map(_written, row)))
                label = ""
                if any(cell.interval_over_sets for cell in row if cell):
                    intervals = (_bounds(cell.interval_over_sets, minus) if cell else "–" for cell in row)
                    table.append(("", "… interval over sets", "", *intervals))
    return table


def type_table(results: Results, set_name: str, metric: str) -> Table:
    """F1 (precision / recall) of each type of a set, means over seeds, in points; – where a seed is missing."""
    grid = results.grid
    columns = [(encoder, head, k) for encoder, head in grid.systems for k in grid.k_of(encoder)]
    head = ("type", _UNITS[metric], *(f"{grid.name_of(encoder, head)}, k = {k}" for encoder, head, k in columns))
    written: dict[tuple[str, str], dict[tuple, str]] = {}
    for one in _type_scores(results, set_name, metric):
        scores = [f"{100 * one[name]:.1f}" for name in ("f1", "precision", "recall")]
        complete = one["n"] == len(grid.seeds_at(one["k"]))
        cell = f"{scores[0]} ({scores[1]} / {scores[2]})" if complete else "–"
        written.setdefault((one["type"], f"{one['support']:,}"), {})[one["encoder"], one["head"], one["k"]] = cell
    return [
        head,
        *((*name, *(cells.get(column, "–") for column in columns)) for name, cells in sorted(written.items())),
    ]


def explanations(results: Results, notes: Sequence[str] = ()) -> list[str]:
    """What the signs in the tables mean, then what is missing or out of the ordinary.

    Args:
      results: of the tables.
      notes: lines to add, such as what a pool was too small for.
    """
    grid = results.grid
    lines = [
        f"Points (0 to 100), mean ± standard deviation (n - 1) over {len(grid.seeds)} seeds, each a sample and a head.",
        f"Sampling {grid.rule}: {_RULES[grid.rule]}. samples.json has the sentences of each sample (numbered from 0 in"
        " the train split, its empty ones left out) and their hash.",
        "[ ]: 95% bootstrap interval of the mean over seeds (expanded percentiles)."
        if len(grid.seeds) >= MIN_VALUES
        else f"No intervals: fewer than {MIN_VALUES} seeds cannot give one of 95%.",
    ]
    if any(grid.rival_of(encoder, head) for encoder, head in grid.systems):
        lines.append(f"“… minus {grid.baseline}”: paired, seed by seed on the same sample; its ± and [ ] are its own.")
    if len(grid.sets) > 1:
        lines.append("Mean over sets: its ± and [ ] are over seeds, for these very sets.")
    if len(grid.sets) >= MIN_VALUES:
        lines.append("“… interval over sets”: the sets' means resampled, for other sets like these.")
    if any(results.short_types(name, k) for name in grid.sets for k in grid.k):
        lines.append(f"{_SHORT}: of some types, samples have fewer than k {RULES[grid.rule]}; see below.")
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


def as_heading(title: str) -> str:
    """The title of a metric with a capital."""
    return title[:1].upper() + title[1:]


def write_tables(
    results: Results, cells: Sequence[Cell], manifest: Mapping[str, Any], folder: Path, notes: Sequence[str] = ()
) -> list[Path]:
    """Writes results.md, results.csv, types.csv and results.json in place of earlier ones, and gives their paths.

    Raises:
      NunerError: they cannot be written.
    """
    lines = explanations(results, notes)
    parts = [
        f"## {as_heading(title)}\n\n{as_markdown(score_table(cells, results.grid, name))}"
        for name, title in METRICS.items()
    ]
    meaning = "\n".join(f"- {line}" for line in lines)
    data = "\n".join(map(report_table, manifest["data"].values()))
    whole = {
        "manifest": manifest,
        "explanations": lines,
        "missing": results.missing,
        "cells": [asdict(cell) for cell in cells],
    }
    parts.append(f"## Data sets\n\n```text\n{data}\n```")
    paths = [folder / name for name in ("results.md", "results.csv", "types.csv", "results.json")]
    with writing(folder):
        paths[0].write_text("\n\n".join(["# Few-shot results", meaning, *parts]) + "\n", encoding="utf-8")
        with open(paths[1], "w", encoding="utf-8", newline="") as file:
            _write_csv(cells, file)
        with open(paths[2], "w", encoding="utf-8", newline="") as file:
            _write_types(results, file)
        paths[3].write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths


def make_manifest(
    config: ConfigDict,
    results: Results,
    data: Mapping[str, Mapping[str, Any]],
    encoders: Mapping[str, str],
    starts: Starts,
) -> dict[str, Any]:
    """All that is needed to get the results again, as plain data.

    Args:
      config: the resolved one.
      results: for the hashes of their samples; samples.json beside them has the sentences.
      data: the report of each set (`TaggedSet.report`), which has its fingerprint.
      encoders: the fingerprint of each encoder.
      starts: by which commands it was made, and how long it took.
    """
    samples: dict[str, dict[str, dict[str, str]]] = {}
    for (name, k, seed), sample in sorted(results.hashes.items()):
        samples.setdefault(name, {}).setdefault(str(k), {})[str(seed)] = sample
    return {
        "command": starts.known[-1]["command"],
        "config": json.loads(config.to_json_best_effort()),
        "seeds": results.grid.seeds,
        "sample_hashes": samples,
        "data_fingerprints": {name: report["fingerprint"] for name, report in data.items()},
        "encoder_fingerprints": dict(encoders),
        "versions": versions(_LIBRARIES),
        "starts": starts.known,
        "seconds": starts.seconds,
        "data": dict(data),
    }


def _written(cell: Cell | None) -> str:
    """A cell as the tables show it; of what is not measured at this k, –."""
    if cell is None:
        return "–"
    if cell.mean is None:
        if cell.set is None and cell.n:
            return f"incomplete ({cell.n}/{cell.expected} seeds)"
        return "incomplete" if cell.set is None else "missing"
    parts = [_points(cell.mean, cell.minus) + (_SHORT if cell.short_types and not cell.minus else "")]
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
        f"missing: {name}, {system}, k = {k}: {count} of {len(results.grid.seeds_at(k))} seeds"
        for (name, system, k), count in [*counts.items()][:_LISTED]
    ]
    if len(counts) > _LISTED:
        lines.append(f"missing: {len(counts) - _LISTED} more sets, encoders and k (results.json has them all)")
    return lines


def _repeated_samples(results: Results) -> list[str]:
    return [
        f"{name}, k = {k}: {seeds} seeds drew only {different} different {'sample' if different == 1 else 'samples'}, "
        "as the pool is small for this k; ± and [ ] tell too little of what other sentences would do"
        for (name, k), (different, seeds) in distinct_samples(results).items()
    ]


def _write_csv(cells: Sequence[Cell], file: Any) -> None:
    names = ("metric", "set", "encoder", "head", "minus", "k", "n", "expected", "short_types", "mean", "deviation")
    writer = csv.writer(file)
    writer.writerow([*names, "low", "high", "low_over_sets", "high_over_sets"])
    for cell in cells:
        values = asdict(cell) | {"set": cell.set or "(mean over sets)"}
        bounds = [*(cell.interval or ("", "")), *(cell.interval_over_sets or ("", ""))]
        writer.writerow([*(values[name] for name in names), *bounds])


def _write_types(results: Results, file: Any) -> None:
    names = ("metric", "set", "encoder", "head", "k", "type", "support", "n", "precision", "recall", "f1")
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for metric in METRICS:
        for name in results.grid.sets:
            writer.writerows(_type_scores(results, name, metric))


def _type_scores(results: Results, set_name: str, metric: str) -> Iterator[dict[str, Any]]:
    """The means over the seeds that are there, of each type that occurs in the query set."""
    grid = results.grid
    for encoder, head in grid.systems:
        for k in grid.k_of(encoder):
            rows = [*results.of(set_name, encoder, head, k).values()]
            run = {"metric": metric, "set": set_name, "encoder": encoder, "head": head, "k": k}
            for name in sorted(rows[0]["per_type"][metric]) if rows else ():
                scores = [row["per_type"][metric][name] for row in rows]
                means = {key: float(np.mean([one[key] for one in scores])) for key in ("precision", "recall", "f1")}
                yield run | {"type": name, "support": scores[0]["support"], "n": len(rows), **means}
