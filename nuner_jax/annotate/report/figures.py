"""The figures of the report: functions that compute a series, and functions that draw one as PNG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nuner_jax.annotate.report.accounts import Row, line_rows

FREQUENCY_FILE = "concept_frequency.png"
PER_UNIT_FILE = "annotations_per_unit.png"
OUTCOME_FILE = "alignment_outcome.png"

_COLOURS = {"found": "#1f6f8b", "inexact": "#7fb7c9", "lost": "#c8553d", "ignored": "#9aa0a6"}
_BLUE = _COLOURS["found"]
_THOUSANDS = "{x:,.0f}"
_MOST = 30  # annotations: the last bar holds units with as many and more


def frequency_by_rank(frequencies: Iterable[int]) -> tuple[list[int], list[int]]:
    """Ranks from 1, and the frequency at each, falling: the paper's Figure 4.

    Only the first and the last rank of each frequency are given: between them the line is level, and most concepts
    of a large data set share a handful of frequencies.
    """
    ranks, levels, rank = [], [], 1
    for frequency, concepts in sorted(Counter(frequencies).items(), reverse=True):
        for at in sorted({rank, rank + concepts - 1}):
            ranks.append(at)
            levels.append(frequency)
        rank += concepts
    return ranks, levels


def per_unit_bars(units_by_number: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Numbers 0, 1, … of annotations, and how many units have each; above 30, they count as 30."""
    pooled: Counter[int] = Counter()
    for number, units in units_by_number.items():
        pooled[min(int(number), _MOST)] += units
    numbers = list(range(max(pooled, default=0) + 1))
    return numbers, [pooled[number] for number in numbers]


def draw_frequency(ranks: Sequence[int], frequencies: Sequence[int], out: Path) -> None:
    """Frequency over rank, both logarithmic."""
    figure, axes = _figure(6.4, 4.2)
    scale = "log" if ranks else "linear"  # nothing has no logarithm
    axes.plot(ranks, frequencies, color=_BLUE, marker="o" if len(ranks) < 60 else None, markersize=3)
    axes.set(
        xscale=scale,
        yscale=scale,
        title=f"Concept frequency by rank, of {ranks[-1] if ranks else 0:,} concepts",
        xlabel="rank of the concept",
        ylabel="mentions of the concept",
    )
    axes.grid(which="major", alpha=0.3)
    figure.savefig(out)


def draw_per_unit(numbers: Sequence[int], units: Sequence[int], out: Path) -> None:
    """How many answered units have how many annotations with a place in their text."""
    figure, axes = _figure(6.4, 4.2)
    axes.bar(numbers, units, width=0.85, color=_BLUE)
    rest = f" (the last bar: {_MOST} and more)" if numbers[-1] == _MOST else ""
    axes.set(
        title=f"Annotations per unit, of {sum(units):,} answered ones",
        xlabel=f"annotations found in the text{rest}",
        ylabel="units",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(_THOUSANDS)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(out)


def draw_outcome(rows: Sequence[Row], out: Path) -> None:
    """A bar for each thing that became of lines, with its count and share written at its end."""
    bars = [row for row in rows if row.kind != "whole"]
    figure, axes = _figure(8.0, 1.4 + 0.34 * len(bars))
    counts = [row.count for row in bars]
    drawn = axes.barh([row.name for row in bars], counts, color=[_COLOURS[row.kind] for row in bars])
    axes.bar_label(drawn, [f"{row.count:,}  ({row.share()})" for row in bars], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.set(title="What became of the lines of the completions", xlabel="lines", xlim=(0, 1.3 * max(counts) or 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out)


def draw_all(counts: Mapping[str, Any], frequencies: Iterable[int], folder: Path) -> list[Path]:
    """Draws the three figures into `folder`.

    Args:
      counts: what align.json holds.
      frequencies: mentions of each concept, in any order.
      folder: exists.

    Returns:
      The files, in the order in which a reader wants them.
    """
    draw_outcome(line_rows(counts), folder / OUTCOME_FILE)
    draw_per_unit(*per_unit_bars(counts["annotations_per_unit"]), folder / PER_UNIT_FILE)
    draw_frequency(*frequency_by_rank(frequencies), folder / FREQUENCY_FILE)
    return [folder / name for name in (OUTCOME_FILE, PER_UNIT_FILE, FREQUENCY_FILE)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes
