"""Where a run's numbers go: metrics.jsonl, TensorBoard, the terminal, and the plot at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Metrics of one run, as JSON lines {"step", "time", name: value} and as TensorBoard scalars."""

    def __init__(self, workdir: Path, resumed_at: int | None):
        """Opens both; lines of steps after `resumed_at`, written before an interruption, are taken away.

        Those steps are done again, with the same result, and a line must not stand twice. None: a new run.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        path = workdir / METRICS_FILE
        kept = []
        if resumed_at is not None and path.exists():
            kept = [line for line in read_metrics(workdir) if line["step"] <= resumed_at]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, path)
        self._file = path.open("a", buffering=1)
        # Its SummaryWriter writes from a thread that dies unheard when the disk is full, and then blocks the run.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
        # Told to forget what an earlier process wrote after this step.
        first = 0 if resumed_at is None else resumed_at + 1
        self._board.write_event(
            Event(step=first, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        self._file.write(json.dumps({"step": step, "time": now, **values}) + "\n")
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._board.write_event(Event(step=step, wall_time=now, summary=Summary(value=points)))
        self._board.flush()

    def close(self) -> None:
        """Everything written is on disk."""
        self._file.close()
        self._board.close()


class NoWriter:
    """The writer of every process but the first."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Console:
    """Lines and a progress line for the person who watches; silent on every process but the first."""

    def __init__(self, active: bool):
        self.active = active
        self._live = sys.stderr.isatty()
        self._open_line = False

    def say(self, line: str = "") -> None:
        """Prints a line."""
        if not self.active:
            return
        if self._open_line:
            print(file=sys.stderr)
            self._open_line = False
        print(line, flush=True)

    def progress(self, line: str, final: bool) -> None:
        """Shows a line that the next one replaces on a terminal; elsewhere only `final` lines are printed."""
        if not self.active:
            return
        if self._live:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
            self._open_line = True
        if final:
            self.say(line) if not self._live else None


def duration(seconds: float) -> str:
    """Seconds as a person says them: "42 s", "3 min 05 s", "2 h 10 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line that a killed process left unfinished is left out."""
    lines = []
    for line in (workdir / METRICS_FILE).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def plot_training(workdir: Path, out: Path) -> None:
    """Draws the loss and what tells quality over steps, from metrics.jsonl, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(workdir)
    panels = {
        "loss": {"train/loss": "train", "validation/loss": "validation", "dev/loss": "dev"},
        "token → concept retrieval, validation": {"retrieval/top1": "top-1", "retrieval/mrr": "MRR"},
        "classes, validation": {"validation/macro_f1": "macro F1", "validation/accuracy": "accuracy"},
        "F1, dev": {"dev/token_macro_f1": "token macro", "dev/entity_f1": "entity micro", "dev/string_f1": "string"},
    }
    measured = {name for line in lines for name in line}
    panels = {title: curves for title, curves in panels.items() if measured & curves.keys()} or {"loss": {}}
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, label in curves.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=3
                )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.axes[0].set_yscale("log")
    figure.savefig(out, dpi=120)
