"""Stopping on request: SIGTERM (a preemption notice) or Ctrl-C end the loop at a step boundary."""

from __future__ import annotations

import os
import signal

import jax


class StopRequest:
    """Listens for SIGTERM and SIGINT while it is open; a second SIGINT ends the program at once."""

    def __init__(self):
        self._name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # With several processes, JAX's coordination service owns SIGTERM and agrees on one step for all.
        watched = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGTERM, signal.SIGINT]
        for number in watched:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        if self._name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._name = signal.Signals(number).name
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the notice that the coordination service listens for

    def reached(self, step: int) -> str | None:
        """The signal's name if the run should save and stop before doing this step, on all processes alike."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return self._name
