"""How many requests at a time: as many as the endpoint bears, found out as TCP does (AIMD)."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Mapping

FIRST_LIMIT = 8  # requests in flight at the start
TROUBLE = 0.2  # share of the latest requests, of about as many as may be in flight, but of
LEAST_LATEST = 32  # at least

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?")
_SECONDS = (86_400.0, 3600.0, 60.0, 1.0, 0.001)


class Throttle:
    """Gives out slots for requests: at most `limit` at a time, none before a pause is over.

    The limit starts at 8 and grows by one with every success, so it doubles per round trip, until it is first halved;
    from then on it grows by one per round trip. It is halved when more than `TROUBLE` of the latest requests were too
    much for the endpoint, but once per round trip: what was sent before the last halving says nothing new. Fewer are
    noise, as every large endpoint has; halving for each of them would leave little.

        async with throttle.slot() as slot:
            ...
            slot.succeeded(headers, tokens)  # or slot.overloaded(retry_after)

    One event loop only. Waiting for a slot can be cancelled; slots are given in the order of asking.
    """

    def __init__(self, most: int):
        """A throttle of at most `most` slots."""
        self.most = most
        self.in_flight = 0
        self._limit = float(min(FIRST_LIMIT, most))
        self._was_halved = False
        self._trouble = 0.0
        self._cut_at = float("-inf")
        self._paused_until = float("-inf")
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        """The requests that may be in flight now."""
        return int(self._limit)

    @property
    def pause_left(self) -> float:
        """Seconds until new requests may start; 0 if they may."""
        return max(0.0, self._paused_until - asyncio.get_running_loop().time())

    def slot(self) -> Slot:
        """A context to send one request in; entering it waits for its turn."""
        return Slot(self)

    def pause(self, seconds: float) -> None:
        """No new request for so long; a pause that lasts longer already stays."""
        self._paused_until = max(self._paused_until, asyncio.get_running_loop().time() + seconds)

    def _grow(self) -> None:
        self._trouble -= self._trouble / max(LEAST_LATEST, self._limit)
        self._limit = min(float(self.most), self._limit + (1 / self._limit if self._was_halved else 1))
        self._wake()

    def _shrink(self, sent_at: float) -> None:
        if sent_at < self._cut_at:
            return
        self._trouble += (1 - self._trouble) / max(LEAST_LATEST, self._limit)
        if self._trouble > TROUBLE:
            self._trouble = 0.0
            self._was_halved = True
            self._cut_at = asyncio.get_running_loop().time()
            self._limit = max(1.0, self._limit / 2)

    async def _acquire(self) -> None:
        if not self._waiting and self._is_free():
            self.in_flight += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had come
                self._release()
            raise

    def _release(self) -> None:
        self.in_flight -= 1
        self._wake()

    def _is_free(self) -> bool:
        return self.in_flight < self.limit and not self.pause_left

    def _wake(self) -> None:
        """Gives the free slots to those who wait; in a pause, comes back when it is over."""
        while self._waiting and self._is_free():
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)
        if self._waiting and self.pause_left and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.pause_left, self._pause_over)

    def _pause_over(self) -> None:
        self._timer = None
        self._wake()


class Slot:
    """One request's permission to be in flight."""

    def __init__(self, throttle: Throttle):
        """A slot that nobody waits for yet."""
        self._throttle = throttle
        self._sent_at = 0.0

    async def __aenter__(self) -> Slot:
        await self._throttle._acquire()
        self._sent_at = asyncio.get_running_loop().time()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._throttle._release()

    def succeeded(self, headers: Mapping[str, str], tokens: int = 0) -> None:
        """The request was answered.

        Args:
          headers: of the answer. If they say that no request is left, or fewer tokens than this one took, nothing
            new is sent until they are there again.
          tokens: that the request took.
        """
        self._throttle._grow()
        if wait := rate_limit_wait(headers, tokens):
            self._throttle.pause(wait)

    def overloaded(self, retry_after: float | None = None) -> None:
        """The request was refused because there were too many, or found the endpoint too slow."""
        self._throttle._shrink(self._sent_at)
        if retry_after:
            self._throttle.pause(retry_after)


def rate_limit_wait(headers: Mapping[str, str], tokens: int) -> float:
    """Seconds to wait by `x-ratelimit-remaining-…` and `x-ratelimit-reset-…`; 0 if there is room, or nothing is said.

    Args:
      headers: of an answer, names in lower case or in a mapping that does not care.
      tokens: that one request takes.
    """
    wait = 0.0
    for kind, needed in (("requests", 1), ("tokens", max(1, tokens))):
        left = headers.get(f"x-ratelimit-remaining-{kind}")
        if left is not None and _is_below(left, needed):
            wait = max(wait, parse_duration(headers.get(f"x-ratelimit-reset-{kind}") or ""))
    return wait


def parse_duration(text: str) -> float:
    """Seconds of "1s", "6m0s", "1h2m3.5s", "20ms" or a plain number of seconds; 0 for anything else."""
    text = text.strip()
    try:
        if re.fullmatch(r"[\d.]+", text):
            return float(text)
        match = _DURATION.fullmatch(text)
        return (
            sum(float(part or 0) * unit for part, unit in zip(match.groups(), _SECONDS, strict=True)) if match else 0.0
        )
    except ValueError:  # "1.2.3"
        return 0.0


def _is_below(left: str, needed: int) -> bool:
    try:
        return float(left) < needed
    except ValueError:
        return False
