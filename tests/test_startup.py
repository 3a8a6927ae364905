"""The start-up benchmark, run: the phases that it looks for are those of a training log."""

from __future__ import annotations

import subprocess
import sys


def test_every_phase_of_a_start_is_found_and_timed(root):
    small = ("rows=8", "row_length=64", "concept_row_length=64")
    flags = [f"--config.data.{value}" for value in small] + ["--config.eval.rows=8", "--config.eval.batches=1"]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "benchmarks" / "startup.py"), "--runs=1", *flags],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [phase for phase, _, _ in rows] == [
        "interpreter, imports, flags",
        "data: read or built, tokenised, packed",
        "parameters: drawn or read, placed",
        "compiling",
        "first step",
        "all",
    ]
    for column in (1, 2):
        *parts, total = (float(row[column]) for row in rows)
        assert total > 0 and abs(total - sum(parts)) < 0.3  # of four figures rounded to a tenth
