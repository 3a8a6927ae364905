"""The stage `request`: asks an endpoint for every unit that has no answer yet, and pays within the budget."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from nuner_jax.annotate import money
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.answers import EndpointFault, EndpointStop, judge
from nuner_jax.annotate.request.endpoints import Endpoint
from nuner_jax.annotate.request.retry import Health, Work, delay
from nuner_jax.annotate.request.throttle import Slot, Throttle
from nuner_jax.annotate.request.work import Summary, body_for, groups, settle_earlier
from nuner_jax.annotate.units import Answer, Outcome, Pending, Usage
from nuner_jax.writers import Console, duration

WORKERS_PER_SLOT = 2  # units under way per request in flight, because some wait for their next attempt
PROGRESS_EVERY = 0.2  # seconds
RATE_OVER = 15.0  # seconds over which units per second are measured
LONG_PAUSE = 60.0  # seconds of a pause from which it is told where no progress line is seen

INDENT = " " * len("request      ")

_OVERLOADED = ("rate_limited", "overloaded", "timeout")


def run(
    config: ConfigDict,
    journal: Journal,
    prompt: Prompt,
    endpoint: Endpoint,
    *,
    console: Console,
    pilot_only: bool = False,
) -> Summary:
    """Asks for every pending unit of the journal's selection until it is done or failed.

    Each request is in the journal before it is sent, and its answer before it counts; so whatever ends the process,
    the next one goes on where it was. A unit is asked for at most config.request.max_attempts times in one start,
    not counting attempts that failed because the endpoint was overloaded or down.

    SIGINT and SIGTERM stop it when what is in flight is answered; a second one stops it at once.

    Args:
      config: see `nuner_jax.config.annotate`.
      journal: open for writing, with its selection.
      endpoint: closed at the end.
      console: shows the estimate after the pilot, and the progress.
      pilot_only: stop after config.request.pilot units and the estimate.

    Raises:
      NunerError: the endpoint cannot be used (see `Endpoint.check`, `EndpointStop`), is down for long, or rejects
        everything; the journal cannot be written. What was in flight is in the journal before.
    """
    settle_earlier(config, journal, prompt)
    if not journal.totals().pending:  # then there need be no endpoint
        return Summary("pilot" if pilot_only else "finished", journal.totals())

    async def whole() -> Summary:
        try:
            await endpoint.check()
            return await _Run(config, journal, prompt, endpoint, console).all(pilot_only)
        finally:
            await endpoint.close()

    summary = asyncio.run(whole())
    if summary.stopped == "finished" and summary.totals.pending:
        console.say(
            f"{INDENT}{summary.totals.pending:,} units wait in batches at the endpoint: config.endpoint.kind = "
            '"batch" collects them'
        )
    return summary


class _Run:
    """One start: what its workers share."""

    def __init__(self, config: ConfigDict, journal: Journal, prompt: Prompt, endpoint: Endpoint, console: Console):
        self._config = config
        self._journal = journal
        self._prompt = prompt
        self._endpoint = endpoint
        self._console = console
        self._free = config.endpoint.kind == "replay"
        self._max_attempts = config.request.max_attempts
        totals = journal.totals()
        self._prices = money.Prices.make(config)
        self._budget = money.Budget.make(config, totals)
        self._throttle = Throttle(config.request.max_concurrency)
        self._workers_at_most = WORKERS_PER_SLOT * config.request.max_concurrency
        self._health = Health(config.request.backoff, self._workers_at_most, proven=totals.done > 0)
        self._settled = asyncio.Event()  # set, and replaced, whenever money comes free
        self._workers: set[asyncio.Task[None]] = set()
        self._flying: set[asyncio.Task[None]] = set()  # workers between `begin` and `finish`
        self._stopped = ""  # why no new request is sent
        self._error: BaseException | None = None
        self._signal_seen = False
        self._told_pause = False
        self._pace: deque[tuple[float, int]] = deque(maxlen=round(RATE_OVER / PROGRESS_EVERY))

    async def all(self, pilot_only: bool) -> Summary:
        """The pilot, its estimate, and the rest."""
        with self._signals():
            pilot = 0 if self._free else self._config.request.pilot
            totals = self._journal.totals()
            missing = min(pilot - totals.done - totals.failed, totals.pending)
            rate = None
            if missing > 0:
                began = time.monotonic()
                await self._ask_for(self._works(missing))
                rate = (totals.pending - self._journal.totals().pending) / (time.monotonic() - began)
            if pilot and not self._stopped:
                self._tell_estimate(rate)
            if pilot_only:
                return Summary(self._stopped or "pilot", self._journal.totals())
            if not self._stopped:
                await self._ask_for(self._works(None))
        return Summary(self._stopped or "finished", self._journal.totals())

    # --- The workers ---------------------------------------------------------------------------

    def _works(self, most: int | None) -> Iterator[Work]:
        size = 1 if self._free else self._prompt.units_per_request
        return map(Work, groups(self._journal, size, most))

    async def _ask_for(self, works: Iterator[Work]) -> None:
        """Sees all works through with many workers; returns when they are, or when the run stops and all is settled.

        Raises the first error of a worker, after the others have ended.
        """
        progress = asyncio.create_task(self._show_progress())
        self._workers = {asyncio.create_task(self._work(works)) for _ in range(self._workers_at_most)}
        try:
            await asyncio.gather(*self._workers, return_exceptions=True)
        finally:
            progress.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await progress
        if self._error is not None:
            raise self._error

    async def _work(self, works: Iterator[Work]) -> None:
        try:
            for work in works:  # shared by all workers
                await self._see_through(work)
                if self._stopped:
                    return
        except Exception as error:
            self._stop("error", error)

    async def _see_through(self, work: Work) -> None:
        """Asks until every unit of the work is done or failed: together at first, alone after an answer without it."""
        queue = deque([work])
        attempt = 0
        while queue and not self._stopped:
            work = queue.popleft()
            attempt += 1
            again, fault = await self._attempt(work)
            if not again or self._stopped:
                continue
            if fault is not None and fault.retry:
                queue.appendleft(Work(again, work.counted))
            else:
                queue.extend(Work([unit], work.counted) for unit in again)
            await asyncio.sleep(delay(attempt, self._config.request.backoff, fault))

    async def _attempt(self, work: Work) -> tuple[list[Pending], EndpointFault | None]:
        """One request; returns the units that are to be asked for again, and the fault, if it met one."""
        body = body_for(self._config, self._prompt, work.units)
        worker = asyncio.current_task()
        async with self._throttle.slot() as slot:
            reserved = await self._reserve(body)
            self._flying.add(worker)
            request = await self._journal.begin(work.units, reserved)
            result = await self._ask(slot, body, [unit.text for unit in work.units])
        again, fault = await self._finish(request, work, reserved, result)
        self._flying.discard(worker)
        return again, fault

    async def _reserve(self, body: Mapping[str, object]) -> int:
        """Sets aside what the request costs at most; waits for others to be settled if it does not fit."""
        amount = self._prices.worst(body, self._config.endpoint.max_tokens)
        while not self._budget.try_reserve(amount):
            if not self._flying:
                self._stop("budget")
                raise asyncio.CancelledError
            await self._settled.wait()
        return amount

    async def _ask(self, slot: Slot, body: Mapping[str, object], texts: list[str]) -> Answer | Exception:
        """The answer, or the fault or stop in its place."""
        try:
            answer, headers = await self._endpoint.ask(body, texts)
        except EndpointFault as fault:
            if fault.reason in _OVERLOADED:
                slot.overloaded(fault.retry_after)
            return fault
        except EndpointStop as stop:
            return stop
        slot.succeeded(headers, answer.usage.prompt + answer.usage.completion)
        return answer

    async def _finish(
        self, request: str, work: Work, reserved: int, result: Answer | Exception
    ) -> tuple[list[Pending], EndpointFault | None]:
        """Records what came of a request, and what it cost; stops the run if it must."""
        cost, unsure, usage, answer_id, counted, fault = 0, 0, None, "", True, None
        if isinstance(result, Answer):
            self._health.answered()
            answer_id = result.id
            outcomes = judge(result, self._prompt, work.counted_units(), self._max_attempts)
            if result.usage == Usage():  # the endpoint does not count
                unsure = reserved
            else:
                usage, cost = result.usage, self._prices.of(result.usage)
        elif isinstance(result, EndpointFault):
            fault = result
            unsure = reserved if fault.billed == "unknown" else 0
            outcomes, counted = self._health.judge(work, fault, self._max_attempts)
            if error := self._health.reason_to_stop(fault, self._endpoint.name):
                self._stop("error", error)
        else:
            outcomes = [Outcome(unit.id, "retry", error=result.reason) for unit in work.units]
            self._stop("error", result)
        await self._journal.finish(request, outcomes, answer_id=answer_id, usage=usage, cost=cost, unsure=unsure)
        self._budget.settle(reserved, cost, unsure)
        self._settled.set()
        self._settled = asyncio.Event()
        return work.after(outcomes, counted=counted), fault

    # --- What the user sees --------------------------------------------------------------------

    def _tell_estimate(self, rate: float | None) -> None:
        estimate = money.estimate(self._journal.sample(), self._journal.totals().pending, self._prices, rate=rate)
        for line in estimate.lines(self._budget.left):
            self._console.say(f"{INDENT}{line}")

    async def _show_progress(self) -> None:
        try:
            while True:
                self._tell_pause(self._throttle.pause_left)
                self._console.progress(self._progress_line(), final=False)
                await asyncio.sleep(PROGRESS_EVERY)
        finally:
            self._console.progress(self._progress_line(), final=True)

    def _progress_line(self) -> str:
        totals = self._journal.totals()
        ended = totals.done + totals.failed
        self._pace.append((time.monotonic(), ended))
        parts = [f"request      {ended:,}/{totals.units:,} units"]
        if totals.failed:
            parts[0] += f" ({totals.failed:,} failed)"
        seconds, units = (last - first for first, last in zip(self._pace[0], self._pace[-1], strict=True))
        if units:
            parts.append(f"{units / seconds:.3g}/s")
        parts.append(f"{self._throttle.in_flight}/{self._throttle.limit} in flight")
        if self._prices.known and not self._free:
            parts.append(money.progress(self._budget))
        if (pause := self._throttle.pause_left) >= 1:
            parts.append(f"rate limit: next in {duration(pause)}")
        elif (silent := self._health.silent_for) >= 1:
            parts.append(f"no answer for {duration(silent)}")
        elif units and ended < totals.units:
            parts.append(f"{duration((totals.units - ended) * seconds / units)} left")
        return ", ".join(parts)

    def _tell_pause(self, seconds: float) -> None:
        if seconds >= LONG_PAUSE and not self._told_pause:
            self._console.say(f"{INDENT}the endpoint asks to wait {duration(seconds)}; a signal ends it meanwhile")
        self._told_pause = seconds >= LONG_PAUSE

    # --- Stopping ------------------------------------------------------------------------------

    def _stop(self, why: str, error: BaseException | None = None) -> None:
        """No new request from now on; workers that have one in flight end when it is settled, the others now."""
        self._stopped = self._stopped or why
        self._error = self._error or error
        for worker in self._workers - self._flying:
            worker.cancel()

    def _signalled(self) -> None:
        if not self._signal_seen:
            self._signal_seen = True
            self._stop("signal")
            self._console.say(
                f"stopping: {len(self._flying)} requests in flight are waited for; once more stops at once"
            )
            return
        for worker in self._workers:  # what is in flight stays so in the journal: the next start calls it lost
            worker.cancel()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Listens for SIGINT and SIGTERM; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
