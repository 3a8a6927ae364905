"""Batches prepared ahead of their use."""

from __future__ import annotations

import collections
import concurrent.futures
import time
from collections.abc import Callable
from typing import Any


class Prefetch:
    """Makes the batches of consecutive steps in one background thread, a few ahead.

    Making a batch includes starting its transfer to the device, so that it is there when its step is.
    """

    def __init__(self, make: Callable[[int], Any], first: int, stop: int, depth: int):
        """Starts with step `first`; steps from `stop` on are not made; `depth` 0 makes each when asked."""
        self._make, self._next, self._stop, self._depth = make, first, stop, depth
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self._queue: collections.deque = collections.deque()
        self.waited = 0.0  # seconds that `get` has spent waiting for a batch, so far
        self._fill()

    def _fill(self) -> None:
        while len(self._queue) < self._depth and self._next < self._stop:
            self._queue.append(self._executor.submit(self._make, self._next))
            self._next += 1

    def get(self) -> Any:
        """The next step's batch; raises what making it raised."""
        start = time.perf_counter()
        if self._depth:
            batch = self._queue.popleft().result()
            self._fill()
        else:
            batch = self._make(self._next)
            self._next += 1
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Drops what was made ahead and ends the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)
