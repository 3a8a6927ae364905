"""The starts of a run: by which command and how long each worked, whether it ended or was killed.

WORKDIR/starts.json is written before anything is computed, and again whenever something is finished, so a start that
is killed loses no more than the seconds since then.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from nuner_jax.errors import NunerError
from nuner_jax.workdir import command, devices

STARTS_FILE = "starts.json"


class Starts:
    """Those of one workdir; the last one is this process's.

    known: of each, in order: "command", "devices", when it "began" (UTC), and the "seconds" that it took so far.
    """

    def __init__(self, workdir: Path):
        """Begins a start.

        Raises:
          NunerError: the file holds something else.
        """
        self._path = workdir / STARTS_FILE
        self.known: list[dict[str, Any]] = []
        if self._path.exists():
            try:
                self.known = json.loads(self._path.read_text(encoding="utf-8"))
                float(self.seconds)
            except (ValueError, TypeError, KeyError) as error:
                raise NunerError(f"{self._path}: no list of starts ({error}); take the file away") from error
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.known.append({"command": command(), "devices": devices(), "began": began, "seconds": 0.0})
        self._clock = time.monotonic()

    def write(self) -> None:
        """Takes note of the time until now."""
        self.known[-1]["seconds"] = round(time.monotonic() - self._clock, 1)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.known, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self._path)

    @property
    def seconds(self) -> float:
        """Of all starts together, as far as they were written."""
        return round(sum(start["seconds"] for start in self.known), 1)
