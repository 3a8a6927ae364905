"""Stopping on request, for programs that wait rather than compute."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any


class Stop:
    """SIGINT or SIGTERM while it is open: the first asks to stop, a second one does what it does elsewhere.

    In a thread other than the main one it hears nothing. A plain flag, because a handler may run between any two steps
    of the program, also while one of them holds the lock of an Event.
    """

    def __init__(self):
        """Not asked yet."""
        self.asked = False
        self._before: dict[int, Any] = {}

    def wait(self, seconds: float) -> bool:
        """Waits so long, or until asked to stop; whether that is so."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.asked

    def __enter__(self) -> Stop:
        """Listens."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Listens no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        self.asked = True
        self.__exit__()
