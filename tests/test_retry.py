"""The rules of retries: when to ask again, when a fault is the unit's own, and when the endpoint is down."""

import pytest

from nuner_jax.annotate.request import retry
from nuner_jax.annotate.request.answers import EndpointFault
from nuner_jax.annotate.units import Pending
from nuner_jax.errors import NunerError


def work(*numbers, attempts=0, counted=0):
    return retry.Work([Pending(n, f"unit{n}", "", attempts) for n in numbers], counted)


def test_delays_grow_with_full_jitter_up_to_a_minute_on_top_of_what_the_server_asks():
    fault = EndpointFault("server_error", retry=True)
    for attempt, bound in ((1, 2), (2, 4), (3, 8), (6, 60), (50, 60)):
        delays = [retry.delay(attempt, 2.0, fault) for _ in range(400)]
        assert 0 <= min(delays) < 0.1 * bound and 0.9 * bound < max(delays) <= bound
    asked = EndpointFault("server_error", retry=True, retry_after=20.0)
    assert all(20 <= retry.delay(1, 2.0, asked) <= 22 for _ in range(100))
    asked.retry_after = 36_000.0  # by mistake, or for all, which the throttle sees to
    assert all(60 <= retry.delay(1, 2.0, asked) <= 62 for _ in range(100))
    assert retry.delay(5, 2.0, None) == 0


def test_an_attempt_counts_against_a_unit_while_others_are_answered():
    health, fault = retry.Health(1.0, 8, proven=True), EndpointFault("server_error", retry=True)
    one = work(1, counted=5)
    assert health.judge(work(2), fault, 6)[1] is True
    assert [outcome.state for outcome in health.judge(one, fault, 6)[0]] == ["failed"]
    health.judge(work(3), fault, 6)  # the third without an answer between: it is the endpoint
    outcomes, counted = health.judge(one, fault, 6)
    assert ([outcome.state for outcome in outcomes], counted) == (["retry"], False)
    health.answered()
    assert [outcome.state for outcome in health.judge(one, fault, 6)[0]] == ["failed"]


@pytest.mark.parametrize("reason", ["rate_limited", "overloaded", "unreachable"])
def test_attempts_that_are_the_endpoints_fault_end_only_after_very_many(reason):
    health, fault = retry.Health(1.0, 8, proven=True), EndpointFault(reason, retry=True)
    assert health.judge(work(1, attempts=100, counted=5), fault, 6)[0][0].state == "retry"
    assert health.judge(work(1, attempts=retry.PATIENCE * 6 - 1), fault, 6)[0][0].state == "failed"


def test_the_run_stops_after_many_faults_without_an_answer_over_a_stretch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    health, fault = retry.Health(1.0, 8, proven=True), EndpointFault("connection", retry=True)

    def faults(count):
        for n in range(count):
            health.judge(work(n), fault, 6)
        return health.reason_to_stop(fault, "it")

    assert faults(retry.OUTAGE_FAULTS) is None
    now[0] = retry.OUTAGE_STRETCH - 1
    assert faults(1) is None and health.silent_for == now[0]
    now[0] += 1
    assert isinstance(faults(1), NunerError)
    health.answered()
    assert faults(retry.OUTAGE_FAULTS) is None and health.silent_for == 0


@pytest.mark.parametrize(
    ("reason", "at_a_time", "units", "stops"),
    [
        ("connection", 8, 2, False),  # perhaps these two bring it down
        ("connection", 2, 2, True),  # there are no others
        ("unreachable", 8, 1, True),  # which no unit can be to blame for
    ],
)
def test_how_few_units_show_that_an_endpoint_is_down(monkeypatch, reason, at_a_time, units, stops):
    now = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    health, fault = retry.Health(1.0, at_a_time, proven=True), EndpointFault(reason, retry=True)
    for n in range(retry.OUTAGE_FAULTS):
        now[0] += retry.OUTAGE_STRETCH / (retry.OUTAGE_FAULTS - 1)
        health.judge(work(n % units), fault, 6)
    assert bool(health.reason_to_stop(fault, "it")) is stops
