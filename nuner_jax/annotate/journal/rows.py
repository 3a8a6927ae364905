"""What a journal's transactions write, and the sums over them; every function works on an open connection."""

from __future__ import annotations

import json
import operator
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nuner_jax.annotate.units import Outcome, Pending, Unit, Usage


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a journal. Money is in picodollars (1e-12 $), so sums are exact.

    units, pending, done, failed: units of the selection; `pending` are those without an end yet, asked or not.
    attempts: units asked for, repeats counted. in_flight: of them, those without an outcome yet.
    lost: those whose process ended before it, and those of batches that were never sent.
    spent: what answers cost, as far as prices were known. reserved: what those in flight may cost at most. unsure: what
      may have been billed without an answer reaching us (timeouts, cut connections, lost attempts), at most.
    began, ended: seconds since 1970 of the first attempt and of the last outcome; None if there is none.
    """

    units: int = 0
    pending: int = 0
    done: int = 0
    failed: int = 0
    attempts: int = 0
    in_flight: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    spent: int = 0
    reserved: int = 0
    unsure: int = 0
    began: float | None = None
    ended: float | None = None

    def __add__(self, other: Totals) -> Totals:
        """Both together."""
        began = [time for time in (self.began, other.began) if time is not None]
        ended = [time for time in (self.ended, other.ended) if time is not None]
        return Totals(
            *map(operator.add, _COUNTS(self), _COUNTS(other)), min(began, default=None), max(ended, default=None)
        )


_COUNTS = operator.attrgetter(*(name for name in Totals.__slots__ if name not in ("began", "ended")))


@dataclass(frozen=True, slots=True)
class Sample:
    """What the answered requests of a journal cost, to judge others by.

    requests: with an outcome (retries and failures too). units: that ended by them, done or failed.
    cost: sum over the requests, in picodollars. squares: sum of the squares of their costs.
    """

    requests: int
    units: int
    cost: int
    squares: float
    prompt_tokens: int
    completion_tokens: int


class Finish(NamedTuple):
    """The end of a request: see `Journal.finish`."""

    request: str
    outcomes: Sequence[Outcome]
    answer_id: str = ""
    usage: Usage | None = None
    cost: int | None = 0
    unsure: int = 0


def read_totals(db: sqlite3.Connection) -> Totals:
    """The sums, from the rows; takes about a second per million rows."""
    states = dict(db.execute("SELECT state, count(*) FROM units WHERE position IS NOT NULL GROUP BY state"))
    sums = db.execute(
        "SELECT count(*), total(state = 'asked'), total(state = 'lost'), ifnull(sum(prompt_tokens), 0), "
        "ifnull(sum(completion_tokens), 0), ifnull(sum(cached_tokens), 0), ifnull(sum(cost), 0), "
        "ifnull(sum(reserved) FILTER (WHERE state = 'asked'), 0), ifnull(sum(unsure), 0), min(began), max(ended) "
        "FROM attempts"
    ).fetchone()
    attempts, in_flight, lost, *rest = sums
    done, failed = states.get("done", 0), states.get("failed", 0)
    units = sum(states.values())
    return Totals(units, units - done - failed, done, failed, attempts, int(in_flight), int(lost), *rest)


def read_sample(db: sqlite3.Connection) -> Sample:
    """The sample of everything answered so far, from the rows."""
    return Sample(
        *db.execute(
            "SELECT count(*), ifnull(sum(units), 0), ifnull(sum(cost), 0), total(1.0 * cost * cost), "
            "ifnull(sum(prompt), 0), ifnull(sum(completion), 0) FROM (SELECT sum(cost) AS cost, "
            "sum(state IN ('done', 'failed')) AS units, sum(prompt_tokens) AS prompt, "
            "sum(completion_tokens) AS completion "
            "FROM attempts WHERE state IN ('done', 'retry', 'failed') GROUP BY request)"
        ).fetchone()
    )


def set_units(db: sqlite3.Connection, units: Iterable[Unit], fingerprint: str) -> tuple[None, None]:
    """Makes these units the selection, in their order."""
    db.execute("UPDATE units SET position = NULL WHERE position IS NOT NULL")
    db.executemany(
        "INSERT INTO units (position, id, text, source) VALUES (?, ?, ?, ?) ON CONFLICT (id) "
        "DO UPDATE SET position = excluded.position, source = excluded.source WHERE position IS NULL",
        ((position, unit.id, unit.text, unit.source) for position, unit in enumerate(units)),
    )
    db.execute("INSERT OR REPLACE INTO meta VALUES ('fingerprint', ?)", (json.dumps(fingerprint),))
    return None, None


def begin(
    db: sqlite3.Connection, units: Sequence[Pending], reserved: int, batch: int | None = None
) -> tuple[str, Totals]:
    """One request: a row in flight for each of its units; its name is the serial of the first."""
    if not units:
        raise ValueError("a request without units")
    now = time.time()
    request = db.execute("SELECT ifnull(max(serial), 0) + 1 FROM attempts").fetchone()[0]
    for serial, unit in enumerate(units, start=request):
        inserted = db.execute(
            "INSERT INTO attempts (serial, request, batch, unit, attempt, reserved, began) "
            "SELECT ?, ?, ?, id, attempts + 1, ?, ? FROM units WHERE id = ? AND state = 'pending'",
            (serial, request, batch, reserved if serial == request else 0, now, unit.id),
        )
        if inserted.rowcount != 1:
            raise ValueError(f"unit {unit.id} is not pending: asked for already, answered, or not in the journal")
        db.execute(
            "UPDATE units SET state = 'asked', attempts = attempts + 1, last = ? WHERE id = ?", (serial, unit.id)
        )
    return str(request), Totals(attempts=len(units), in_flight=len(units), reserved=reserved, began=now)


def begin_batch(
    db: sqlite3.Connection, requests: Sequence[tuple[Sequence[Pending], int]]
) -> tuple[tuple[str, list[str]], Totals]:
    """A batch and all its requests."""
    batch = db.execute("INSERT INTO batches (requests) VALUES (?)", (len(requests),)).lastrowid
    names, totals = [], Totals()
    for units, reserved in requests:
        name, added = begin(db, units, reserved, batch)
        names.append(name)
        totals += added
    return (str(batch), names), totals


def set_batch(db: sqlite3.Connection, key: str, **values: str | None) -> tuple[None, Totals]:
    """Changes those of a batch's `file`, `id` and `state` that are not None."""
    columns = {name: value for name, value in values.items() if value is not None}
    changes = ", ".join(f"{name} = ?" for name in columns)
    if db.execute(f"UPDATE batches SET {changes} WHERE key = ?", (*columns.values(), int(key))).rowcount != 1:
        raise ValueError(f"there is no batch {key}")
    return None, Totals()


def finish(db: sqlite3.Connection, end: Finish) -> tuple[None, Totals]:
    """The outcome of every unit of a request, and its money."""
    now = time.time()
    rows = db.execute(
        "SELECT serial, unit, reserved, position IS NOT NULL FROM attempts JOIN units ON units.id = unit "
        "WHERE request = ? AND attempts.state = 'asked' ORDER BY serial",
        (int(end.request),),
    ).fetchall()
    outcomes = {outcome.unit: outcome for outcome in end.outcomes}
    if not rows or outcomes.keys() != {unit for _, unit, _, _ in rows} or len(outcomes) != len(end.outcomes):
        raise ValueError(f"request {end.request} is not in flight with just the units {', '.join(outcomes)}")
    usage = end.usage or Usage()
    money = (end.cost, end.unsure, usage.prompt, usage.completion, usage.cached, _sound(end.answer_id))
    ended = dict.fromkeys(("done", "failed"), 0)
    for serial, unit, _, selected in rows:
        outcome = outcomes[unit]
        db.execute(
            "UPDATE attempts SET state = ?, completion = ?, error = ?, finish = ?, ended = ?, cost = ?, unsure = ?, "
            "prompt_tokens = ?, completion_tokens = ?, cached_tokens = ?, answer_id = ? WHERE serial = ?",
            (
                *(outcome.state, _sound(outcome.completion), _sound(outcome.error), _sound(outcome.finish), now),
                *(money if serial == rows[0][0] else (0, 0, 0, 0, 0, "")),
                serial,
            ),
        )
        state = "pending" if outcome.state == "retry" else outcome.state
        db.execute("UPDATE units SET state = ? WHERE id = ?", (state, unit))
        if state != "pending" and selected:
            ended[state] += 1
    return None, Totals(
        **ended,
        pending=-sum(ended.values()),
        in_flight=-len(rows),
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        cached_tokens=usage.cached,
        spent=end.cost or 0,
        reserved=-sum(reserved for _, _, reserved, _ in rows),
        unsure=end.unsure,
        ended=now,
    )


def finish_many(db: sqlite3.Connection, ends: Iterable[Finish]) -> tuple[None, Totals]:
    """Many of them."""
    totals = Totals()
    for end in ends:
        totals += finish(db, end)[1]
    return None, totals


def lose(db: sqlite3.Connection) -> tuple[int, None]:
    """Attempts in flight that nobody waits for any more are lost; what they may have cost stays counted.

    Those of an open batch are not: the endpoint keeps their answers.
    """
    open_ = "SELECT key FROM batches WHERE state IN ('prepared', 'submitted')"
    return _excuse(db, f"(batch IS NULL OR batch NOT IN ({open_}))", "unsure = reserved, error = 'lost'"), None


def release(db: sqlite3.Connection, key: str) -> tuple[None, None]:
    """Takes apart a batch that never reached the endpoint: its units are pending again, and nothing was billed."""
    _excuse(db, f"batch = {int(key)}", "error = 'not_sent'")
    set_batch(db, key, state="failed")
    return None, None


def reserve(db: sqlite3.Connection, amounts: Iterable[tuple[str, int]]) -> tuple[None, None]:
    """Other amounts for requests in flight."""
    db.executemany(
        "UPDATE attempts SET reserved = ? WHERE serial = ? AND state = 'asked'",
        ((amount, int(request)) for request, amount in amounts),
    )
    return None, None


def _excuse(db: sqlite3.Connection, which: str, change: str) -> int:
    """Ends attempts in flight as lost; no fault of their units, so it does not count against the limit of attempts."""
    which = f"state = 'asked' AND {which}"
    units = f"id IN (SELECT unit FROM attempts WHERE {which})"
    db.execute(f"UPDATE units SET state = 'pending', excused = excused + 1 WHERE {units}")
    return db.execute(f"UPDATE attempts SET state = 'lost', {change}, ended = ? WHERE {which}", (time.time(),)).rowcount


def price(
    db: sqlite3.Connection, live: Callable[[Usage], int | None], batch: Callable[[Usage], int | None]
) -> tuple[None, None]:
    """Prices the answers that came while no price was known, those of batches by their own."""
    unpriced = db.execute(
        "SELECT serial, batch IS NOT NULL, prompt_tokens, completion_tokens, cached_tokens FROM attempts "
        "WHERE cost IS NULL"
    ).fetchall()
    costs = (((batch if batched else live)(Usage(*tokens)), serial) for serial, batched, *tokens in unpriced)
    db.executemany("UPDATE attempts SET cost = ? WHERE serial = ?", costs)
    return None, None


def retry_failed(db: sqlite3.Connection) -> tuple[int, None]:
    """Failed units of the selection are pending again, as if they had not been asked for."""
    rows = db.execute(
        "UPDATE units SET state = 'pending', excused = attempts WHERE state = 'failed' AND position IS NOT NULL"
    )
    return rows.rowcount, None


def _sound(text: str) -> str:
    """The text without halves of surrogate pairs: JSON may spell them, but they are no characters and have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
