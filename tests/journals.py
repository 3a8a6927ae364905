"""What the tests of the journal share: a small one, ways to use it at once, and processes that use it."""

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import textwrap

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.units import Outcome, Unit

IDENTITY = {"model": "gpt", "temperature": 0.0, "prompt": {"template": "Label [INPUT SENTENCE]", "units": 1}}
UNITS = [Unit.of(f"text {number}", f"a.txt:{number + 1}") for number in range(10)]


def new(path, units=UNITS, fingerprint="all") -> Journal:
    journal = Journal.open(path / "journal.sqlite", IDENTITY)
    journal.set_units(iter(units), fingerprint)
    return journal


def ask(journal, units, *outcomes, reserved=100, **more) -> str:
    """One whole request; each outcome is (state, completion or error)."""

    async def whole():
        request = await journal.begin(units, reserved)
        await journal.finish(request, list(outcomes_of(units, outcomes)), **more)
        return request

    return asyncio.run(whole())


def outcomes_of(units, outcomes):
    for unit, (state, text) in zip(units, outcomes, strict=True):
        done = state == "done"
        yield Outcome(unit.id, state, text if done else "", "" if done else text, "stop" if done else "")


def begin(journal, units, reserved=100) -> str:
    return asyncio.run(journal.begin(units, reserved))


def rows(journal, statement, *values) -> list[tuple]:
    """Rows as another program reads them."""
    with contextlib.closing(sqlite3.connect(journal.path)) as db:
        return db.execute(statement, values).fetchall()


def start(script: str, *arguments) -> subprocess.Popen:
    """A process that runs the script; its stdin stays open until it is killed, wherever the tests' own comes from."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


HAMMER = """
    import asyncio, sys
    from pathlib import Path
    from nuner_jax.annotate.journal.journal import Journal
    from nuner_jax.annotate.units import Outcome

    async def caller(shared):
        for unit in shared:
            request = await journal.begin([unit], 3)
            print("begun", unit.id, flush=True)
            await journal.finish(request, [Outcome(unit.id, "done", unit.text)], cost=1)
            print("done", unit.id, flush=True)

    def endless():
        after = -1
        while page := journal.pending(after, 100):
            after = page[-1].position
            yield from page

    async def callers():
        shared = endless()
        await asyncio.gather(*(caller(shared) for _ in range(16)))

    with Journal.open(Path(sys.argv[1]), {}) as journal:
        journal.abandoned()
        print("open", flush=True)
        asyncio.run(callers())
        print("end", flush=True)
"""
