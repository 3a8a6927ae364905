"""The journal under any sequence of uses, and with many callers at once."""

import asyncio
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from journals import IDENTITY, UNITS, ask, new

from nuner_jax.annotate.journal.journal import Finish, Journal, Totals
from nuner_jax.annotate.units import Outcome, Unit

# Any sequence of all that


class AnyUse(RuleBasedStateMachine):
    """A journal beside a model of it in plain Python; the two never differ."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    @initialize()
    def make(self):
        for file in self.path.glob("*"):
            file.unlink()
        self.journal = Journal.open(self.path / "journal.sqlite", IDENTITY)
        self.loop = asyncio.new_event_loop()
        self.selection, self.versions = [], 0
        self.state, self.attempts = {}, {}
        self.flying, self.batches = {}, {}
        self.spent = self.unsure = self.lost = self.asked = 0

    def teardown(self):
        self.journal.close()
        self.loop.close()

    @rule(places=st.permutations(range(6)), size=st.integers(0, 6))
    def select(self, places, size):
        self.versions += 1
        self.selection = [UNITS[place].id for place in places[:size]]
        self.journal.set_units([UNITS[place] for place in places[:size]], str(self.versions))
        for unit in self.selection:
            self.state.setdefault(unit, "pending")
            self.attempts.setdefault(unit, 0)

    def take(self, units, reserved, batch):
        for unit in units:
            self.state[unit.id] = "asked"
            self.attempts[unit.id] += 1
        self.asked += len(units)
        return [unit.id for unit in units], reserved, batch

    @rule(size=st.integers(1, 3), reserved=st.integers(0, 50))
    def begin(self, size, reserved):
        if units := self.journal.pending(-1, size):
            request = self.loop.run_until_complete(self.journal.begin(units, reserved))
            assert request not in self.flying
            self.flying[request] = self.take(units, reserved, None)

    @rule(size=st.integers(1, 3))
    def begin_batch(self, size):
        if units := self.journal.pending(-1, size):
            key, requests = self.journal.begin_batch([([unit], 10 + n) for n, unit in enumerate(units)])
            self.batches[key] = "prepared"
            for n, (request, unit) in enumerate(zip(requests, units, strict=True)):
                self.flying[request] = self.take([unit], 10 + n, key)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def finish(self, data):
        request = data.draw(st.sampled_from(sorted(self.flying)))
        units, reserved, batch = self.flying.pop(request)
        ends = [data.draw(st.sampled_from(["done", "retry", "failed"])) for _ in units]
        cost = data.draw(st.integers(0, reserved))
        outcomes = [Outcome(unit, end, f"of {unit}", "fault: 1") for unit, end in zip(units, ends, strict=True)]
        if batch is None:
            self.loop.run_until_complete(self.journal.finish(request, outcomes, cost=cost, unsure=reserved - cost))
        else:
            self.journal.finish_many([Finish(request, outcomes, cost=cost, unsure=reserved - cost)])
        self.state.update({unit: "pending" if end == "retry" else end for unit, end in zip(units, ends, strict=True)})
        self.spent, self.unsure = self.spent + cost, self.unsure + reserved - cost

    @rule()
    def start_again(self):
        self.journal.close()
        self.journal = Journal.open(self.path / "journal.sqlite", IDENTITY)
        lost = [request for request, (_, _, batch) in self.flying.items() if batch is None]
        for units, reserved, _ in map(self.flying.pop, lost):
            self.unsure += reserved
            self.lost += len(units)
            for unit in units:
                self.state[unit] = "pending"
                self.attempts[unit] -= 1
        before = self.journal.totals().lost
        assert self.journal.abandoned() == self.lost - before

    @rule()
    def retry_failed(self):
        failed = [unit for unit in self.selection if self.state[unit] == "failed"]
        assert self.journal.retry_failed() == len(failed)
        for unit in failed:
            self.state[unit], self.attempts[unit] = "pending", 0

    @invariant()
    def the_two_agree(self):
        states = [self.state[unit] for unit in self.selection]
        done, failed = states.count("done"), states.count("failed")
        totals = self.journal.totals()
        assert (totals.units, totals.pending, totals.done, totals.failed) == (
            len(states), len(states) - done - failed, done, failed
        )  # fmt: skip
        assert (totals.spent, totals.unsure, totals.lost, totals.attempts) == (
            self.spent, self.unsure, self.lost, self.asked
        )  # fmt: skip
        assert totals.reserved == sum(reserved for _, reserved, _ in self.flying.values())
        assert totals.in_flight == sum(len(units) for units, _, _ in self.flying.values())
        assert [(unit.id, unit.attempts) for unit in self.journal.pending(-1, 99)] == [
            (unit, self.attempts[unit]) for unit in self.selection if self.state[unit] == "pending"
        ]
        assert [(unit.id, unit.state, unit.completion) for unit in self.journal.completions()] == [
            (unit, "pending" if state == "asked" else state, f"of {unit}" if state == "done" else "")
            for unit, state in zip(self.selection, states, strict=True)
        ]
        flying = {request for key in self.batches for request, _ in self.journal.batch_requests(key)}
        assert flying == {request for request, (_, _, batch) in self.flying.items() if batch}


def test_any_sequence_of_uses_gives_the_journal_of_a_plain_model(tmp_path):
    run_state_machine_as_test(lambda: AnyUse(tmp_path), settings=settings(max_examples=40, stateful_step_count=30))


# Many callers


def test_64_callers_at_once_need_few_commits_and_none_disturbs_another(tmp_path):
    units = [Unit.of(f"text {number}", "a") for number in range(1000)]
    with new(tmp_path, units) as journal:
        commits = []
        journal._writer._db.set_trace_callback(
            lambda statement: commits.append(statement) if statement == "COMMIT" else None
        )
        shared = iter(journal.pending(-1, 1000))

        async def caller(number):
            for unit in shared:
                request = await journal.begin([unit], 100)
                if not unit.position % 10:
                    with pytest.raises(ValueError, match="not pending"):  # while others are in the same commit
                        await journal.begin([unit], 100)
                await journal.finish(request, [Outcome(unit.id, "done", unit.text)], cost=number)

        async def all_of_them():
            await asyncio.gather(*map(caller, range(64)))

        asyncio.run(all_of_them())
        assert len(commits) < 2 * 1000 / 10
        assert all(unit.completion == unit.text for unit in journal.completions())
        assert (journal.totals().done, journal.totals().attempts, journal.totals().in_flight) == (1000, 1000, 0)
    with new(tmp_path, units) as again:
        assert again.totals() == journal.totals()


def test_a_commit_waits_for_the_disk(tmp_path):
    """What a killed process cannot show, because the system keeps its writes, and a power cut would."""
    with new(tmp_path) as journal:
        settings = journal._writer.write_now(
            lambda db: (
                [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")],
                Totals(),
            )
        )
        assert settings == ["wal", 2]


def test_event_loops_and_plain_threads_may_write_at_the_same_time(tmp_path):
    units = [Unit.of(f"text {number}", "a") for number in range(400)]
    with new(tmp_path, units) as journal:
        page = journal.pending(-1, 400)

        def with_a_loop(part):
            for unit in part:
                ask(journal, [unit], ("done", unit.text), cost=1)

        def without(part):
            key, requests = journal.begin_batch([([unit], 5) for unit in part])
            for request, unit in zip(requests, part, strict=True):
                journal.finish_many([Finish(request, [Outcome(unit.id, "done", unit.text)], cost=1)])

        parts = [page[place::4] for place in range(4)]
        threads = [
            threading.Thread(target=target, args=(part,))
            for target, part in zip([with_a_loop, without, with_a_loop, without], parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (journal.totals().done, journal.totals().spent, journal.totals().reserved) == (400, 400, 0)
        assert all(unit.completion == unit.text for unit in journal.completions())


def test_a_caller_that_is_cancelled_while_it_waits_leaves_the_others_alone(tmp_path):
    with new(tmp_path) as journal:
        page = journal.pending(-1, 10)

        async def half_of_them_give_up():
            tasks = [asyncio.create_task(journal.begin([unit], 1)) for unit in page]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

        results = asyncio.run(half_of_them_give_up())
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        assert all(isinstance(result, str) for result in results[1::2])
        assert journal.totals().in_flight == 10  # those that nobody heard of are on disk too: they are lost later
