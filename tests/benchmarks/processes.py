"""What the comparisons with PyTorch share: the sides are processes of their own, timed by the clock."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def timed(arguments: list[str], **environment: str) -> tuple[float, str]:
    """Runs this Python with these arguments: seconds of wall time, and what it printed.

    `environment` is added to this process's own, and so are the huge pages that launch/local.sh asks for. Exits with
    what the process said last if it failed.
    """
    began = time.perf_counter()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{arguments} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.perf_counter() - began, done.stdout
