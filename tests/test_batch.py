"""The Batch API: every unit ends once, whatever the endpoint or a kill does, and the money is that of the server."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from fake_answers import completion_of, recorded
from fake_openai import Bill, FakeOpenAI

from nuner_jax import config as config_lib
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.money import PICO
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request import batch
from nuner_jax.annotate.request.batch_endpoint import MARK
from nuner_jax.annotate.units import Unit
from nuner_jax.errors import NunerError
from nuner_jax.writers import Console

KEY = "sk-batch-0123456789-secret"
TESTS = pathlib.Path(__file__).parent


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("NUNER_TEST_KEY", KEY)


@pytest.fixture
def fake():
    with FakeOpenAI(key=KEY) as server:
        yield server


def make_config(base_url, **changes):
    config = config_lib.annotate()
    config.endpoint.update(kind="batch", base_url=base_url, model="fake-model", key_variable="NUNER_TEST_KEY")
    config.request.update(backoff=0.01, pilot=0, timeout=20.0)
    config.price.update(input=0.15, output=0.6)
    config.batch.update(requests=40, poll=0.01)
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def open_journal(config, workdir, units) -> Journal:
    journal = Journal.open(workdir / "journal.sqlite", {"model": config.endpoint.model})
    texts = itertools.islice(recorded(), units)
    journal.set_units((Unit.of(text, f"sample:{at}") for at, text in enumerate(texts, start=1)), str(units))
    return journal


def annotate(base_url, workdir, units, *, console=None, pilot_only=False, **changes):
    """One start; returns its summary and what the journal then holds of every unit."""
    config = make_config(base_url, **changes)
    with open_journal(config, workdir, units) as journal:
        summary = batch.run(
            config, journal, Prompt.make(config.prompt), console=console or Console(False), pilot_only=pilot_only
        )
        return summary, list(journal.completions())


def totals_of(workdir):
    with Journal.open(workdir / "journal.sqlite", read_only=True) as journal:
        return journal.totals()


def price(bill: Bill) -> int:
    """Picodollars of a bill at the prices of `make_config`, at half of them as is usual for batches."""
    return (bill.prompt * 150_000 + bill.completion * 600_000) // 2


def assert_all_done_once(fake, completed, units):
    assert len(completed) == units
    assert {row.state for row in completed} == {"done"}
    assert all(row.completion == completion_of(row.text) for row in completed)
    assert set(fake.answered().values()) == {1}


class Lines(Console):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(False)
        self.lines = []

    def say(self, line=""):
        self.lines.append(line)


# --- Whole runs ------------------------------------------------------------------------------------


def test_everything_at_once_goes_wrong_and_every_unit_still_ends_once_and_is_paid_once(tmp_path, fake):
    fake.faults = dict.fromkeys(("line_429", "line_500", "empty", "line_duplicate", "line_unknown"), 0.05)
    fake.faults |= dict.fromkeys(("line_broken", "line_missing"), 0.02) | {"refusal": 0.01, "content_filter": 0.01}
    fake.batches.fates = {2: "expired", 4: "cancelled", 7: "expired", 8: "token_limit_exceeded", 10: "failed_late"}
    fake.batches.failing = {
        "upload": {1: 500, 3: "lost", 5: 429},
        "create": {2: 503, 4: "lost", 6: "cut"},
        "poll": {2: "lost", 5: 500, 9: "cut", 12: 503},
        "list": {1: 500},
        "download": {2: "cut", 5: 500, 6: "lost"},
    }
    units, bytes_ = 500, 30_000  # of about 1000 bytes each
    console = Lines()
    summary, completed = annotate(
        fake.base_url, tmp_path, units, console=console, batch__bytes=bytes_, batch__in_flight=3
    )

    assert summary.stopped == "finished"
    assert len(completed) == units
    states = {row.text: row.state for row in completed}
    assert set(states.values()) == {"done", "failed"}
    for row in completed:
        if row.state == "done":
            assert row.completion == completion_of(row.text)
            assert fake.answered()[row.text] <= 1, "asked again after a whole answer"
        else:
            assert row.error.split(":")[0] in ("refusal", "content_filter")
    good = [e.texts[0] for e in fake.log if e.what in ("ok", "line_duplicate", "line_unknown")]
    assert len(good) == len(set(good)) == sum(state == "done" for state in states.values())

    totals = summary.totals
    assert totals.spent == price(fake.delivered)
    assert totals.prompt_tokens == fake.delivered.prompt and totals.completion_tokens == fake.delivered.completion
    assert price(fake.billed) <= totals.spent + totals.unsure
    assert totals.reserved == totals.in_flight == totals.pending == 0

    marks = [made.metadata[MARK] for made in fake.batches.created if not made.errors]
    assert len(marks) == len(set(marks)), "a batch was created twice"
    assert fake.batches.peak == 3
    assert max(len(made.lines) for made in fake.batches.created) <= 40
    assert bytes_ * 0.9 < max(made.size for made in fake.batches.created) <= bytes_
    said = "\n".join(console.lines)
    for oddity in (
        "repeated lines",
        "lines of no open request",
        "unreadable lines",
        "without a result",
        "queue is full",
    ):
        assert oddity in said
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not list(tmp_path.glob(".batch-*"))


def test_several_sentences_share_a_request_and_those_left_out_are_asked_for_alone(tmp_path, fake):
    fake.faults = {"left_out": 0.5}
    _, completed = annotate(fake.base_url, tmp_path, 60, prompt__units_per_request=4)
    assert {row.state for row in completed} == {"done"}
    assert all(row.completion == completion_of(row.text) for row in completed)
    sizes = [len(entry.texts) for entry in fake.log]
    left_out = sum(entry.what == "left_out" and len(entry.texts) > 1 for entry in fake.log)
    assert left_out and sizes.count(4) == 15 and sizes.count(1) == left_out
    assert totals_of(tmp_path).spent == price(fake.billed)


def test_a_unit_that_is_never_answered_fails_with_its_reason_after_so_many_attempts(tmp_path, fake):
    fake.faults = {"empty": 1.0}
    _, completed = annotate(fake.base_url, tmp_path, 5, request__max_attempts=3)
    assert {(row.state, row.error) for row in completed} == {("failed", "empty_answer")}
    assert set(fake.attempts().values()) == {3}


def test_the_pilot_is_a_small_first_batch_and_tells_what_all_would_cost(tmp_path, fake):
    console = Lines()
    summary, completed = annotate(fake.base_url, tmp_path, 90, console=console, pilot_only=True, request__pilot=10)
    assert summary.stopped == "pilot"
    assert [len(made.lines) for made in fake.batches.created] == [10]
    assert [row.state for row in completed] == ["done"] * 10 + ["pending"] * 80
    assert any("80 units to go" in line and "$" in line for line in console.lines)
    summary, completed = annotate(fake.base_url, tmp_path, 90, request__pilot=10)
    assert [len(made.lines) for made in fake.batches.created] == [10, 40, 40]
    assert_all_done_once(fake, completed, 90)


# --- Kills -----------------------------------------------------------------------------------------

SCRIPT = """
import os, pathlib, signal, sys
import test_batch
from nuner_jax.annotate.request import batch
from nuner_jax.annotate.journal.journal import Journal
base_url, workdir, units, ends = sys.argv[1:]
if int(ends):
    batch.PAGE, real, calls = 7, Journal.finish_many, []
    def finish_many(self, chunk):
        real(self, chunk)
        calls.append(1)
        if len(calls) == int(ends):
            os.kill(os.getpid(), signal.SIGKILL)
    Journal.finish_many = finish_many
test_batch.annotate(base_url, pathlib.Path(workdir), int(units), console=batch.Console(True))
"""


def start(fake, workdir, units, ends=0) -> subprocess.Popen:
    """A process that annotates; with `ends`, it kills itself after writing so many pages of results."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, fake.base_url, str(workdir), str(units), str(ends)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "event", ["upload", "upload.done", "create", "create.done", "poll", "download", "download.half"]
)
def test_killed_while_at_the_endpoint_the_next_start_goes_on_without_a_second_batch(tmp_path, fake, event):
    reached = fake.hold(event)
    process = start(fake, tmp_path, 100)
    try:
        assert reached.wait(30)
    finally:
        process.kill()
        process.communicate(timeout=30)
    fake.release(event)
    _, completed = annotate(fake.base_url, tmp_path, 100)
    assert_all_done_once(fake, completed, 100)
    assert sorted(len(made.lines) for made in fake.batches.created) == [20, 40, 40]
    # A file that the endpoint has is used, unless the kill came before its id was known.
    assert fake.batches.events.count("upload") == 3 + event.startswith("upload")
    totals = totals_of(tmp_path)
    assert (totals.attempts, totals.spent, totals.unsure) == (100, price(fake.billed), 0)


@pytest.mark.parametrize("ends", [1, 4, 6])
def test_killed_in_the_middle_of_collecting_nothing_is_lost_or_counted_twice(tmp_path, fake, ends):
    process = start(fake, tmp_path, 100, ends)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert 0 < totals_of(tmp_path).done < 100
    _, completed = annotate(fake.base_url, tmp_path, 100)
    assert_all_done_once(fake, completed, 100)
    assert len(fake.batches.created) == 3
    assert totals_of(tmp_path).spent == price(fake.billed)


def test_interrupted_it_leaves_the_batches_to_the_endpoint_and_collects_them_later(tmp_path, fake):
    fake.batches.fates = {1: "never", 2: "never", 3: "never"}
    process = start(fake, tmp_path, 100)
    try:
        while fake.batches.events.count("poll") < 6:
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "3 batches go on at the endpoint" in said
    for made in fake.batches.created:
        made.fate = "completed"
    _, completed = annotate(fake.base_url, tmp_path, 100)
    assert_all_done_once(fake, completed, 100)
    assert len(fake.batches.created) == 3


# --- Money -----------------------------------------------------------------------------------------


def test_the_budget_is_never_exceeded_with_several_batches_in_flight(tmp_path, fake):
    _, everything = annotate(fake.base_url, tmp_path / "all", 200)
    cap = price(fake.billed) * 0.6 / PICO
    with FakeOpenAI(key=KEY) as other:
        summary, completed = annotate(other.base_url, tmp_path / "some", 200, request__budget=cap)
        assert summary.stopped == "budget"
        assert 0.5 * cap * PICO < price(other.billed) == summary.totals.spent <= cap * PICO
        assert 0 < sum(row.state == "pending" for row in completed) < 120
        summary, completed = annotate(other.base_url, tmp_path / "some", 200, request__budget=10 * cap)
        assert summary.stopped == "finished"
        assert_all_done_once(other, completed, 200)
    assert completed == everything


def test_a_batch_that_was_only_prepared_is_not_submitted_once_the_budget_is_lowered_below_it(tmp_path, fake):
    fake.batches.failing = {"upload": dict.fromkeys(range(1, 7), 500)}
    with pytest.raises(NunerError, match="HTTP 500"):
        annotate(fake.base_url, tmp_path, 40)
    assert totals_of(tmp_path).reserved > 0
    summary, _ = annotate(fake.base_url, tmp_path, 40, request__budget=1e-6)
    assert summary.stopped == "budget" and not fake.batches.created
    assert summary.totals.reserved == 0
    _, completed = annotate(fake.base_url, tmp_path, 40)
    assert_all_done_once(fake, completed, 40)


# --- Refusals --------------------------------------------------------------------------------------


def test_a_batch_that_fails_its_validation_stops_the_run_and_its_units_stay_as_they_were(tmp_path, fake):
    fake.batches.fates = {2: "failed"}
    with pytest.raises(NunerError, match="refused batch batch_2 of 40 requests: line 1: This line is not parseable"):
        annotate(fake.base_url, tmp_path, 100)
    _, completed = annotate(fake.base_url, tmp_path, 100)
    assert_all_done_once(fake, completed, 100)
    totals = totals_of(tmp_path)
    assert (totals.attempts, totals.spent) == (100, price(fake.billed))


def test_too_large_a_batch_for_the_endpoint_goes_in_smaller_ones_once_the_config_says_so(tmp_path, fake):
    fake.batches.most_requests = 25
    with pytest.raises(
        NunerError, match=r"refused batch batch_1 of 40 requests: The file is too large.*batch\.requests"
    ):
        annotate(fake.base_url, tmp_path, 100)
    _, completed = annotate(fake.base_url, tmp_path, 100, batch__requests=25)
    assert_all_done_once(fake, completed, 100)
    assert max(len(made.lines) for made in fake.batches.created if made.status == "completed") == 25


def test_a_wrong_key_stops_at_once_and_leaves_everything_for_the_right_one(tmp_path, fake):
    fake.batches.fates = {1: "never"}
    process = start(fake, tmp_path, 40)
    try:
        while fake.batches.events.count("poll") < 2:
            assert process.poll() is None, process.communicate()
        fake.key = "another"
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "refuses the key (HTTP 401)" in said and KEY not in said
    polls = fake.batches.events.count("poll")
    with pytest.raises(NunerError, match="NUNER_TEST_KEY"):
        annotate(fake.base_url, tmp_path, 40)
    assert fake.batches.events.count("poll") == polls
    fake.key, fake.batches.created[0].fate = KEY, "completed"
    _, completed = annotate(fake.base_url, tmp_path, 40)
    assert_all_done_once(fake, completed, 40)


def test_an_endpoint_that_rejects_every_request_stops_the_run_and_no_unit_is_given_up(tmp_path, fake):
    fake.faults = {"line_400": 1.0}
    with pytest.raises(NunerError, match="rejects every request, 40 so far, with 'HTTP 400: The fake endpoint"):
        annotate(fake.base_url, tmp_path, 40)
    assert totals_of(tmp_path).failed == 0
    fake.faults = {}
    _, completed = annotate(fake.base_url, tmp_path, 40)
    assert_all_done_once(fake, completed, 40)


def test_an_account_without_credit_stops_the_run_and_its_attempts_do_not_count(tmp_path, fake):
    fake.faults = {"line_402": 0.5}
    with pytest.raises(NunerError, match="no credit left"):
        annotate(fake.base_url, tmp_path, 40, request__max_attempts=1)
    assert 0 < totals_of(tmp_path).done < 40 and totals_of(tmp_path).failed == 0
    fake.faults = {}
    _, completed = annotate(fake.base_url, tmp_path, 40, request__max_attempts=1)
    assert_all_done_once(fake, completed, 40)


def test_a_server_without_a_batch_api_is_told_so_and_what_to_set(tmp_path, fake):
    fake.batches.failing = {"upload": {1: 404}}
    with pytest.raises(NunerError, match='not_found.*config.endpoint.kind = "live"'):
        annotate(fake.base_url, tmp_path, 10)
    assert fake.batches.events == ["upload"]


def test_results_that_are_gone_at_the_endpoint_are_asked_for_again_only_if_the_user_says_so(tmp_path, fake):
    fake.batches.failing = {"download": {1: 404}}
    with pytest.raises(NunerError, match=r"has no results of it.*config\.request\.retry_failed = True"):
        annotate(fake.base_url, tmp_path, 10)
    fake.batches.files.clear()
    with pytest.raises(NunerError, match="knows no batch batch_1"):
        annotate(fake.base_url, tmp_path, 10)
    fake.batches.failing = {}
    summary, completed = annotate(fake.base_url, tmp_path, 10, request__retry_failed=True)
    assert {row.state for row in completed} == {"done"}
    assert 0 < summary.totals.spent < price(fake.billed) <= summary.totals.spent + summary.totals.unsure


def test_a_request_that_fits_into_no_file_is_named(tmp_path, fake):
    with pytest.raises(NunerError, match=r"config\.batch\.bytes = 1,000"):
        annotate(fake.base_url, tmp_path, 10, batch__bytes=1000, prompt__template="structured")
    assert not fake.batches.created


def test_another_journal_does_not_take_the_batches_of_this_one(tmp_path, fake):
    for name in ("one", "two"):
        reached = fake.hold("create.done")
        process = start(fake, tmp_path / name, 30)
        assert reached.wait(30)
        process.kill()
        process.communicate(timeout=30)
        fake.release("create.done")
    marks = {made.metadata[MARK] for made in fake.batches.created}
    assert len(marks) == 2
    for name in ("one", "two"):
        _, completed = annotate(fake.base_url, tmp_path / name, 30)
        assert {row.state for row in completed} == {"done"}
    assert len(fake.batches.created) == 2
    assert totals_of(tmp_path / "one").spent * 2 == price(fake.billed)
