"""Learning curves: a metric over k with its intervals, for each set and for the mean over sets, as PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nuner_jax.fewshot.results import METRICS, Cell, Grid
from nuner_jax.fewshot.sampling import RULES
from nuner_jax.folders import writing

_COLUMNS = 3
_COLOURS = ("#1f6f8b", "#c8553d", "#5b8e3e", "#8a5fa8", "#b58a1f", "#5a6470")
_LINES = ("-", "--", ":", "-.")


def draw_curves(cells: Sequence[Cell], grid: Grid, metric: str, out: Path) -> Path:
    """Draws a panel for the mean over sets and one for each set, and gives `out`.

    A colour is an encoder, a line style a head. The band is the 95% interval over seeds; the standard deviation in a
    figure without any interval; the legend says which. Where seeds are missing, the marker is hollow.

    Raises:
      NunerError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [None, *grid.sets] if len(grid.sets) > 1 else list(grid.sets)
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.9 * max(columns, 2), 3.1 * lines + 0.7), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.06)
    all_axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    shown = [cell for cell in cells if cell.metric == metric and cell.minus is None and cell.mean is not None]
    has_intervals = any(cell.interval for cell in shown)
    for axes, name in zip(all_axes, panels, strict=False):
        _draw_panel(axes, [cell for cell in shown if cell.set == name], grid, has_intervals)
        axes.set_title(f"mean of {len(grid.sets)} sets" if name is None else name, fontsize=11)
    for axes in all_axes[::columns]:
        axes.set_ylabel("points")
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    band = "95% bootstrap interval over seeds" if has_intervals else "standard deviation over seeds"
    gaps = "; hollow: seeds are missing" if any(cell.n < cell.expected for cell in shown) else ""
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, title=f"band: {band}{gaps}")
    figure.suptitle(f"{METRICS[metric]} over k, {len(grid.seeds)} seeds", fontweight="bold")
    with writing(out):
        figure.savefig(out)
    return out


def _draw_panel(axes: Any, cells: Sequence[Cell], grid: Grid, has_intervals: bool) -> None:
    """The curves of one set; an encoder without results has an empty one, for the legend."""
    place = {k: k or min((k for k in grid.k if k), default=2) / 2 for k in grid.k}  # a logarithmic axis has no 0
    encoders = [*grid.encoders, *grid.llms]
    for encoder, head in grid.systems:
        colour = _COLOURS[encoders.index(encoder) % len(_COLOURS)]
        curve = [cell for cell in cells if (cell.encoder, cell.head) == (encoder, head)]
        curve.sort(key=lambda cell: cell.k)
        at, means = [place[cell.k] for cell in curve], [100 * cell.mean for cell in curve]
        line_style = _LINES[grid.heads_of(encoder).index(head) % len(_LINES)]
        axes.plot(at, means, color=colour, linestyle=line_style, label=grid.name_of(encoder, head))
        faces = [colour if cell.n == cell.expected else "white" for cell in curve]
        axes.scatter(at, means, s=16, c=faces, edgecolors=colour, zorder=3)
        bands = [_band(cell, has_intervals) for cell in curve]
        if bands:
            axes.fill_between(at, *zip(*bands, strict=True), color=colour, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    # A logarithmic axis without data has no bounds of its own.
    axes.set_xlim(min(place.values()) / 1.2, max(place.values()) * 1.2)
    axes.set_xticks([*place.values()], labels=[str(k) for k in place])
    axes.minorticks_off()
    axes.set_xlabel(f"k ({RULES[grid.rule]} of each type)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _band(cell: Cell, has_intervals: bool) -> tuple[float, float]:
    deviation = 0.0 if has_intervals else cell.deviation or 0.0
    low, high = cell.interval or (cell.mean - deviation, cell.mean + deviation)
    return 100 * low, 100 * high
