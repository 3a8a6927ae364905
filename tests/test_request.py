"""The stage `request` against a real server: every unit ends, every cent is counted, whatever goes wrong."""

import json
import re

import pytest
from asking import KEY, Lines, after_requests, ask, cost_of, make_config, make_units, once_each, opened
from fake_answers import error_body
from fake_openai import FakeOpenAI, _json

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.money import Prices
from nuner_jax.annotate.prompts import Prompt, request_body
from nuner_jax.annotate.request import throttle
from nuner_jax.annotate.request.answers import EndpointStop
from nuner_jax.annotate.request.endpoints import ReplayEndpoint
from nuner_jax.annotate.units import Answer, Usage
from nuner_jax.config import annotate_schema
from nuner_jax.errors import NunerError
from nuner_jax.writers import Console

EVERY_FAULT = ("rate_limit_retry_after", "rate_limit_plain", "error_500", "error_503", "timeout", "cut") + (
    "truncated_json",
    "empty",
    "refusal",
    "content_filter",
)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("REQUEST_TEST_KEY", KEY)


# --- Every unit ends, and every cent is counted ------------------------------------------------


def test_with_30_percent_faults_every_unit_ends_once_and_the_spend_is_the_servers(tmp_path):
    # Few timeouts, but long ones: an answer that is late because the machine is busy would be counted by one side only.
    faults = dict.fromkeys(EVERY_FAULT, 0.032) | {"timeout": 0.012}
    with FakeOpenAI(key=KEY, faults=faults, cached=8, retry_after=0.01) as server:
        config = make_config(server, timeout=3.0, budget=5.0)
        with opened(tmp_path, 2000) as journal:
            summary = ask(config, journal)
            completions = {one.text: one for one in journal.completions()}
            failures = journal.failures()
    totals = summary.totals
    assert summary.stopped == "finished"
    assert (totals.pending, totals.in_flight, totals.reserved) == (0, 0, 0)
    assert totals.done + totals.failed == totals.units == len(completions) == 2000
    assert {one.state for one in completions.values()} == {"done", "failed"}
    assert all(one.completion == server.completion(text) for text, one in completions.items() if one.state == "done")
    assert all(one.error for one in completions.values() if one.state == "failed")
    assert set(failures) <= {"refusal", "content_filter", "empty_answer", "timeout", "connection", "truncated_json"}
    answered = server.answered()
    assert set(answered.values()) == {1}
    assert set(answered) == {text for text, one in completions.items() if one.state == "done"}
    assert totals.attempts == sum(server.attempts().values())
    assert totals.spent == cost_of(config, server.delivered) > 0
    assert totals.spent < cost_of(config, server.billed) <= totals.spent + totals.unsure <= 5e12
    assert {*EVERY_FAULT, "ok"} == set(server.counts)


@pytest.mark.parametrize("faults", [{}, {"cut": 0.1, "slow": 0.1, "error_500": 0.1}])
def test_the_cap_is_never_exceeded_with_256_requests_in_flight(tmp_path, monkeypatch, faults):
    monkeypatch.setattr(throttle, "FIRST_LIMIT", 256)
    config = make_config()
    units, prompt = make_units(2000), Prompt.make(config.prompt)
    worst = Prices.make(config).worst(request_body(config.endpoint, prompt, [units[-1].text]), 64)
    with FakeOpenAI(key=KEY, faults=faults, slow=0.1) as server, opened(tmp_path, 2000) as journal:
        config = make_config(server, max_concurrency=256, budget=round(300 * worst / 1e12, 6))
        server.pause()
        after_requests(server, 256, server.resume)
        summary = ask(config, journal)
    totals, cap = summary.totals, round(config.request.budget * 1e12)
    assert summary.stopped == "budget"
    assert server.peak == 256
    assert cost_of(config, server.billed) <= totals.spent + totals.unsure <= cap
    assert cap - totals.spent - totals.unsure < 2 * worst  # all of it was used that can be
    assert totals.pending > 0 and totals.failed == 0 and once_each(server)


def test_a_higher_budget_goes_on_where_the_lower_one_ended(tmp_path):
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 300) as journal:
        first = ask(make_config(server, budget=0.02), journal)
        assert first.stopped == "budget" and 0 < first.totals.done < 300
        second = ask(make_config(server, budget=1.0), journal)
        assert second.stopped == "finished" and second.totals.done == 300
        assert set(server.attempts().values()) == {1}


class Scripted:
    """An endpoint of the test's own: `reply(texts)` returns an answer or raises."""

    name = "scripted"

    def __init__(self, reply):
        self.reply = reply
        self.closed = False

    async def check(self):
        pass

    async def ask(self, body, texts):
        return self.reply(texts), {}

    async def close(self):
        self.closed = True


def test_answers_that_came_before_a_price_was_known_count_against_a_later_budget(tmp_path):
    console = Lines()
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 200) as journal:
        free = make_config(server, pilot=50)
        free.price.update(input=None, cached=None, output=None)
        assert ask(free, journal, pilot_only=True).totals.spent == 0
        billed = cost_of(make_config(), server.billed)
        config = make_config(server, budget=round(2 * billed / 1e12, 6))
        summary = ask(config, journal, console=console)
        assert summary.stopped == "budget" and set(server.attempts().values()) == {1}
        assert billed < summary.totals.spent == cost_of(config, server.billed) <= 2 * billed
    with Journal.open(tmp_path / "journal.sqlite", read_only=True) as journal:
        assert journal.sample().cost == journal.totals().spent == summary.totals.spent


def test_an_endpoint_that_counts_no_tokens_makes_the_spend_unsure(tmp_path):
    config = make_config(budget=10.0)
    endpoint = Scripted(lambda texts: Answer("", "A <> b <> c", "stop", "", Usage()))
    with opened(tmp_path, 3) as journal:
        totals = ask(config, journal, endpoint).totals
    bodies = [request_body(config.endpoint, Prompt.make(config.prompt), [u.text]) for u in make_units(3)]
    assert totals.done == 3 and totals.spent == 0
    assert totals.unsure == sum(Prices.make(config).worst(body, 64) for body in bodies)


@pytest.mark.parametrize("extra", ['{"max_completion_tokens": null}', '{"max_tokens": "9000"}', '{"n": 2.0}'])
def test_further_keys_that_leave_the_cost_open_are_refused_before_anything_is_asked(tmp_path, extra):
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 20) as journal:
        config = make_config(server, budget=1.0)
        config.endpoint.extra = extra
        with pytest.raises(NunerError, match=r"config\.endpoint\.extra: \w+ = "):
            ask(config, journal)
        assert server.requests == journal.totals().attempts == 0


def test_a_defect_is_raised_when_all_others_are_settled(tmp_path):
    def reply(texts):
        if "number 20 " in texts[0]:
            raise KeyError("a defect")
        return Answer("", "A <> b <> c", "stop", "", Usage(1, 1))

    endpoint = Scripted(reply)
    with opened(tmp_path, 500) as journal:
        with pytest.raises(KeyError, match="a defect") as caught:
            ask(make_config(), journal, endpoint)
        totals = journal.totals()
    assert any(entry.name == "reply" for entry in caught.traceback)
    assert endpoint.closed
    assert totals.in_flight == 1 and totals.done > 0 and totals.pending + totals.done == 500


# --- What retries, what fails, what stops ------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_unit_that_always_fails_is_given_up_and_the_others_are_done(tmp_path, concurrency):
    poison = make_units(40)[7].text

    def script(texts, attempt):
        return "error_500" if poison in texts else None

    with FakeOpenAI(key=KEY, script=script) as server, opened(tmp_path, 40) as journal:
        summary = ask(make_config(server, max_concurrency=concurrency, max_attempts=4), journal)
        assert (summary.totals.done, summary.totals.failed) == (39, 1)
        assert journal.failures() == {"server_error": 1}
        assert server.attempts()[poison] == 4


def test_rate_limits_never_make_a_unit_fail(tmp_path):
    with FakeOpenAI(key=KEY, rate=(30, 0.15)) as server, opened(tmp_path, 200) as journal:
        summary = ask(make_config(server, max_attempts=2), journal)
    assert (summary.totals.done, summary.totals.failed) == (200, 0)
    assert once_each(server)


def test_concurrency_adapts_to_what_the_server_bears(tmp_path):
    with (
        FakeOpenAI(key=KEY, max_in_flight=5, delay=0.01, retry_after=0.01) as server,
        opened(tmp_path, 600) as journal,
    ):
        summary = ask(make_config(server, max_concurrency=64), journal)
    assert (summary.totals.done, summary.totals.failed) == (600, 0)
    assert server.counts["too_many"] < 300  # with 64 at a time, nearly all requests would be too many


def test_a_unit_that_the_server_rejects_fails_with_its_message(tmp_path):
    bad = make_units(30)[29].text
    with (
        FakeOpenAI(key=KEY, script=lambda texts, _: "bad_request" if bad in texts else None) as server,
        opened(tmp_path, 30) as journal,
    ):
        summary = ask(make_config(server, max_concurrency=4), journal)
        failed = [one for one in journal.completions() if one.state == "failed"]
    assert summary.totals.done == 29
    assert [(one.text, one.error) for one in failed] == [
        (bad, "bad_request: HTTP 400: The fake endpoint says 400: bad_request.")
    ]
    assert server.attempts()[bad] == 1


def test_a_server_that_rejects_everything_stops_the_run_and_no_unit_fails(tmp_path):
    with FakeOpenAI(key=KEY, faults={"bad_request": 1.0}) as server, opened(tmp_path, 500) as journal:
        with pytest.raises(NunerError, match="rejects every request.*The fake endpoint says 400"):
            ask(make_config(server), journal)
        totals = journal.totals()
    assert (totals.pending, totals.failed, totals.in_flight) == (500, 0, 0)
    assert server.requests < 50


def test_a_key_that_is_refused_midway_stops_at_once_and_a_second_start_goes_on(tmp_path):
    with FakeOpenAI(key=KEY, delay=0.01) as server, opened(tmp_path, 400) as journal:
        server.fail_with(401, after=100)
        with pytest.raises(EndpointStop, match="REQUEST_TEST_KEY"):
            ask(make_config(server, max_concurrency=16), journal)
        totals = journal.totals()
        assert totals.done == 100 and totals.failed == totals.in_flight == 0
        assert server.requests <= 100 + 16
        server.fail_with(None)
        assert ask(make_config(server), journal).totals.done == 400
        assert once_each(server)


@pytest.mark.parametrize("wrong", ["model", "key", "down"])
def test_what_is_wrong_at_the_start_is_said_before_anything_is_asked(tmp_path, wrong):
    with FakeOpenAI(key="other" if wrong == "key" else KEY) as server, opened(tmp_path, 5) as journal:
        config = make_config(server)
        if wrong == "model":
            config.endpoint.model = "fake-modle"
        if wrong == "down":
            server.stop()
        words = {"model": "no model 'fake-modle'.*fake-model", "key": "REQUEST_TEST_KEY", "down": "cannot be reached"}
        with pytest.raises(NunerError, match=words[wrong]):
            ask(config, journal)
        assert journal.totals().attempts == 0


def test_where_nothing_is_pending_no_endpoint_is_needed(tmp_path, monkeypatch):
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 5) as journal:
        config = make_config(server)
        ask(config, journal)
        server.stop()
        monkeypatch.delenv("REQUEST_TEST_KEY")
        assert ask(config, journal).stopped == "finished"
        assert ask(config, journal, pilot_only=True).stopped == "pilot"


def test_units_that_an_answer_leaves_out_are_asked_again_alone(tmp_path):
    class Forgetful(FakeOpenAI):
        def generate(self, body, entry):
            payload = super().generate(body, entry)
            if len(entry.texts) > 1:  # leaves out the second and the last
                message = payload["choices"][0]["message"]
                parts = message["content"].split("\n\n")
                message["content"] = "\n\n".join([parts[0], *parts[2:-1]])
            return payload

    with Forgetful(key=KEY) as server, opened(tmp_path, 100) as journal:
        config = make_config(server, units_per_request=5)
        config.endpoint.max_tokens = 1024
        summary = ask(config, journal)
        completions = list(journal.completions())
    assert summary.totals.done == 100
    assert all(one.completion.strip() == server.completion(one.text).strip() for one in completions)
    sizes = sorted(len(entry.texts) for entry in server.log)
    assert sizes == [1] * 40 + [5] * 20
    assert summary.totals.spent == cost_of(config, server.billed)


# --- The pilot and what the user sees ----------------------------------------------------------


def test_the_pilot_comes_first_and_its_estimate_before_the_rest(tmp_path):
    console = Lines()
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 120) as journal:
        config = make_config(server, pilot=30, budget=1.0)
        summary = ask(config, journal, console=console, pilot_only=True)
        assert (summary.stopped, summary.totals.done, server.requests) == ("pilot", 30, 30)
        said = "\n".join(console.lines)
        assert "measured on 30 requests" in said and "90 units to go" in said and "$" in said
        again = ask(config, journal, pilot_only=True)
        assert (again.stopped, server.requests) == ("pilot", 30)  # it was measured before
        console = Lines()
        assert ask(config, journal, console=console).stopped == "finished"
        assert "90 units to go" in "\n".join(console.lines)  # from the journal
        assert set(server.attempts().values()) == {1}


def test_the_first_units_of_the_selection_are_the_pilot(tmp_path):
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 60) as journal:
        ask(make_config(server, pilot=10), journal, pilot_only=True)
        done = [one.position for one in journal.completions() if one.state == "done"]
    assert done == list(range(10))


def test_the_progress_line_tells_units_money_and_time(tmp_path):
    console = Lines()
    with FakeOpenAI(key=KEY, delay=0.05, faults={"cut": 0.1}) as server, opened(tmp_path, 500) as journal:
        ask(make_config(server, budget=2.0), journal, console=console)
    last = console.shown[-1]
    assert re.search(
        r"500/500 units, [\d.]+/s, 0/64 in flight, \$0\.1\d+ \(and at most \$0\.0\d+ unsure\) of \$2\.0000", last
    ), last
    assert any(re.search(r"\d+/500 units.*, \d+ s left", line) for line in console.shown)


def test_a_replay_asks_nobody_and_costs_nothing(tmp_path):
    rows = [{"text": unit.text, "completion": f"Lisbon <> city {n} <> x"} for n, unit in enumerate(make_units(300))]
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    config = annotate_schema.annotate()
    config.endpoint.update(kind="replay", replay=str(path))
    console = Lines()
    with opened(tmp_path, 300) as journal:
        summary = ask(config, journal, ReplayEndpoint(str(path)), console=console)
        completions = [one.completion for one in journal.completions() if one.state == "done"]
        assert journal.failures() == {"not_recorded": 1}
    assert summary.stopped == "finished" and completions == [row["completion"] for row in rows[:-1]]
    assert (summary.totals.spent, summary.totals.unsure) == (0, 0)
    assert not any("$" in line for line in console.lines + console.shown)


# --- The key -----------------------------------------------------------------------------------


def test_the_key_is_in_no_journal_and_no_output(tmp_path, capfd, caplog):
    class Indiscreet(FakeOpenAI):
        def _refuse(self, entry, status, what, retry_after=None):
            entry.what = what
            return _json(status, error_body(f"Key {self.key} is not enough.", "invalid_request_error"))

    caplog.set_level("DEBUG")
    with (
        Indiscreet(key=KEY, faults={"bad_request": 0.2, "error_500": 0.2, "rate_limit_plain": 0.2}) as server,
        opened(tmp_path, 100) as journal,
    ):
        ask(make_config(server), journal, console=Console(active=True))
        assert any("Key [key] is not enough." in one.error for one in journal.completions())
        server.fail_with(401)
        journal.set_units(make_units(5, first=1000), "more")
        with pytest.raises(EndpointStop, match=r"Key \[key\] is not enough"):
            ask(make_config(server), journal)
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    printed = capfd.readouterr()
    assert len(files) > 0 and not any(KEY.encode() in content for content in files)
    assert KEY not in printed.out + printed.err + caplog.text
