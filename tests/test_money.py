"""Prices are exact, a worst case is one, a cap holds, and an estimate says what it rests on."""

import json
import random
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuner_jax.annotate.journal.journal import Sample, Totals
from nuner_jax.annotate.money import (
    PICO,
    Budget,
    Prices,
    bracket,
    dollars,
    estimate,
    most_tokens,
    picodollars,
    progress,
)
from nuner_jax.annotate.units import Usage
from nuner_jax.config.annotate_schema import annotate
from nuner_jax.errors import NunerError

MONEY = st.integers(0, 10**13)


def priced(kind="live", **prices) -> Prices:
    config = annotate()
    config.endpoint.kind = kind
    config.price.update(prices)
    return Prices.make(config)


def request(text: str, **more) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


# Prices


def test_a_price_is_the_decimal_that_was_written_and_not_its_float():
    prices = priced(input=0.1, cached=0.025, output=0.7)
    assert prices.of(Usage(prompt=1_000_000)) == picodollars(0.1) == PICO // 10
    assert prices.of(Usage(prompt=3)) == 300_000
    assert prices.of(Usage(prompt=1_000_000, completion=1_000_000, cached=400_000)) == 77 * PICO // 100


def test_cached_tokens_cost_as_much_as_others_unless_told():
    assert priced(input=2.0, output=8.0).of(Usage(100, 0, 60)) == priced(input=2.0, output=8.0).of(Usage(100))
    assert priced(input=2.0, cached=0.0, output=8.0).of(Usage(100, 0, 60)) == 40 * 2_000_000


def test_more_cached_tokens_than_there_are_do_not_lower_the_cost_below_their_own():
    assert priced(input=2.0, cached=1.0, output=8.0).of(Usage(prompt=10, cached=50)) == 10 * 1_000_000


def test_a_fraction_of_a_picodollar_counts_as_a_whole_one():
    prices = priced(input=0.0000001, output=0.0000001)  # a tenth of a picodollar per token
    assert [prices.of(Usage(tokens)) for tokens in (0, 1, 10, 11)] == [0, 1, 1, 2]


def test_the_batch_api_costs_its_share_and_a_replay_nothing():
    live, usage = {"input": 0.15, "cached": 0.075, "output": 0.6}, Usage(1000, 500, 300)
    assert 2 * priced("batch", **live).of(usage) == priced(**live).of(usage)
    assert priced("batch", **live, batch=0.1).of(usage) * 10 == priced(**live).of(usage)
    body = request("x")
    assert 2 * priced("batch", **live).worst(body, 9) == priced(**live).worst(body, 9)
    assert priced("replay").known and priced("replay").of(usage) == priced("replay").worst(body, 9) == 0


@pytest.mark.parametrize("given_", [{}, {"input": 1.0}, {"output": 1.0}])
def test_with_a_price_missing_nothing_is_known(given_):
    assert not priced(**given_).known
    assert priced(**given_).of(Usage(10, 10)) is None
    free = priced(input=0.0, output=0.0)
    assert free.known and free.of(Usage(10, 10)) == 0  # free is a price


# The worst case


@given(st.text(), st.integers(1, 3), st.integers(1, 2000))
def test_no_byte_level_tokenizer_makes_more_tokens_than_the_worst_case(text, messages, max_tokens):
    body = {"messages": [{"role": "user", "content": text}] * messages, "temperature": 0.0}
    prompt, completion = most_tokens(body, max_tokens)
    assert prompt >= messages * (len(text.encode()) + 64) + 64
    assert completion == max_tokens


def test_the_worst_case_counts_the_schema_and_the_tools():
    plain, schema = request("x"), {"type": "json_schema", "json_schema": {"schema": {"description": "y" * 500}}}
    for key in ("response_format", "tools"):
        assert most_tokens({**plain, key: schema}, 1)[0] >= most_tokens(plain, 1)[0] + 500


def test_half_of_a_surrogate_pair_has_a_worst_case_too():
    assert most_tokens(request("\ud800"), 1)[0] > 0


def test_what_the_body_says_about_the_answer_is_believed_if_it_is_more():
    assert most_tokens(request("x", max_completion_tokens=100), 100)[1] == 100
    assert most_tokens(request("x", max_completion_tokens=100, max_tokens=700), 100)[1] == 700
    assert most_tokens(request("x", max_completion_tokens=100, n=3), 100)[1] == 300


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens", "n"])
@pytest.mark.parametrize("value", [None, "700", 700.0, True, 0, -1])
def test_what_leaves_the_length_of_an_answer_open_is_refused(key, value):
    with pytest.raises(NunerError, match=rf"config\.endpoint\.extra: {key} = "):
        priced(input=1.0, output=1.0).worst(request("x", **{key: value}), 100)


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 100))
def test_an_answer_within_its_limits_never_costs_more_than_the_worst_case(prompt, cached, completion):
    prices, body = priced(input=0.37, cached=0.11, output=1.9), request("x" * 4000)
    assert prices.of(Usage(prompt, completion, cached)) <= prices.worst(body, 100)


def test_a_dear_cache_is_in_the_worst_case():
    prices = priced(input=1.0, cached=3.0, output=0.0)
    size = most_tokens(request("x"), 1)[0]
    assert prices.worst(request("x"), 1) == prices.of(Usage(size, 1, size))


# The budget


@given(st.integers(0, 10**13), st.lists(st.tuples(MONEY, st.booleans(), st.randoms(use_true_random=False))))
def test_a_cap_is_never_exceeded_while_answers_cost_no_more_than_was_reserved(cap, steps):
    budget, flying, spent, unsure = Budget(cap, Totals()), [], 0, 0
    for amount, settles, chance in steps:
        fits = spent + unsure + sum(flying) + amount <= cap
        assert budget.try_reserve(amount) is fits
        if fits:
            flying.append(amount)
        if settles and flying:
            reserved = flying.pop(chance.randrange(len(flying)))
            cost = chance.randint(0, reserved)
            billed_unseen = chance.randint(0, reserved - cost)
            budget.settle(reserved, cost, billed_unseen)
            spent, unsure = spent + cost, unsure + billed_unseen
        assert (budget.spent, budget.unsure, budget.reserved) == (spent, unsure, sum(flying))
        assert budget.spent + budget.unsure + budget.reserved <= cap
        assert budget.left == cap - spent - unsure - sum(flying)


def test_an_answer_dearer_than_its_worst_case_is_counted_and_nothing_more_is_reserved():
    budget = Budget(100, Totals())
    assert budget.try_reserve(60)
    budget.settle(60, cost=130)
    assert (budget.spent, budget.left) == (130, 0)
    assert not budget.try_reserve(1)


def test_a_budget_goes_on_from_what_an_earlier_start_has_used():
    budget = Budget(100, Totals(spent=30, unsure=20, reserved=10))
    assert budget.left == 40
    assert not budget.try_reserve(41)
    assert budget.try_reserve(40)
    budget.settle(10, cost=0)  # what was in flight before
    assert budget.left == 10


def test_without_a_cap_everything_is_counted_and_nothing_refused():
    budget = Budget(None, Totals())
    assert budget.try_reserve(10**30)
    budget.settle(10**30, cost=5, unsure=7)
    assert (budget.left, budget.spent, budget.unsure, budget.reserved) == (None, 5, 7, 0)


def test_the_cap_of_the_config_is_exact_and_never_rounded_up():
    config = annotate()
    config.request.budget = 0.3
    assert Budget.make(config, Totals()).cap == 3 * PICO // 10
    config.request.budget = 1e-13
    assert Budget.make(config, Totals()).cap == 0
    config.request.budget = None
    assert Budget.make(config, Totals()).cap is None


def test_the_progress_line_tells_what_is_sure_from_what_is_not():
    assert progress(Budget(None, Totals(spent=12_345 * 10**8))) == "$1.2345"
    assert progress(Budget(5 * PICO, Totals(spent=PICO, unsure=PICO // 10))) == (
        "$1.0000 (and at most $0.1000 unsure) of $5.0000"
    )


# The estimate


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(1)
    hits = 0
    for _ in range(400):
        costs = [round(rng.gammavariate(4, 100)) for _ in range(60)]
        one = estimate(sample_of(costs), 1000, priced(input=1.0, output=1.0))
        low, high = one.interval
        hits += low <= 400 * 1000 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_an_estimate_is_of_units_whatever_requests_they_came_in():
    one = estimate(sample_of([300, 500], units=20), 100, priced(input=1.0, output=1.0), rate=4.0)
    assert (one.requests, one.unit_cost, one.total, one.seconds) == (2, 40, 4000, 25)
    deviation = 20_000**0.5  # of 300 and 500
    assert one.margin == pytest.approx(1.96 * deviation / 2**0.5 * 2 / 20)


def test_one_request_gives_a_mean_but_no_interval():
    one = estimate(sample_of([7 * 10**8]), 10, priced(input=1.0, output=1.0))
    assert one.interval is None
    assert one.lines()[0].endswith("$0.0007000 a unit") and "interval" not in " ".join(one.lines())


def test_the_lines_state_what_was_measured_and_where_the_budget_ends():
    one = estimate(sample_of([4 * 10**8, 5 * 10**8] * 10), 1980, priced(input=1.0, output=1.0), rate=20.0)
    first, second, *rest = one.lines(left=PICO // 2)
    assert first == (
        "measured on 20 requests (20 units): 300 + 200 tokens a unit, "
        "$0.0004500 a unit (95% interval $0.0004275 to $0.0004725)"
    )
    assert second == (
        "1,980 units to go: 594k + 396k tokens, $0.8910 (95% interval $0.8465 to $0.9355), about 1 min 39 s"
    )
    assert rest == ["the budget has $0.5000 left: it will end before the units do, after about 1,111 more"]
    assert one.lines(left=PICO) == one.lines() == [first, second]
    assert "may end before the units do" in one.lines(left=9 * PICO // 10)[-1]
    assert "after about 0 more" in one.lines(left=0)[-1]


def test_an_estimate_from_nothing_says_so():
    assert estimate(sample_of([]), 10, priced()).lines() == [
        "no estimate: none of 0 requests brought a unit to its end"
    ]
    assert len(estimate(sample_of([5]), 0, priced(input=1.0, output=1.0)).lines(left=0)) == 1  # nothing is to go


def test_without_prices_tokens_are_told_and_no_money():
    lines = estimate(sample_of([0, 0]), 10, priced(), rate=1.0).lines(left=0)
    assert lines == [
        "measured on 2 requests (2 units): 300 + 200 tokens a unit",
        "10 units to go: 3k + 2k tokens, about 10 s",
    ]


def sample_of(costs: list[int], units: int | None = None) -> Sample:
    units = len(costs) if units is None else units
    return Sample(len(costs), units, sum(costs), float(sum(cost**2 for cost in costs)), 300 * units, 200 * units)


def test_before_any_measurement_a_bracket_holds_whatever_comes():
    prices = priced(input=0.15, output=0.6)
    bodies = [request("word " * size, max_completion_tokens=256) for size in (10, 100, 400)]
    plan = bracket(iter(bodies), 256, prices)
    assert plan.requests == 3
    assert plan.high == sum(prices.worst(body, 256) for body in bodies)
    assert plan.low == prices.of(Usage((50 + 500 + 2000) // 4))
    for share in (0, 1):  # a token a word, and the longest answers
        cost = sum(prices.of(Usage(len(body["messages"][0]["content"]) // 4, share * 256)) for body in bodies)
        assert plan.low <= cost + 3 and cost <= plan.high


def test_the_lines_of_a_bracket_say_whether_the_budget_suffices():
    plan = bracket([request("x" * 800)] * 100, 1000, priced(input=1.0, output=2.0))
    size = len(json.dumps(request("x" * 800))) + 128
    assert plan.lines() == [
        f"100 requests: 20k to {size / 10:.3g}k prompt tokens, at most 100k completion tokens",
        f"between $0.02000 and {dollars(plan.high)}; a pilot (config.request.pilot) measures it closer",
    ]
    assert plan.lines(cap=plan.high) == plan.lines()
    assert plan.lines(cap=plan.high // 2)[-1].endswith("may end before the units do, after 50 requests at the earliest")
    assert plan.lines(cap=plan.low - 1)[-1].endswith("will end before the units do")
    assert "not known" in bracket([request("x")], 10, priced()).lines(cap=0)[-1]
    assert "no cost" in bracket([request("x")], 10, priced(input=0.0, output=0.0)).lines(cap=0)[-1]


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0"),
        (1, "$0.000000000001"),
        (123_456_789, "$0.0001235"),
        (PICO // 2, "$0.5000"),
        (1_234_500_000_000, "$1.2345"),
        (1_234_567 * 10**9, "$1,234.57"),
        (-3 * PICO, "-$3.0000"),
    ],
)
def test_picodollars_for_a_person(amount, text):
    assert dollars(amount) == text


@given(st.integers(1, 10**19))
def test_what_a_person_reads_is_right_to_four_digits_or_a_cent(amount):
    shown = Decimal(dollars(amount).replace("$", "").replace(",", ""))
    assert abs(shown - Decimal(amount) / PICO) <= max(Decimal(amount) / PICO / 1000, Decimal("1e-12")) / 2
