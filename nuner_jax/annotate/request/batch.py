"""The stage `request` through the Batch API: the same units and journal, in files, at a share of the price.

A batch is in the journal before its file is sent, and the endpoint's names of file and batch as soon as they are
known. So a run may end at any point while its batches go on; the next start looks at them and collects their results.
A batch that was perhaps created just as the process died is found at the endpoint by its mark.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate import money
from nuner_jax.annotate.journal.journal import BatchRow, Finish, Journal
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.answers import EndpointFault
from nuner_jax.annotate.request.batch_endpoint import ENDED, LONGEST_BACKOFF, PATH, BatchEndpoint, BatchLook
from nuner_jax.annotate.request.batch_results import Results
from nuner_jax.annotate.request.endpoints import LiveEndpoint
from nuner_jax.annotate.request.stop import Stop
from nuner_jax.annotate.request.work import Summary, body_for, groups, settle_earlier
from nuner_jax.annotate.units import Pending
from nuner_jax.errors import NunerError
from nuner_jax.folders import writing
from nuner_jax.writers import Console, duration

PAGE = 500  # results written to the journal at a time
QUEUE_FULL = "token_limit_exceeded"  # OpenAI's word for a batch that failed because too much waits already

_NAME_BYTES = 20  # of a request's name in a file, at most


def run(config: ConfigDict, journal: Journal, prompt: Prompt, *, console: Console, pilot_only: bool = False) -> Summary:
    """Asks for every pending unit of the journal's selection until it is done or failed, in batches.

    The pilot is a small first batch; the others are begun when it is collected. What the endpoint did not come to, or
    met an error of its own with, goes into the next batch. A unit is given up after config.request.max_attempts.

    SIGINT and SIGTERM end it after the call under way; the batches go on, and the same command collects them.

    Args:
      config: see `nuner_jax.config.annotate`.
      journal: open for writing, with its selection.
      console: shows the estimate after the pilot, and the progress.
      pilot_only: stop after the pilot and the estimate.

    Raises:
      NunerError: the endpoint cannot be used, or does not take a batch; it rejects everything; the journal or its
        folder cannot be written. Units of a batch that was refused as a whole stay pending.
    """
    settle_earlier(config, journal, prompt)
    if not journal.totals().pending and not journal.batches():  # open ones are paid for, also those of other units
        return Summary("pilot" if pilot_only else "finished", journal.totals())
    asyncio.run(_check(config))

    def wait(seconds: float) -> bool:
        if seconds > LONGEST_BACKOFF:
            console.say(f"the endpoint asks to wait {duration(seconds)}; a signal ends it meanwhile")
        return stop.wait(seconds)

    with Stop() as stop, contextlib.closing(BatchEndpoint(config, wait)) as endpoint:
        driver = _Run(config, journal, prompt, endpoint, console, stop)
        try:
            stopped = driver.all(pilot_only)
        except EndpointFault as fault:
            if not stop.asked:
                raise NunerError(
                    f"{config.endpoint.base_url}: the Batch API answers {str(fault)!r}; what was submitted goes on "
                    "there, and the same command goes on from here (if a file is too large for it, lower "
                    'config.batch.requests; a server without a Batch API needs config.endpoint.kind = "live")'
                ) from fault
            stopped = "signal"
        if stopped == "signal" and (open_ := len(journal.batches())):
            console.say(f"stopped: {open_} batches go on at the endpoint; the same command collects their results")
    return Summary(stopped, journal.totals())


class _Run:
    """One start. The journal says what is open; nothing else needs to be remembered."""

    def __init__(
        self,
        config: ConfigDict,
        journal: Journal,
        prompt: Prompt,
        endpoint: BatchEndpoint,
        console: Console,
        stop: Stop,
    ):
        self._config = config
        self._journal = journal
        self._prompt = prompt
        self._endpoint = endpoint
        self._console = console
        self._stop = stop
        self._prices = money.Prices.make(config)
        self._looks: dict[str, BatchLook] = {}  # the last one, by the batch's key
        self._queue_full = False  # the endpoint takes no more batches until one of ours has ended
        self._outage = ""  # why it does not answer

    def all(self, pilot_only: bool) -> str:
        """Begins, looks at and collects batches until nothing is left to do; says why it ended."""
        pilot = bool(self._config.request.pilot)
        told = not pilot
        while not self._stop.asked:
            moved = self._look_at_all()
            piloting = pilot and not self._has_ended_units()
            if not piloting and not told:
                told = True
                self._tell_estimate()
            if pilot_only and not piloting:
                return "pilot"
            moved |= self._resubmit() or self._fill(self._config.request.pilot if piloting else None)
            if not self._journal.batches() and not self._stop.asked:
                totals = self._journal.totals()
                self._progress(final=True)
                return "budget" if totals.pending else "finished"
            self._progress()
            if not moved:
                self._stop.wait(self._config.batch.poll)
        return "signal"

    def _has_ended_units(self) -> bool:
        totals = self._journal.totals()
        return totals.done + totals.failed > 0

    # --- Beginning batches ---------------------------------------------------------------------

    def _fill(self, most: int | None) -> bool:
        """Begins batches while there is room at the endpoint, in the budget, and something to ask; whether any.

        most: units of the one batch to begin, if no other is open; None: as many as a file takes.
        """
        begun = False
        places = self._config.batch.in_flight if most is None else 1
        while not self._queue_full and len(self._journal.batches()) < places and not self._stop.asked:
            requests = self._gather(most)
            if not requests:
                break
            key, _ = self._journal.begin_batch(requests)
            self._submit(next(row for row in self._journal.batches() if row.key == key))
            begun = True
        return begun

    def _gather(self, most: int | None) -> list[tuple[list[Pending], int]]:
        """Requests for the next batch, each with what it costs at most.

        If the budget cuts them short while other batches are open, there are none: when those have ended, more fits.
        """
        limits = self._config.batch
        budget = money.Budget.make(self._config, self._journal.totals())
        requests, size = [], 0
        for units in groups(self._journal, self._prompt.units_per_request, most):
            body = body_for(self._config, self._prompt, units)
            line = len(_line("", body)) + _NAME_BYTES
            if line > limits.bytes:
                raise NunerError(
                    f"a request of {line:,} bytes ({units[0].text[:60]!r}…) does not fit into a file of "
                    f"config.batch.bytes = {limits.bytes:,}; raise it, or lower config.source.max_chars"
                )
            if len(requests) == limits.requests or size + line > limits.bytes:
                break
            worst = self._prices.worst(body, self._config.endpoint.max_tokens)
            if not budget.try_reserve(worst):
                return [] if self._journal.batches() else self._cut_short(requests, worst)
            requests.append((units, worst))
            size += line
        return requests

    def _cut_short(self, requests: list[tuple[list[Pending], int]], worst: int) -> list[tuple[list[Pending], int]]:
        if requests:
            self._console.say(
                f"the budget has room for {len(requests):,} requests at a time, because each may cost up to "
                f"{money.dollars(worst)}; a lower config.endpoint.max_tokens makes room for more"
            )
        return requests

    def _resubmit(self) -> bool:
        """Submits what an earlier start has only prepared, or the endpoint had no room for; whether there was any."""
        waiting = [row for row in self._journal.batches() if row.state == "prepared" and not self._queue_full]
        for row in waiting:
            if there := self._endpoint.find(self._mark(row.key)):
                self._journal.set_batch(row.key, id=there, state="submitted")
            elif row.requests > self._config.batch.requests or self._is_over_budget():
                self._journal.release(row.key)
            else:
                self._submit(row)
        return bool(waiting)

    def _submit(self, row: BatchRow) -> None:
        """Brings a prepared batch to the endpoint."""
        file = row.file or self._upload(row.key)
        try:
            batch = self._endpoint.create(file, self._mark(row.key))
        except EndpointFault as fault:
            if not fault.retry:  # perhaps the file is not there any more: the next start sends it anew
                self._journal.set_batch(row.key, file="")
            raise
        self._journal.set_batch(row.key, id=batch, state="submitted")
        self._console.say(f"batch {batch}: {row.requests:,} requests submitted")

    def _is_over_budget(self) -> bool:
        """Whether the budget was lowered below what is reserved already."""
        return not money.Budget.make(self._config, self._journal.totals()).try_reserve(0)

    def _upload(self, key: str) -> str:
        with self._temporary() as folder:
            path = folder / "requests.jsonl"
            with path.open("wb") as lines:
                for name, units in self._journal.batch_requests(key):
                    lines.write(_line(name, body_for(self._config, self._prompt, units)))
            file = self._endpoint.upload(path)
        self._journal.set_batch(key, file=file)
        return file

    def _mark(self, key: str) -> str:
        """What a batch is known by at the endpoint: no other journal's batch has it, nor another of this one."""
        journal = [self._journal.identity, self._journal.totals().began]
        return f"{hashlib.sha256(json.dumps(journal).encode()).hexdigest()[:20]}-{key}"

    # --- Looking at batches, and collecting them -----------------------------------------------

    def _look_at_all(self) -> bool:
        """Looks at every submitted batch once; whether one has ended."""
        ended, outage = False, ""
        for row in self._journal.batches():
            if row.state == "submitted" and not self._stop.asked:
                try:
                    ended |= self._look_at(row)
                except EndpointFault as fault:
                    if fault.reason == "not_found":
                        self._give_up(row)
                    elif not fault.retry:
                        raise
                    outage = str(fault)  # it passes: there will be another look
        if outage and not self._outage:
            self._console.say(f"the endpoint does not answer ({outage}); the batches are looked at again and again")
        self._outage = outage
        return ended

    def _look_at(self, row: BatchRow) -> bool:
        look = self._endpoint.look(row.id)
        self._looks[row.key] = look
        if look.status not in ENDED:
            return False
        if look.status == "failed" and not look.files:
            self._refused(row, look)
            return False
        self._collect(row, look)
        self._queue_full = False
        return True

    def _refused(self, row: BatchRow, look: BatchLook) -> None:
        """The endpoint did not take the batch as a whole: it is as it was before, for a later try."""
        if row.requests > self._config.batch.requests:
            self._journal.release(row.key)
            return
        self._journal.set_batch(row.key, id="", file="", state="prepared")
        others = any(other.state == "submitted" for other in self._journal.batches())
        if others and any(code == QUEUE_FULL for code, _ in look.errors):
            self._queue_full = True
            self._console.say(f"batch {row.id}: the endpoint's queue is full; waiting until another batch has ended")
            return
        said = "; ".join(message for _, message in look.errors[:3]) or "no reason given."
        raise NunerError(
            f"{self._config.endpoint.base_url} refused batch {row.id} of {row.requests:,} requests: {said} Nothing of "
            "it was done or billed, and its units stay pending; start again when that is corrected (lower "
            "config.batch.requests if it is too much at once)"
        )

    def _collect(self, row: BatchRow, look: BatchLook) -> None:
        """Puts the results of an ended batch into the journal; what is there already is passed over."""
        proven = self._journal.totals().done > 0
        waiting = dict(self._journal.batch_requests(row.key))
        results = Results(self._config, self._prompt, self._prices, waiting, proven)
        with self._temporary() as folder:
            paths = [folder / str(number) for number in range(len(look.files))]
            for file, path in zip(look.files if waiting else (), paths, strict=False):
                self._endpoint.download(file, path)
            self._record(results.of_lines(paths if waiting else ()))
        self._record(results.of_the_rest(look.status))
        self._journal.set_batch(row.key, state="collected")
        self._console.say(f"batch {row.id}: {look.status}, {row.requests:,} requests{results.oddities()}")
        if error := results.reason_to_stop():
            raise error

    def _give_up(self, row: BatchRow) -> None:
        """The endpoint does not know the batch, or a file of its results, any more."""
        if not self._config.request.retry_failed:
            raise NunerError(
                f"{self._config.endpoint.base_url} knows no batch {row.id}, or has no results of it; use the key of "
                "the account that it was made with. If it is gone there, config.request.retry_failed = True gives it "
                f"up: its {row.requests:,} requests are then made again, and what they cost is counted as unsure"
            )
        self._journal.set_batch(row.key, state="failed")
        given_up = self._journal.abandoned()
        self._console.say(f"batch {row.id}: gone at the endpoint; {given_up:,} units are asked for again")

    def _record(self, ends: Iterator[Finish]) -> None:
        while chunk := list(itertools.islice(ends, PAGE)):
            self._journal.finish_many(chunk)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A folder beside the journal, where there is room for what the journal can hold."""
        journal = self._journal.path
        folder = journal.with_name(f".{journal.name}.batch")
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    # --- What the user sees --------------------------------------------------------------------

    def _tell_estimate(self) -> None:
        totals = self._journal.totals()
        estimate = money.estimate(self._journal.sample(), totals.pending, self._prices)
        for line in estimate.lines(money.Budget.make(self._config, totals).left):
            self._console.say(f"estimate     {line}")

    def _progress(self, final: bool = False) -> None:
        totals = self._journal.totals()
        rows = self._journal.batches()
        looks = [self._looks[row.key] for row in rows if row.key in self._looks]
        parts = [f"request      {totals.done + totals.failed:,}/{totals.units:,} units"]
        if totals.failed:
            parts[0] += f" ({totals.failed:,} failed)"
        if rows:
            executed, all_ = sum(look.done for look in looks), sum(row.requests for row in rows)
            parts.append(f"{len(rows)} batches in flight with {executed:,}/{all_:,} requests executed")
        if self._prices.known:
            parts.append(money.progress(money.Budget.make(self._config, totals)))
        if self._outage:
            parts.append(f"the endpoint does not answer ({self._outage})")
        self._console.progress(", ".join(parts), final=final)


async def _check(config: ConfigDict) -> None:
    endpoint = LiveEndpoint(config)
    try:
        await endpoint.check()
    finally:
        await endpoint.close()


def _line(name: str, body: Mapping[str, Any]) -> bytes:
    """A line of a file of requests: ASCII, so that no character of a text passes for the end of a line."""
    line = {"custom_id": name, "method": "POST", "url": PATH, "body": body}
    return json.dumps(line).encode() + b"\n"
