"""The one thread that writes a journal: what is asked for meanwhile is committed together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nuner_jax.annotate.journal.file import Reserve, named
from nuner_jax.errors import NunerError

Write = Callable[[sqlite3.Connection], tuple[Any, Any]]
"""A piece of a transaction: writes, and returns its result and what it adds to the totals (None: sum them anew)."""

_Answer = tuple[Any, Exception | None]
_OF_THE_FILE = (sqlite3.OperationalError, sqlite3.DatabaseError)
"""Errors that concern all writes of a group, and not the one that met them; their subclasses are another matter."""


class _Asked(NamedTuple):
    write: Write
    paid: bool
    future: asyncio.Future | concurrent.futures.Future
    loop: asyncio.AbstractEventLoop | None


class GroupWriter:
    """Runs writes in a thread of its own, many in one transaction, and answers each after the COMMIT.

    A commit waits for the disk; 64 callers that wait together need one commit, not 64. A write that raises is undone
    by itself and only its caller hears of it. If the commit fails (full disk), all of the group is undone and each
    caller gets the error; later writes are tried anew.

    Writes of what is paid for have the reserve to fall back on. Once it is used, others wait until it is whole again.
    """

    def __init__(
        self, path: Path, db: sqlite3.Connection, reserve: Reserve, read_totals: Callable[[sqlite3.Connection], Any]
    ):
        self.totals = read_totals(db)  # replaced after a commit, so whoever reads it has sums that belong together
        self._read_totals = read_totals
        self._path = path
        self._db = db
        self._reserve = reserve
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._closed = False
        # A daemon: a program that fails without closing the journal must be able to end.
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    async def write(self, write: Write, *, paid: bool = False) -> Any:
        """The result of a write, once it is on disk; `paid`: it records what money was spent on."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._ask(_Asked(write, paid, future, loop))
        return await future

    def write_now(self, write: Write, *, paid: bool = False) -> Any:
        """The same for a caller without an event loop."""
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._ask(_Asked(write, paid, future, None))
        return future.result()

    def close(self) -> None:
        """Returns when everything asked for is answered and the thread has ended."""
        if not self._closed:
            self._closed = True
            self._asked.put(None)
        self._thread.join()

    def _ask(self, asked: _Asked) -> None:
        if self._closed:
            raise NunerError(f"{self._path}: the journal is closed")
        self._asked.put(asked)

    def _run(self) -> None:
        open_ = True
        while open_:
            group = [self._asked.get()]
            while not self._asked.empty():
                group.append(self._asked.get())
            open_ = None not in group
            self._serve([asked for asked in group if asked is not None])

    def _serve(self, group: list[_Asked]) -> None:
        """Commits and answers; if that fails, once more for what is paid for, at last with the reserve."""
        paid = [asked for asked in group if asked.paid]
        rest = [asked for asked in group if not asked.paid]
        try:
            if rest:
                self._reserve.take()
            answers = self._commit([asked.write for asked in group])
        except Exception as error:
            again = paid and (rest or self._reserve.give())
            failed = rest if again else group
            _answer(failed, [(None, error)] * len(failed))
            if again:
                self._serve(paid)
        else:
            _answer(group, answers)

    def _commit(self, writes: list[Write]) -> list[_Answer]:
        """One transaction; for each write its result, or the error that is its own."""
        db, totals, answers = self._db, self.totals, []
        try:
            with named(self._path):
                db.execute("BEGIN IMMEDIATE")
                for write in writes:
                    db.execute("SAVEPOINT one")
                    try:
                        result, added = write(db)
                        totals = self._read_totals(db) if added is None else totals + added
                        answers.append((result, None))
                    except Exception as error:
                        if type(error) in _OF_THE_FILE:
                            raise
                        db.execute("ROLLBACK TO one")
                        answers.append((None, error))
                    db.execute("RELEASE one")
                db.execute("COMMIT")
        except Exception:
            with contextlib.suppress(sqlite3.Error):  # SQLite may have done so by itself
                db.execute("ROLLBACK")
            raise
        self.totals = totals
        return answers


def _answer(group: list[_Asked], answers: list[_Answer]) -> None:
    """Tells every caller; those of an event loop together, because waking it costs."""
    loops: dict[asyncio.AbstractEventLoop, list] = {}
    for asked, answer in zip(group, answers, strict=True):
        if asked.loop is None:
            _resolve([(asked.future, answer)])
        else:
            loops.setdefault(asked.loop, []).append((asked.future, answer))
    for loop, resolved in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_resolve, resolved)


def _resolve(resolved: list[tuple[Any, _Answer]]) -> None:
    for future, (result, error) in resolved:
        if future.cancelled():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
