"""The journal: what a unit goes through, what is counted, and what a start finds of the one before."""

import asyncio
import sqlite3
import time

import pytest
from journals import UNITS, ask, begin, new, rows

from nuner_jax.annotate.journal.journal import BatchRow, Finish, Sample, Totals
from nuner_jax.annotate.units import Completed, Outcome, Pending, Usage
from nuner_jax.errors import NunerError

# One life of a unit


def test_units_are_pending_in_the_order_of_the_selection_until_they_end(tmp_path):
    with new(tmp_path) as journal:
        assert journal.pending(-1, 3) == [Pending(n, UNITS[n].id, UNITS[n].text, 0) for n in range(3)]
        assert [unit.position for unit in journal.pending(7, 10)] == [8, 9]
        page = journal.pending(-1, 10)
        ask(journal, [page[0]], ("done", "x <> y <> z"), usage=Usage(10, 5, 2), cost=70)
        ask(journal, [page[1]], ("retry", "timeout: 2 s"), unsure=100)
        ask(journal, [page[2]], ("failed", "refusal: no"), usage=Usage(10, 1), cost=20, answer_id="a-3")
        begin(journal, [page[3]])
        assert [(unit.position, unit.attempts) for unit in journal.pending(-1, 3)] == [(1, 1), (4, 0), (5, 0)]
        totals = journal.totals()
        assert (totals.began, totals.ended) == rows(journal, "SELECT min(began), max(ended) FROM attempts")[0]
        assert time.time() - 60 < totals.began <= totals.ended <= time.time()
        assert totals == Totals(
            units=10, pending=8, done=1, failed=1, attempts=4, in_flight=1, lost=0,
            prompt_tokens=20, completion_tokens=6, cached_tokens=2,
            spent=90, reserved=100, unsure=100, began=totals.began, ended=totals.ended,
        )  # fmt: skip
        assert journal.failures() == {"refusal": 1}
        assert journal.faults() == {"refusal": 1, "timeout": 1}
        assert journal.sample() == Sample(3, 2, 90, 70.0**2 + 20.0**2, 20, 6)
        assert list(journal.completions())[:4] == [
            Completed(0, UNITS[0].id, "text 0", "a.txt:1", "done", "x <> y <> z", "stop", ""),
            Completed(1, UNITS[1].id, "text 1", "a.txt:2", "pending", "", "", ""),
            Completed(2, UNITS[2].id, "text 2", "a.txt:3", "failed", "", "", "refusal: no"),
            Completed(3, UNITS[3].id, "text 3", "a.txt:4", "pending", "", "", ""),
        ]


def test_a_request_of_many_units_counts_its_money_once_and_gives_each_its_own_answer(tmp_path):
    with new(tmp_path) as journal:
        three = journal.pending(-1, 3)
        outcomes = [("done", "a"), ("retry", "missing_in_answer"), ("done", "c")]
        request = ask(journal, three, *outcomes, usage=Usage(30, 20, 10), cost=500, answer_id="id")
        assert rows(journal, "SELECT request, cost, reserved, prompt_tokens, answer_id, completion FROM attempts") == [
            (int(request), 500, 100, 30, "id", "a"),
            (int(request), 0, 0, 0, "", ""),
            (int(request), 0, 0, 0, "", "c"),
        ]
        assert (journal.totals().spent, journal.totals().reserved, journal.totals().prompt_tokens) == (500, 0, 30)
        assert journal.sample().requests == 1 and journal.sample().units == 2
        again = ask(journal, journal.pending(-1, 1), ("done", "b"))
        assert again != request
        assert [unit.completion for unit in journal.completions()][:3] == ["a", "b", "c"]


def test_outcomes_may_come_in_any_order(tmp_path):
    with new(tmp_path) as journal:
        request = begin(journal, journal.pending(-1, 3))
        asyncio.run(journal.finish(request, [Outcome(UNITS[n].id, "done", f"of {n}") for n in (2, 0, 1)]))
        assert [unit.completion for unit in journal.completions()][:3] == ["of 0", "of 1", "of 2"]


def test_a_unit_is_asked_for_by_one_request_at_a_time_and_never_after_its_end(tmp_path):
    with new(tmp_path) as journal:
        first, second = journal.pending(-1, 2)
        request = begin(journal, [first])
        with pytest.raises(ValueError, match=f"{first.id} is not pending"):
            begin(journal, [second, first])
        assert journal.pending(-1, 1) == [second]  # what that request had begun is undone
        assert journal.totals().attempts == 1
        done = [Outcome(first.id, "done", "x")]
        asyncio.run(journal.finish(request, done, cost=5))
        for twice in (request, "99"):
            with pytest.raises(ValueError, match=f"request {twice} is not in flight"):
                asyncio.run(journal.finish(twice, done, cost=5))
        with pytest.raises(ValueError, match="is not pending"):
            begin(journal, [first])
        assert journal.totals().spent == 5


@pytest.mark.parametrize("given", [[], [0], [0, 1, 2], [0, 0], [0, 0, 1]])
def test_an_end_that_is_not_of_just_its_units_is_refused(tmp_path, given):
    with new(tmp_path) as journal:
        request = begin(journal, journal.pending(-1, 2))
        with pytest.raises(ValueError, match="in flight with just the units"):
            asyncio.run(journal.finish(request, [Outcome(UNITS[n].id, "done") for n in given], cost=1))
        assert (journal.totals().in_flight, journal.totals().spent) == (2, 0)


def test_what_an_endpoint_may_write_is_kept_even_if_it_is_no_text(tmp_path):
    """JSON can spell halves of surrogate pairs, which have no UTF-8; and nothing paid for may be lost for that."""
    with new(tmp_path) as journal:
        first, second, third = journal.pending(-1, 3)
        ask(journal, [first], ("done", "a\x00b\ud83dc\ud83d\ude00 é\r\n\u2028"), answer_id="\udc00")
        ask(journal, [second], ("failed", "bad\udfff: x"))
        ask(journal, [third], ("done", ""))
        assert [unit.completion for unit in journal.completions()][:3] == ["a\x00b\ufffdc😀 é\r\n\u2028", "", ""]
        assert journal.failures() == {"bad\ufffd": 1}


# The selection


def test_a_new_selection_keeps_what_was_paid_for_and_forgets_the_rest(tmp_path):
    with new(tmp_path, UNITS[:6], "six") as journal:
        zero, one, two, *_ = journal.pending(-1, 6)
        ask(journal, [zero], ("done", "of 0"))
        ask(journal, [one], ("done", "of 1"))
        ask(journal, [two], ("failed", "refusal"))
        request = begin(journal, journal.pending(2, 1))  # text 3
        journal.set_units([UNITS[9], UNITS[1], UNITS[4]], "three")
        assert journal.fingerprint() == "three"
        assert [(unit.text, unit.completion) for unit in journal.completions()] == [
            ("text 9", ""), ("text 1", "of 1"), ("text 4", "")
        ]  # fmt: skip
        asyncio.run(journal.finish(request, [Outcome(UNITS[3].id, "done", "of 3")], cost=7))
        totals = journal.totals()
        assert (totals.units, totals.pending, totals.done, totals.failed) == (3, 2, 1, 0)
        assert (totals.attempts, totals.spent) == (4, 7)
        assert journal.retry_failed() == 0  # text 2 has no place
        journal.set_units(UNITS, "all")
        assert [unit.completion for unit in journal.completions()][:4] == ["of 0", "of 1", "", "of 3"]
        assert journal.totals().failed == 1


def test_the_same_selection_is_not_read_again(tmp_path):
    with new(tmp_path) as journal:
        journal.set_units(iter(lambda: pytest.fail("read"), None), "all")
        assert len(journal.pending(-1, 100)) == 10


def test_a_text_that_comes_twice_is_one_unit(tmp_path):
    with new(tmp_path, [UNITS[0], UNITS[1], UNITS[0], UNITS[2]]) as journal:
        assert [unit.text for unit in journal.pending(-1, 9)] == ["text 0", "text 1", "text 2"]
        assert journal.totals().units == 3


def test_a_source_that_fails_midway_leaves_the_old_selection(tmp_path):
    def broken():
        yield UNITS[5]
        raise NunerError("units.jsonl.gz: cut off")

    with new(tmp_path, UNITS[:2]) as journal:
        with pytest.raises(NunerError, match="cut off"):
            journal.set_units(broken(), "new")
        assert journal.fingerprint() == "all"
        assert [unit.text for unit in journal.pending(-1, 9)] == ["text 0", "text 1"]


def test_pages_and_answers_are_read_without_sorting_or_searching(tmp_path):
    with new(tmp_path) as journal:
        seen = []
        journal._reader.set_trace_callback(seen.append)
        journal.pending(3, 5)
        list(journal.completions())
        journal._reader.set_trace_callback(None)
        plans = [" | ".join(row[3] for row in journal._reader.execute(f"EXPLAIN QUERY PLAN {one}")) for one in seen]
        assert "USING INDEX units_pending (position>?)" in plans[0]
        assert "USING INDEX units_in_order" in plans[1] and "USING INTEGER PRIMARY KEY" in plans[1]
        assert "TEMP B-TREE" not in "".join(plans)


# Starting again


def test_what_a_dead_process_left_in_flight_is_lost_but_neither_its_money_nor_a_chance_of_the_unit(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 4)
        ask(journal, page[:1], ("retry", "timeout"))
        begin(journal, page[:2], reserved=100)
        begin(journal, page[2:3], reserved=30)
    with new(tmp_path) as journal:
        assert journal.totals().in_flight == 3
        assert [unit.position for unit in journal.pending(-1, 9)][0] == 3
        assert journal.abandoned() == 3
        totals = journal.totals()
        assert (totals.in_flight, totals.lost, totals.reserved, totals.unsure) == (0, 3, 0, 130)
        assert journal.pending(-1, 4) == [Pending(0, page[0].id, "text 0", 1), *page[1:]]
        assert journal.abandoned() == 0
        assert journal.faults() == {"lost": 3, "timeout": 1}
        ask(journal, page[:1], ("done", "x"))
        assert rows(journal, "SELECT attempt, state FROM attempts WHERE unit = ?", page[0].id) == [
            (1, "retry"), (2, "lost"), (3, "done")
        ]  # fmt: skip


def test_failed_units_are_asked_again_as_if_they_were_new(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 3)
        for _ in range(3):
            ask(journal, page[:1], ("retry", "server_error: 500"))
        ask(journal, page[:1], ("failed", "server_error: 500"))
        ask(journal, page[1:2], ("done", "x"))
        assert journal.retry_failed() == 1
        assert journal.pending(-1, 1) == page[:1]  # attempts: 0
        assert (journal.totals().failed, journal.totals().pending) == (0, 9)
        ask(journal, page[:1], ("retry", "timeout"))
        assert journal.pending(-1, 1)[0].attempts == 1
        assert journal.failures() == {}
        assert journal.faults() == {"server_error": 4, "timeout": 1}


def test_the_totals_of_a_start_are_those_of_the_end_before(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 4)
        ask(journal, page[:2], ("done", "x"), ("failed", "refusal"), usage=Usage(3, 2, 1), cost=2**60, unsure=2**59)
        begin(journal, page[2:3], reserved=2**58)
        before = journal.totals()
    with new(tmp_path) as journal:
        assert journal.totals() == before


# Batches


def test_a_batch_lives_on_in_the_journal_until_its_answers_are_collected(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 10)
        key, requests = journal.begin_batch([(page[:2], 70), (page[2:3], 30)])
        other, _ = journal.begin_batch([(page[3:4], 5)])
        assert (journal.totals().in_flight, journal.totals().reserved) == (4, 105)
        assert [unit.position for unit in journal.pending(-1, 2)] == [4, 5]
        journal.set_batch(key, file="file-1")
        journal.set_batch(key, id="batch-1", state="submitted")
    with new(tmp_path) as journal:
        assert journal.abandoned() == 0  # the endpoint is still working on them
        assert journal.batches() == [
            BatchRow(key, "file-1", "batch-1", "submitted", 2), BatchRow(other, "", "", "prepared", 1)
        ]  # fmt: skip
        assert list(journal.batch_requests(key)) == [(requests[0], page[:2]), (requests[1], page[2:3])]
        outcomes = [Outcome(page[0].id, "done", "a"), Outcome(page[1].id, "retry", error="missing_in_answer")]
        journal.finish_many(iter([Finish(requests[0], outcomes, "id", Usage(9, 9), 40)]))
        assert list(journal.batch_requests(key)) == [(requests[1], page[2:3])]
        journal.finish_many([Finish(requests[1], [Outcome(page[2].id, "failed", error="expired")], unsure=30)])
        journal.set_batch(key, state="collected")
        assert [batch.key for batch in journal.batches()] == [other]
        totals = journal.totals()
        assert (totals.spent, totals.unsure, totals.reserved, totals.done, totals.failed) == (40, 30, 5, 1, 1)
        assert [unit.position for unit in journal.pending(-1, 2)] == [1, 4]


def test_attempts_before_those_of_a_batch_are_told_when_it_is_collected(tmp_path):
    with new(tmp_path) as journal:
        first = journal.pending(-1, 1)
        ask(journal, first, ("retry", "timeout"))
        key, _ = journal.begin_batch([(journal.pending(-1, 1), 10)])
        journal.set_units(UNITS[1:], "without it")
        assert [units for _, units in journal.batch_requests(key)] == [[Pending(-1, UNITS[0].id, "text 0", 1)]]


@pytest.mark.parametrize("state", ["collected", "failed"])
def test_what_a_closed_batch_left_in_flight_is_lost_at_the_next_start(tmp_path, state):
    with new(tmp_path) as journal:
        key, _ = journal.begin_batch([(journal.pending(-1, 2), 10)])
        journal.set_batch(key, state=state)
        assert journal.abandoned() == 2
        assert (len(journal.pending(-1, 99)), journal.totals().unsure) == (10, 10)


def test_a_batch_is_recorded_wholly_or_not_at_all(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 3)
        with pytest.raises(ValueError, match="is not pending"):
            journal.begin_batch([(page[:2], 10), (page[1:], 10)])
        assert (journal.batches(), journal.pending(-1, 3), journal.totals().attempts) == ([], page, 0)
        key, requests = journal.begin_batch([([unit], 10) for unit in page])
        with pytest.raises(ValueError, match="not in flight"):
            journal.finish_many([Finish(name, [Outcome(page[0].id, "done", "x")], cost=1) for name in requests])
        assert len(list(journal.batch_requests(key))) == 3
        assert journal.totals().spent == 0
        with pytest.raises(ValueError, match="no batch 77"):
            journal.set_batch("77", state="submitted")
        with pytest.raises(sqlite3.IntegrityError):
            journal.set_batch(key, state="no such state")


def test_answers_without_a_price_get_one_when_it_is_known_those_of_batches_by_their_own(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 4)
        ask(journal, page[:2], ("done", "x"), ("done", "y"), usage=Usage(3, 2, 1), cost=None)
        ask(journal, page[2:3], ("done", "z"), usage=Usage(5, 5), cost=7)
        _, (request,) = journal.begin_batch([(page[3:4], 0)])
        journal.reserve([(request, 40)])
        assert (journal.totals().spent, journal.totals().reserved, journal.reserved(request)) == (7, 40, 40)
        journal.finish_many([Finish(request, [Outcome(page[3].id, "done", "w")], usage=Usage(4, 1), cost=None)])
        journal.price(lambda usage: 100 * usage.prompt + usage.cached, lambda usage: usage.prompt)
        assert (journal.totals().spent, journal.sample().cost) == (301 + 7 + 4, 301 + 7 + 4)
        journal.price(lambda usage: 1, lambda usage: 1)  # now all have one
        assert journal.totals().spent == 301 + 7 + 4
    with new(tmp_path) as journal:
        assert journal.totals().spent == 301 + 7 + 4


def test_a_batch_that_is_taken_apart_leaves_its_units_as_they_were(tmp_path):
    with new(tmp_path) as journal:
        before = journal.pending(-1, 4)
        first, _ = journal.begin_batch([(before[:2], 50)])
        journal.begin_batch([(before[2:3], 60)])
        journal.release(first)
        assert [row.key for row in journal.batches()] == ["2"]
        assert journal.pending(-1, 3) == [*before[:2], before[3]]
        totals = journal.totals()
        assert (totals.in_flight, totals.reserved, totals.unsure, totals.lost) == (1, 60, 0, 2)
        assert journal.faults() == {"not_sent": 2}
