"""The Batch API: every unit ends once, whatever the endpoint or a kill does, and the money is that of the server."""

import signal

import pytest
from batching import (
    KEY,
    Lines,
    annotate,
    assert_all_done_once,
    kill_in_flight,
    make_config,
    open_journal,
    price,
    start,
    totals_of,
    until_polled,
)
from fake_answers import completion_of
from fake_openai import FakeOpenAI

from nuner_jax.annotate.money import PICO
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request import batch, live
from nuner_jax.annotate.request.batch_endpoint import MARK
from nuner_jax.annotate.request.endpoints import LiveEndpoint
from nuner_jax.errors import NunerError
from nuner_jax.writers import Console


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("NUNER_TEST_KEY", KEY)


@pytest.fixture
def fake():
    with FakeOpenAI(key=KEY) as server:
        yield server


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
    assert not list(tmp_path.glob(".*.batch"))


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
    assert not list(tmp_path.glob(".*.batch"))


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
        until_polled(fake, process, 6)
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


def test_a_batch_that_was_not_sent_counts_neither_as_an_attempt_nor_against_sharing_a_request(tmp_path, fake):
    fake.batches.failing = {"upload": dict.fromkeys(range(1, 7), 500)}
    more = {"prompt__units_per_request": 4, "request__max_attempts": 6}
    with pytest.raises(NunerError, match="HTTP 500"):
        annotate(fake.base_url, tmp_path, 40, **more)
    annotate(fake.base_url, tmp_path, 40, request__budget=1e-6, **more)  # takes it apart
    _, completed = annotate(fake.base_url, tmp_path, 40, **{**more, "request__max_attempts": 1})
    assert_all_done_once(fake, completed, 40)
    assert [len(entry.texts) for entry in fake.log] == [4] * 10


@pytest.mark.parametrize("kind", ["batch", "live"])
def test_a_batch_begun_before_prices_were_known_counts_against_a_later_budget(tmp_path, fake, kind):
    fake.batches.fates = {1: "never"}
    kill_in_flight(fake, start(fake, tmp_path, 40, price="none"))
    assert totals_of(tmp_path).reserved == 0
    config = make_config(fake.base_url, endpoint__kind=kind, request__budget=1e-3)
    console = Lines()
    with open_journal(config, tmp_path, 80) as journal:
        if kind == "live":
            prompt = Prompt.make(config.prompt)
            summary = live.run(config, journal, prompt, LiveEndpoint(config), console=console)
            assert summary.stopped == "budget" and fake.requests == 0
        else:
            fake.batches.created[0].fate = "completed"
            summary = batch.run(config, journal, Prompt.make(config.prompt), console=console)
            assert summary.totals.spent == price(fake.billed) > 0


def test_batches_are_collected_also_if_their_units_are_selected_no_more(tmp_path, fake):
    fake.batches.fates = {1: "never"}
    kill_in_flight(fake, start(fake, tmp_path, 10))
    fake.batches.created[0].fate = "completed"
    config = make_config(fake.base_url)
    with open_journal(config, tmp_path, 0) as journal:
        assert batch.run(config, journal, Prompt.make(config.prompt), console=Console(False)).stopped == "finished"
    _, completed = annotate(fake.base_url, tmp_path, 10)
    assert_all_done_once(fake, completed, 10)
    assert len(fake.batches.created) == 1


def test_asked_one_by_one_units_in_open_batches_are_told_and_left_to_them(tmp_path, fake):
    fake.batches.fates = {1: "never"}
    kill_in_flight(fake, start(fake, tmp_path, 10))
    config, console = make_config(fake.base_url, endpoint__kind="live"), Lines()
    with open_journal(config, tmp_path, 30) as journal:
        summary = live.run(config, journal, Prompt.make(config.prompt), LiveEndpoint(config), console=console)
    assert (summary.totals.done, summary.totals.pending) == (20, 10)
    assert "10 units wait in batches" in "\n".join(console.lines)
    fake.batches.created[0].fate = "completed"
    _, completed = annotate(fake.base_url, tmp_path, 30)
    assert_all_done_once(fake, completed, 30)
