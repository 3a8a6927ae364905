"""The Batch API when it refuses: batches, keys, requests; what was done is kept, and the next start goes on."""

import json
import signal
import time

import pytest
from batching import KEY, Lines, annotate, assert_all_done_once, make_config, price, start, totals_of, until_polled
from fake_answers import chat_completion
from fake_openai import FakeOpenAI

from nuner_jax.annotate.money import Prices
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.batch_endpoint import MARK
from nuner_jax.annotate.request.batch_results import Results
from nuner_jax.annotate.units import Pending
from nuner_jax.errors import NunerError


def completion_body():
    return chat_completion({"model": "m", "messages": []}, "A <> b <> c", name="a")


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("NUNER_TEST_KEY", KEY)


@pytest.fixture
def fake():
    with FakeOpenAI(key=KEY) as server:
        yield server


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
        until_polled(fake, process, 2)
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


def test_a_long_wait_that_the_endpoint_asks_for_is_told_and_a_signal_ends_it(tmp_path, fake):
    fake.batches.failing, fake.batches.retry_after = {"upload": {1: 429}}, 36_000
    process = start(fake, tmp_path, 10)
    try:
        while not fake.batches.events:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "asks to wait 10 h 00 min" in said
    _, completed = annotate(fake.base_url, tmp_path, 10)
    assert_all_done_once(fake, completed, 10)


def test_an_endpoint_that_does_not_answer_about_a_batch_is_told_once(tmp_path, fake):
    fake.batches.failing = {"poll": dict.fromkeys(range(1, 6), 500)}
    console = Lines()
    _, completed = annotate(fake.base_url, tmp_path, 10, console=console)
    assert_all_done_once(fake, completed, 10)
    assert sum("does not answer (server_error: HTTP 500" in line for line in console.lines) == 1


@pytest.mark.parametrize(
    ("line", "error", "unsure"),
    [
        ({"response": {"status_code": 200, "body": {"error": {"code": 429, "message": "m"}}}}, "rate_limited", True),
        ({"response": {"status_code": 200, "body": {"error": {"message": "m"}}}}, "malformed_answer", True),
        ({"response": {"status_code": 200, "body": None}}, "malformed_answer", True),
        ({"response": {"status_code": "429", "body": {"message": "m"}}}, "malformed_answer", True),
        ({"response": {"status_code": 504, "body": ""}}, "server_error", True),
        ({"response": {"status_code": 500, "body": ""}}, "server_error", False),
        ({"response": {"body": completion_body()}}, "", False),
        ({"response": None, "error": {"code": "batch_expired", "message": "m"}}, "batch_expired", False),
        ({"error": "a text"}, "no_result", False),
        ({"response": {"status_code": 429, "body": {"error": {"code": "insufficient_quota"}}}}, "out_of_money", False),
    ],
)
def test_lines_of_results_in_whatever_form(tmp_path, line, error, unsure):
    config = make_config("http://127.0.0.1:9/v1")
    prompt, prices = Prompt.make(config.prompt), Prices.make(config)
    results = Results(config, prompt, prices, {"7": [Pending(0, "a", "A text.", 0)]}, proven=True)
    path = tmp_path / "lines"
    path.write_text(json.dumps({"custom_id": "7", **line}) + "\n")
    (end,) = results.of_lines([path])
    (outcome,) = end.outcomes
    assert outcome.error.split(":")[0] == error
    assert outcome.state == ("retry" if error else "done")
    assert bool(end.unsure) is unsure
    assert (results.reason_to_stop() is not None) is (error == "out_of_money")
