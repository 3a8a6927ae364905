"""The journal: every unit, every attempt at it, and what that cost, on disk before it counts.

One SQLite file. Whatever `begin` and `finish` have returned from survives the end of the process and of the machine;
a process that starts again goes on from there. One process writes; others may read beside it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuner_jax.annotate.journal import rows
from nuner_jax.annotate.journal.file import Reserve, check, connect, hold, named, prepare
from nuner_jax.annotate.journal.rows import Finish, Sample, Totals
from nuner_jax.annotate.journal.writer import GroupWriter, Write
from nuner_jax.annotate.units import Completed, Outcome, Pending, Unit, Usage
from nuner_jax.errors import NunerError

__all__ = ["BatchRow", "Finish", "Journal", "Sample", "Totals"]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch of the endpoint's Batch API.

    file, id: the endpoint's names of the file and of the batch; "" until known. state: "prepared" (recorded here,
    perhaps not known to the endpoint), "submitted", "collected" or "failed". requests: how many it was made of.
    """

    key: str
    file: str
    id: str
    state: str
    requests: int


class Journal:
    """An open journal; see `open`. Methods that write return when the disk has it, and raise `NunerError` if it won't.

    The reading methods belong to one thread; `begin` and `finish` to any event loop.
    """

    def __init__(self, path: Path, reader: sqlite3.Connection, writer: GroupWriter | None, identity: dict[str, Any]):
        self.path = path
        self.identity = identity
        self._reader = reader
        self._writer = writer
        self._resources = contextlib.ExitStack()

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any] | None = None, *, read_only: bool = False) -> Journal:
        """Opens a journal; makes it if there is none.

        Args:
          path: the file. Beside it lie its `-wal` and `-shm`, the lock, and a reserve of space (see `Reserve`).
          identity: what the answers depend on (prompt, model, sampling), as JSON; compared with the journal's own.
            None: whichever it has (a new journal has none).
          read_only: only to read, which needs no lock and may happen while another process writes.

        Raises:
          NunerError: in use by another process; of another identity; no journal, damaged, or of a later program;
            read_only, and there is none; the folder cannot be written.
        """
        path = Path(path)
        with contextlib.ExitStack() as stack:
            writer = None
            if not read_only:
                stack.callback(hold(path).release)
                db = stack.enter_context(contextlib.closing(connect(path, write=True)))
                identity = prepare(path, db, identity)
                reserve = Reserve(path)
                reserve.take()
                stack.callback(reserve.give)
                with named(path):
                    writer = GroupWriter(path, db, reserve, rows.read_totals)
                stack.callback(writer.close)
            reader = stack.enter_context(contextlib.closing(connect(path, write=False)))
            if read_only:
                identity = check(path, reader, identity)
            journal = cls(path, reader, writer, identity)
            journal._resources = stack.pop_all()
            return journal

    def close(self) -> None:
        """Waits for what is being written, and gives the lock back. Closing twice is allowed."""
        self._resources.close()

    def __enter__(self) -> Journal:
        """The journal itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    # The selection

    def fingerprint(self) -> str | None:
        """That of the selection, as given to `set_units`; None before."""
        found = self._rows("SELECT value FROM meta WHERE key = 'fingerprint'")
        return json.loads(found[0][0]) if found else None

    def set_units(self, units: Iterable[Unit], fingerprint: str) -> None:
        """Makes `units` the selection, in their order; nothing happens if `fingerprint` is that of the present one.

        A text that comes twice is one unit, at its first place. Units of an earlier selection keep what is known of
        them, but have no place any more. `units` is read as a stream, by the journal's own thread.
        """
        if self.fingerprint() != fingerprint:
            self._write(functools.partial(rows.set_units, units=units, fingerprint=fingerprint))

    def pending(self, after: int, limit: int) -> list[Pending]:
        """At most `limit` units that may be asked for, with a position above `after` (-1: all), in order.

        Units that are being asked for, alone or in a batch, are not among them.
        """
        found = self._rows(
            "SELECT position, id, text, attempts - excused FROM units "
            "WHERE state = 'pending' AND position > ? ORDER BY position LIMIT ?",
            (after, limit),
        )
        return list(itertools.starmap(Pending, found))

    def abandoned(self) -> int:
        """Gives up what a dead process left in flight; returns how many attempts. Call once, at the start.

        Their units are pending again and the attempt does not count against a limit; their reserved money is counted
        as unsure. What is in an open batch stays in flight.
        """
        return self._write(rows.lose)

    def retry_failed(self) -> int:
        """Failed units of the selection become pending, with attempts counted from 0 again; returns how many."""
        return self._write(rows.retry_failed)

    def price(self, live: Callable[[Usage], int | None], batch: Callable[[Usage], int | None]) -> None:
        """Prices the answers that came while no price was known: what `live` or `batch` makes of their usage."""
        self._write(functools.partial(rows.price, live=live, batch=batch))

    # Requests

    async def begin(self, units: Sequence[Pending], reserved: int) -> str:
        """Records that `units` are going to be asked for in one request, which costs at most `reserved` picodollars.

        Returns:
          The request's name, for `finish`.

        Raises:
          ValueError: one of them is in flight or has ended.
        """
        return await self._writing().write(functools.partial(rows.begin, units=units, reserved=reserved))

    async def finish(
        self,
        request: str,
        outcomes: Sequence[Outcome],
        *,
        answer_id: str = "",
        usage: Usage | None = None,
        cost: int | None = 0,
        unsure: int = 0,
    ) -> None:
        """Records what became of a request.

        Args:
          request: as `begin` named it.
          outcomes: one for each of its units.
          answer_id: the endpoint's name of the answer.
          usage: tokens of the whole request; None: not known.
          cost: picodollars of the whole request; None: its price is not known.
          unsure: picodollars that may have been billed, at most, though no answer says so.

        Raises:
          ValueError: the request is not in flight, or is one of other units.
        """
        end = Finish(request, outcomes, answer_id, usage, cost, unsure)
        await self._writing().write(functools.partial(rows.finish, end=end), paid=True)

    def totals(self) -> Totals:
        """The sums over the journal at this moment."""
        if self._writer:
            return self._writer.totals
        with named(self.path):
            return rows.read_totals(self._reader)

    def sample(self) -> Sample:
        """What the requests answered so far cost, for `money.estimate`."""
        with named(self.path):
            return rows.read_sample(self._reader)

    # Batches

    def begin_batch(self, requests: Sequence[tuple[Sequence[Pending], int]]) -> tuple[str, list[str]]:
        """Records a batch of requests, each of some units and with the picodollars reserved for it.

        Returns:
          The batch's key, and the name of each request.

        Raises:
          ValueError: one of the units is in flight or has ended.
        """
        return self._write(functools.partial(rows.begin_batch, requests=requests))

    def set_batch(self, key: str, *, file: str | None = None, id: str | None = None, state: str | None = None) -> None:
        """Changes what is given of a batch; see `BatchRow`."""
        self._write(functools.partial(rows.set_batch, key=key, file=file, id=id, state=state), paid=True)

    def batches(self) -> list[BatchRow]:
        """The open ones (prepared or submitted), oldest first."""
        found = self._rows(
            "SELECT key, file, id, state, requests FROM batches WHERE state IN ('prepared', 'submitted') ORDER BY key"
        )
        return [BatchRow(str(key), *more) for key, *more in found]

    def batch_requests(self, key: str) -> Iterator[tuple[str, list[Pending]]]:
        """The requests of a batch that are still in flight, with their units; position -1: not in the selection."""
        found = self._stream(
            "SELECT request, ifnull(position, -1), id, text, attempts - 1 - excused FROM attempts "
            "JOIN units ON id = unit WHERE attempts.state = 'asked' AND batch = ? ORDER BY request, serial",
            (int(key),),
        )
        for request, units in itertools.groupby(found, key=operator.itemgetter(0)):
            yield str(request), [Pending(*unit) for _, *unit in units]

    def reserved(self, request: str) -> int:
        """Picodollars set aside for a request in flight."""
        return self._rows("SELECT reserved FROM attempts WHERE serial = ?", (int(request),))[0][0]

    def reserve(self, amounts: Iterable[tuple[str, int]]) -> None:
        """Sets aside other amounts (picodollars) for requests in flight."""
        self._write(functools.partial(rows.reserve, amounts=list(amounts)))

    def release(self, key: str) -> None:
        """Takes apart a batch that the endpoint never had: its units are pending, as if it had not been begun."""
        self._write(functools.partial(rows.release, key=key))

    def finish_many(self, ends: Iterable[Finish]) -> None:
        """`finish` for many requests, in one transaction: all of them or, with an error, none."""
        self._write(functools.partial(rows.finish_many, ends=list(ends)), paid=True)

    # What came of it

    def completions(self) -> Iterator[Completed]:
        """Every unit of the selection in order, as a stream."""
        found = self._stream(
            "SELECT position, id, text, source, CASE units.state WHEN 'asked' THEN 'pending' ELSE units.state END, "
            "CASE units.state WHEN 'done' THEN completion ELSE '' END, "
            "CASE units.state WHEN 'done' THEN finish ELSE '' END, "
            "CASE units.state WHEN 'failed' THEN error ELSE '' END "
            "FROM units LEFT JOIN attempts ON serial = last WHERE position IS NOT NULL ORDER BY position"
        )
        return itertools.starmap(Completed, found)

    def failures(self) -> dict[str, int]:
        """How many units of the selection failed for each reason, the most frequent first."""
        return self._reasons(
            "FROM units JOIN attempts ON serial = last WHERE units.state = 'failed' AND position IS NOT NULL"
        )

    def faults(self) -> dict[str, int]:
        """How many attempts did not succeed for each reason, the most frequent first."""
        return self._reasons("FROM attempts WHERE state IN ('retry', 'failed', 'lost')")

    def _reasons(self, rows_of: str) -> dict[str, int]:
        reason = "substr(error, 1, instr(error || ':', ':') - 1)"
        return dict(self._rows(f"SELECT {reason}, count(*) {rows_of} GROUP BY 1 ORDER BY 2 DESC, 1"))

    def _write(self, write: Write, *, paid: bool = False) -> Any:
        return self._writing().write_now(write, paid=paid)

    def _writing(self) -> GroupWriter:
        if self._writer is None:
            raise NunerError(f"{self.path}: this journal is open for reading only")
        return self._writer

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[tuple]:
        return list(self._stream(statement, values))

    def _stream(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple]:
        with named(self.path):
            yield from self._reader.execute(statement, values)
