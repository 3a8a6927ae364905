"""The stage `request` when the endpoint goes away or the user stops it: nothing is lost, and it goes on."""

import os
import signal
import threading
import time

import pytest
from asking import KEY, Lines, after_requests, ask, make_config, make_units, once_each, opened
from fake_openai import FakeOpenAI

from nuner_jax.annotate.request import retry
from nuner_jax.annotate.request.endpoints import LiveEndpoint
from nuner_jax.errors import NunerError


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("REQUEST_TEST_KEY", KEY)


# --- The endpoint goes away --------------------------------------------------------------------


def test_an_endpoint_that_dies_midway_stops_the_run_and_the_same_command_goes_on(tmp_path):
    with FakeOpenAI(key=KEY, delay=0.005) as server, opened(tmp_path, 600) as journal:
        config = make_config(server, backoff=0.001, max_attempts=3)
        after_requests(server, 150, server.stop)
        with pytest.raises(NunerError, match="answered none of the last .* the same command goes on"):
            ask(config, journal)
        totals = journal.totals()
        assert 0 < totals.done < 600 and totals.failed == 0 and totals.in_flight == 0
        server.start()
        assert ask(config, journal).totals.done == 600
        assert once_each(server)


def test_an_endpoint_that_says_500_to_all_stops_the_run_and_no_unit_fails(tmp_path):
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 300) as journal:
        config = make_config(server, backoff=0.001, max_attempts=3)
        server.fail_with(500, after=100)
        with pytest.raises(NunerError, match="server_error: HTTP 500"):
            ask(config, journal)
        totals = journal.totals()
        assert totals.done == 100 and totals.failed == 0
        server.fail_with(None)
        assert ask(config, journal).totals.done == 300


@pytest.mark.parametrize(("units", "concurrency"), [(50, 1), (1, 64)])
def test_however_few_are_asked_for_at_a_time_an_endpoint_that_is_gone_stops_the_run(
    tmp_path, monkeypatch, units, concurrency
):
    monkeypatch.setattr(retry, "OUTAGE_FAULTS", 6)
    monkeypatch.setattr(retry, "OUTAGE_STRETCH", 1.0)

    class Leaving(LiveEndpoint):
        async def check(self):
            await super().check()
            server.stop()

    with FakeOpenAI(key=KEY) as server, opened(tmp_path, units) as journal:
        config = make_config(server, max_attempts=3, max_concurrency=concurrency)
        with pytest.raises(NunerError, match="answered none of the last .*unreachable"):
            ask(config, journal, Leaving(config))
        totals = journal.totals()
        assert totals.failed == totals.in_flight == totals.unsure == 0 and totals.pending == units
        server.start()
        assert ask(config, journal).totals.done == units


def test_a_short_outage_is_waited_out(tmp_path):
    def restart(server):
        server.stop()
        time.sleep(0.3)
        server.start()

    with FakeOpenAI(key=KEY, delay=0.005) as server, opened(tmp_path, 500) as journal:
        thread = after_requests(server, 150, restart, server)
        summary = ask(make_config(server, backoff=0.02, max_attempts=2), journal)
        thread.join()
    assert (summary.totals.done, summary.totals.failed) == (500, 0)


# --- Stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_is_in_flight_and_loses_nothing(tmp_path, number):
    before = signal.getsignal(number)
    console = Lines()
    with FakeOpenAI(key=KEY, delay=0.1) as server, opened(tmp_path, 600) as journal:
        after_requests(server, 40, os.kill, os.getpid(), number)
        summary = ask(make_config(server), journal, console=console)
        assert signal.getsignal(number) is before
        totals = summary.totals
        assert summary.stopped == "signal" and any("stopping" in line for line in console.lines)
        assert 0 < totals.done == server.requests < 400
        assert totals.in_flight == totals.failed == totals.unsure == 0
        server.delay = 0.0
        assert ask(make_config(server), journal).totals.done == 600
        assert set(server.attempts().values()) == {1}


def test_a_second_signal_stops_at_once_and_the_next_start_asks_again(tmp_path):
    with FakeOpenAI(key=KEY) as server, opened(tmp_path, 100) as journal:
        held = server.pause()

        def stop():
            held.wait()
            while server.in_flight < 8:
                time.sleep(0.01)
            for _ in range(2):
                time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=stop).start()
        began = time.monotonic()
        summary = ask(make_config(server), journal)
        assert time.monotonic() - began < 5
        assert summary.stopped == "signal" and summary.totals.in_flight == 8
        server.resume()
        totals = ask(make_config(server), journal).totals
        assert (totals.done, totals.lost, totals.in_flight) == (100, 8, 0)
        assert totals.unsure == summary.totals.reserved > 0


def test_a_signal_does_not_wait_for_a_pause_that_the_server_asked_for(tmp_path):
    console = Lines()
    with (
        FakeOpenAI(key=KEY, faults={"rate_limit_retry_after": 1.0}, retry_after=600) as server,
        opened(tmp_path, 50) as journal,
    ):
        after_requests(server, 8, threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start)
        began = time.monotonic()
        assert ask(make_config(server), journal, console=console).stopped == "signal"
        assert time.monotonic() - began < 5
    assert any("rate limit: next in" in line for line in console.shown), console.shown
    assert sum("asks to wait 10 min" in line for line in console.lines) == 1  # also where no progress line is seen


def test_a_unit_whose_error_asks_for_hours_does_not_hold_up_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.2)
    poison = make_units(20)[3].text

    class Patient(FakeOpenAI):
        def _refuse(self, entry, status, what, retry_after=None):
            return super()._refuse(entry, status, what, 36_000)

    with (
        Patient(key=KEY, script=lambda texts, _: "error_500" if poison in texts else None) as server,
        opened(tmp_path, 20) as journal,
    ):
        began = time.monotonic()
        assert ask(make_config(server, max_attempts=3), journal).totals.failed == 1
        assert time.monotonic() - began < 10
