"""The throttle: as many requests as the endpoint bears, and none while it asks to wait."""

import asyncio
import heapq

import pytest

from nuner_jax.annotate.request.throttle import FIRST_LIMIT, Throttle, parse_duration, rate_limit_wait


class FakeTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self):
        super().__init__()
        self._now = 0.0

    def time(self):
        return self._now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0].when())
        super()._run_once()


def run(coroutine):
    loop = FakeTime()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def now():
    return asyncio.get_running_loop().time()


async def answer(throttle, seconds, headers=None, tokens=0):
    async with throttle.slot() as slot:
        await asyncio.sleep(seconds)
        slot.succeeded(headers or {}, tokens)


async def refuse(throttle, seconds, retry_after=None):
    async with throttle.slot() as slot:
        await asyncio.sleep(seconds)
        slot.overloaded(retry_after)


def test_it_starts_low_and_doubles_per_round_trip_up_to_the_most():
    async def rounds():
        throttle = Throttle(50)
        limits = [throttle.limit]
        for _ in range(4):
            await asyncio.gather(*(answer(throttle, 1) for _ in range(throttle.limit)))
            limits.append(throttle.limit)
        return limits

    assert run(rounds()) == [FIRST_LIMIT, 16, 32, 50, 50]
    assert Throttle(3).limit == 3


def test_never_more_in_flight_than_the_limit():
    async def peak():
        throttle, flying, most = Throttle(20), 0, 0

        async def one():
            nonlocal flying, most
            async with throttle.slot() as slot:
                flying += 1
                most = max(most, flying)
                assert flying <= throttle.in_flight <= throttle.limit
                await asyncio.sleep(1)
                flying -= 1
                slot.succeeded({})

        await asyncio.gather(*(one() for _ in range(200)))
        return most, throttle.in_flight

    assert run(peak()) == (20, 0)


def test_many_refusals_of_one_round_trip_halve_the_limit_once():
    async def after():
        throttle = Throttle(64)
        while throttle.limit < 64:
            await answer(throttle, 1)
        await asyncio.gather(*(refuse(throttle, 1 + 0.01 * n) for n in range(64)))
        first = throttle.limit
        await asyncio.gather(*(refuse(throttle, 1) for _ in range(32)))
        return first, throttle.limit

    assert run(after()) == (32, 16)


@pytest.mark.parametrize(("every", "lowest", "highest"), [(8, 60, 64), (2, 1, 16)])
def test_rare_refusals_are_noise_and_many_are_not(every, lowest, highest):
    async def limit():
        throttle = Throttle(64)
        for _ in range(40):
            tasks = (refuse(throttle, 1) if n % every == 0 else answer(throttle, 1) for n in range(throttle.limit))
            await asyncio.gather(*tasks)
        return throttle.limit

    assert lowest <= run(limit()) <= highest


def test_after_a_refusal_the_limit_grows_by_one_per_round_trip_and_never_falls_below_one():
    async def limits():
        throttle = Throttle(64)
        for _ in range(40):
            await refuse(throttle, 1)
        lowest = throttle.limit
        for _ in range(3):
            await asyncio.gather(*(answer(throttle, 1) for _ in range(throttle.limit)))
        return lowest, throttle.limit

    lowest, later = run(limits())
    assert lowest == 1
    assert 3 <= later <= 4


def test_retry_after_pauses_everybody_and_the_longest_pause_counts():
    async def starts():
        throttle = Throttle(8)
        await asyncio.gather(refuse(throttle, 1, retry_after=10), refuse(throttle, 1, retry_after=2))
        assert throttle.pause_left == 10
        began = []

        async def one():
            async with throttle.slot() as slot:
                began.append(now())
                slot.succeeded({})

        await asyncio.gather(one(), one())
        return began

    assert run(starts()) == [11, 11]


def test_a_pause_that_grows_while_others_wait_holds_them_longer():
    async def start():
        throttle = Throttle(8)
        throttle.pause(5)
        waiting = asyncio.create_task(answer(throttle, 0))
        await asyncio.sleep(4)
        throttle.pause(6)
        await waiting
        return now()

    assert run(start()) == 10


def test_headers_without_a_request_left_pause_until_the_reset():
    async def second_start():
        throttle = Throttle(8)
        none_left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}
        await answer(throttle, 1, none_left)
        await answer(throttle, 0)
        return now()

    assert run(second_start()) == 91


def test_waiting_can_be_cancelled_and_the_slot_goes_to_the_next():
    async def order():
        throttle, began = Throttle(1), []

        async def one(name):
            async with throttle.slot():
                began.append(name)
                await asyncio.sleep(1)

        tasks = [asyncio.create_task(one(name)) for name in "abc"]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        in_a_pause = asyncio.create_task(one("d"))
        throttle.pause(1000)
        await asyncio.sleep(1)
        in_a_pause.cancel()
        await asyncio.wait([in_a_pause])
        assert in_a_pause.cancelled()
        return began, throttle.in_flight, now()

    assert run(order()) == (["a", "c"], 0, 3)


@pytest.mark.parametrize("steps", range(6))
def test_a_cancellation_at_the_moment_of_ones_turn_loses_no_slot(steps):
    async def later():
        throttle = Throttle(1)
        holder = throttle.slot()
        await holder.__aenter__()
        waiting = asyncio.create_task(answer(throttle, 0))
        await asyncio.sleep(0)
        events = [lambda: waiting.cancel(), lambda: holder._throttle._release()]
        for event in events if steps % 2 else reversed(events):
            event()
            for _ in range(steps // 2):
                await asyncio.sleep(0)
        await asyncio.wait([waiting])
        await asyncio.wait_for(answer(throttle, 0), 5)
        return throttle.in_flight

    assert run(later()) == 0


def test_slots_are_given_in_the_order_of_asking():
    async def order():
        throttle, began = Throttle(2), []

        async def one(name):
            async with throttle.slot():
                heapq.heappush(began, (now(), name))
                await asyncio.sleep(1)

        await asyncio.gather(*(one(name) for name in range(10)))
        return [heapq.heappop(began)[1] for _ in range(10)]

    assert run(order()) == list(range(10))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("2m59.56s", 179.56),
        ("1d", 86_400),
        (" 12.5 ", 12.5),
        ("7", 7),
        ("", 0),
        ("soon", 0),
        ("1.2.3", 0),
        ("1.2.3s", 0),
        ("-5s", 0),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


def test_rate_limit_headers():
    def wait(tokens=0, **headers):
        return rate_limit_wait({f"x-ratelimit-{k.replace('_', '-')}": v for k, v in headers.items()}, tokens)

    assert wait() == 0
    assert wait(remaining_requests="3", reset_requests="9s") == 0
    assert wait(remaining_requests="0", reset_requests="9s") == 9
    assert wait(remaining_requests="0") == 0
    assert wait(remaining_requests="?", reset_requests="9s") == 0
    assert wait(remaining_tokens="150", reset_tokens="6s", tokens=100) == 0
    assert wait(remaining_tokens="99", reset_tokens="6s", tokens=100) == 6
    assert wait(remaining_requests="0", reset_requests="9s", remaining_tokens="0", reset_tokens="6s") == 9
