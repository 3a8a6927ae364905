"""When to ask again, when a fault is the unit's own, and when the whole endpoint is down."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nuner_jax.annotate.request.answers import EndpointFault, fault_outcomes
from nuner_jax.annotate.units import Outcome, Pending
from nuner_jax.errors import NunerError

LONGEST_DELAY = 60.0  # seconds between two attempts, and once more as much if the server asks for it
OUTAGE_UNITS = 3  # units that must have met faults, and nobody an answer, until it is the endpoint's fault;
# fewer where fewer are asked for at a time
OUTAGE_FAULTS = 30  # faults without an answer between them after which the run stops, if also
OUTAGE_STRETCH = 300.0  # seconds have passed since the first of them; times config.request.backoff
PATIENCE = 20  # times config.request.max_attempts: attempts of a unit in all starts, whoever's fault they were
FIRST_REJECTED = 5  # units rejected, and none ever answered, after which the run stops

_ENDPOINTS_OWN = ("rate_limited", "overloaded", "unreachable")


@dataclass(slots=True)
class Work:
    """Units that are asked for in one request, until each of them is done or failed.

    counted: attempts in this start that count against config.request.max_attempts.
    """

    units: list[Pending]
    counted: int = 0

    def counted_units(self) -> list[Pending]:
        """The units with `counted` as their attempts, for `judge`."""
        return [dataclasses.replace(unit, attempts=self.counted) for unit in self.units]

    def after(self, outcomes: Sequence[Outcome], *, counted: bool) -> list[Pending]:
        """The units that are to be asked for again, the attempt added; it is noted if it counts."""
        self.counted += counted
        again = {outcome.unit for outcome in outcomes if outcome.state == "retry"}
        return [dataclasses.replace(unit, attempts=unit.attempts + 1) for unit in self.units if unit.id in again]


def delay(attempt: int, backoff: float, fault: EndpointFault | None) -> float:
    """Seconds to wait after the failed attempt number `attempt` (from 1).

    Exponential with full jitter (uniform between 0 and the bound), so that requests which failed together do not
    come back together; on top of what the server asks for, if it does, but that no longer than `LONGEST_DELAY`.
    """
    if fault is None:  # an answer, though not one to keep: nothing is overloaded
        return 0.0
    # A wait that concerns all is the throttle's, in which it can be seen; a single unit does not wait for hours.
    return min(LONGEST_DELAY, fault.retry_after or 0.0) + random.uniform(
        0.0, min(LONGEST_DELAY, backoff * 2 ** min(attempt - 1, 16))
    )


def rejects_everything(name: str, count: int, detail: str) -> NunerError:
    """The error of an endpoint that found all requests wrong, `count` so far."""
    return NunerError(
        f"{name} rejects every request, {count:,} so far, with {detail!r}; correct what it names "
        "(config.endpoint.extra, max_tokens_key, temperature, config.prompt) and start again: no unit was given up"
    )


class Health:
    """Whether the endpoint answers at all, seen over all requests of a start."""

    def __init__(self, backoff: float, at_a_time: int, *, proven: bool):
        """An endpoint of which nothing is known yet.

        Args:
          backoff: config.request.backoff.
          at_a_time: units, or groups of them, that are under way at most.
          proven: whether it answered in an earlier start.
        """
        self.proven = proven
        self._enough = min(OUTAGE_UNITS, at_a_time)
        self._stretch = OUTAGE_STRETCH * backoff
        self._faults = 0
        self._since = 0.0
        self._unreachable = False
        self._units: set[str] = set()
        self._rejected: set[str] = set()

    @property
    def silent_for(self) -> float:
        """Seconds since the first fault after the last answer, while the endpoint seems down; else 0."""
        return time.monotonic() - self._since if self._is_down else 0.0

    @property
    def _is_down(self) -> bool:
        return self._unreachable or len(self._units) >= self._enough

    def answered(self) -> None:
        """A request was answered."""
        self.proven = True
        self._faults = 0
        self._unreachable = False
        self._units.clear()

    def judge(self, work: Work, fault: EndpointFault, max_attempts: int) -> tuple[list[Outcome], bool]:
        """The outcomes of a request that met a fault, and whether the attempt counts against its units.

        It does not where the endpoint is at fault: it says so (too many requests, overloaded), cannot be reached, or
        answers nobody. Units are not given up for that before `PATIENCE` times as many attempts, so that even one
        that brings every server down comes to an end.
        """
        if fault.retry:
            self._note(work, fault)
        elif fault.reason == "bad_request" and not self.proven:
            # Perhaps the config is wrong, and no unit: they are not given up before one was answered.
            self._rejected.update(unit.id for unit in work.units)
            fault = EndpointFault(fault.reason, fault.detail, retry=True)
        if fault.retry and (fault.reason in _ENDPOINTS_OWN or self._is_down):
            return fault_outcomes(work.units, fault, PATIENCE * max_attempts), False
        return fault_outcomes(work.counted_units(), fault, max_attempts), True

    def reason_to_stop(self, fault: EndpointFault, name: str) -> NunerError | None:
        """The error that ends the run, if this fault was one too many."""
        if len(self._rejected) >= FIRST_REJECTED and not self.proven:
            return rejects_everything(name, len(self._rejected), fault.detail)
        if self._is_down and self._faults >= OUTAGE_FAULTS and self.silent_for >= self._stretch:
            return NunerError(
                f"{name} has answered none of the last {self._faults} requests, the last one with {str(fault)!r}; "
                "nothing that was answered is lost: when it is up again, the same command goes on from here"
            )
        return None

    def _note(self, work: Work, fault: EndpointFault) -> None:
        if not self._faults:
            self._since = time.monotonic()
        self._faults += 1
        self._unreachable = fault.reason == "unreachable"  # no unit's fault, however few there are
        self._units.update(unit.id for unit in work.units)
