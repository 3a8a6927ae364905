"""Money: what answers cost, what they may cost at most, a cap that holds, and an estimate of the whole.

All sums are integers of picodollars (1e-12 $): a price of 0.075 $ per million tokens is 75,000 of them per token, and
nothing is lost in a million additions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.journal.journal import Sample, Totals
from nuner_jax.annotate.units import Usage
from nuner_jax.errors import NunerError
from nuner_jax.writers import duration

PICO = 10**12
TEMPLATE_TOKENS = 64
"""Allowed for what a chat template puts around a message, and once more around all of them."""


def picodollars(dollars: float | None) -> int | None:
    """A cap in dollars as written in a config, exactly (the float's shortest decimal); None: none."""
    return None if dollars is None else int(Decimal(str(dollars)) * PICO)


def dollars(amount: float) -> str:
    """Picodollars for a person: "$1,234.57", "$1.2346", and four digits of what is below a dollar, "$0.0001235"."""
    value = Decimal(round(amount)) / PICO
    if not value:
        return "$0"
    places = 2 if abs(value) >= 1000 else min(12, max(4, 3 - value.adjusted()))
    return f"${value:,.{places}f}".replace("$-", "-$")


@dataclass(frozen=True, slots=True)
class Prices:
    """What tokens cost, in picodollars each, exactly.

    known: whether a price was given for prompt and completion.
    """

    known: bool
    prompt: Fraction
    cached: Fraction
    completion: Fraction

    @classmethod
    def make(cls, config: ConfigDict, kind: str | None = None) -> Prices:
        """Those of `config.price`, for a kind of endpoint (None: the config's).

        The Batch API costs its share of them, a replay nothing.
        """
        price, kind = config.price, kind or config.endpoint.kind
        if kind == "replay":
            return cls(True, Fraction(0), Fraction(0), Fraction(0))
        if price.input is None or price.output is None:
            return cls(False, Fraction(0), Fraction(0), Fraction(0))
        cached = price.input if price.cached is None else price.cached
        share = Fraction(str(price.batch)) if kind == "batch" else Fraction(1)
        # Dollars per million tokens are millions of picodollars per token.
        return cls(True, *(Fraction(str(one)) * 10**6 * share for one in (price.input, cached, price.output)))

    def of(self, usage: Usage) -> int | None:
        """What an answer cost, rounded up to a picodollar; None if prices are not known."""
        if not self.known:
            return None
        cached = min(usage.cached, usage.prompt)
        return math.ceil(
            (usage.prompt - cached) * self.prompt + cached * self.cached + usage.completion * self.completion
        )

    def worst(self, body: Mapping[str, Any], max_tokens: int) -> int:
        """The most that a request can cost, 0 if prices are not known: see `most_tokens`."""
        prompt, completion = most_tokens(body, max_tokens)
        return math.ceil(prompt * max(self.prompt, self.cached) + completion * self.completion)


def most_tokens(body: Mapping[str, Any], max_tokens: int) -> tuple[int, int]:
    """Upper bounds of the prompt's and the completion's tokens.

    A token of a byte-level tokenizer stands for at least one byte, so the prompt has no more tokens than the body has
    bytes of UTF-8 (messages, schema, tools and all), and `TEMPLATE_TOKENS` for each message and once for all of them.
    The completion ends at `max_tokens`, or at the limit that the body itself names, times the `n` answers it asks for.

    Raises:
      NunerError: one of these is in the body, but no whole number: who knows what a server makes of it.
    """
    size = len(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    longest = max(max_tokens, _whole(body, "max_tokens"), _whole(body, "max_completion_tokens"))
    return size + TEMPLATE_TOKENS * (len(body["messages"]) + 1), longest * _whole(body, "n")


def _whole(body: Mapping[str, Any], key: str) -> int:
    value = body.get(key, 1)
    if type(value) is not int or value < 1:
        raise NunerError(
            f"config.endpoint.extra: {key} = {json.dumps(value)} leaves open what a request can cost; give a whole "
            "number above 0, or leave it out"
        )
    return value


class Budget:
    """Keeps what is spent, what may have been billed unseen, and what is in flight together below a cap.

    spent + unsure + reserved <= cap holds at every moment, as long as no answer costs more than was reserved for it;
    if one does, it is counted, and nothing more is reserved than still fits. For one thread.
    """

    def __init__(self, cap: int | None, totals: Totals):
        """A budget of `cap` picodollars (None: no limit), of which an earlier start has used what `totals` say."""
        self.cap = cap
        self.spent = totals.spent
        self.unsure = totals.unsure
        self.reserved = totals.reserved

    @classmethod
    def make(cls, config: ConfigDict, totals: Totals) -> Budget:
        """That of `config.request.budget`."""
        return cls(picodollars(config.request.budget), totals)

    @property
    def left(self) -> int | None:
        """What can still be reserved; None: anything."""
        return None if self.cap is None else max(0, self.cap - self.spent - self.unsure - self.reserved)

    def try_reserve(self, amount: int) -> bool:
        """Sets `amount` aside for a request, if it fits."""
        if self.cap is not None and self.spent + self.unsure + self.reserved + amount > self.cap:
            return False
        self.reserved += amount
        return True

    def settle(self, reserved: int, cost: int | None, unsure: int = 0) -> None:
        """Replaces what was set aside for a request by what it cost (None: not known), and what it may have cost."""
        self.reserved -= reserved
        self.spent += cost or 0
        self.unsure += unsure


def progress(budget: Budget) -> str:
    """A budget in a progress line: "$0.1234 (and at most $0.0100 unsure) of $5.0000"."""
    unsure = f" (and at most {dollars(budget.unsure)} unsure)" if budget.unsure else ""
    return f"{dollars(budget.spent)}{unsure}" + ("" if budget.cap is None else f" of {dollars(budget.cap)}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the rest will take, judged by the requests that were answered.

    requests, units: answered so far, and units that have ended by them. remaining: units still to come.
    unit_cost: mean cost of a unit, in picodollars, repeated attempts included. margin: half its 95% interval; None with
      fewer than two requests. prompt_tokens, completion_tokens: mean of a unit. seconds: for the rest; None if unknown.
    known: whether prices are.
    """

    requests: int
    units: int
    remaining: int
    unit_cost: float
    margin: float | None
    prompt_tokens: float
    completion_tokens: float
    seconds: float | None
    known: bool

    @property
    def total(self) -> float:
        """The mean cost of the rest, in picodollars."""
        return self.unit_cost * self.remaining

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of `total`; None with fewer than two requests."""
        if self.margin is None:
            return None
        return max(0.0, self.unit_cost - self.margin) * self.remaining, (self.unit_cost + self.margin) * self.remaining

    def lines(self, left: int | None = None) -> list[str]:
        """For a person; `left` is what the budget still has, in picodollars (None: no limit)."""
        if not self.units:
            return [f"no estimate: none of {self.requests:,} requests brought a unit to its end"]
        costs = self.known and self.unit_cost > 0  # a server of one's own costs nothing
        tokens = f"{self.prompt_tokens:,.0f} + {self.completion_tokens:,.0f} tokens a unit"
        lines = [f"measured on {_count(self.requests, 'request')} ({_count(self.units, 'unit')}): {tokens}"]
        if costs:
            lines[0] += f", {dollars(self.unit_cost)} a unit{_interval(self._of_unit())}"
        if not self.remaining:
            return lines
        rest = [
            f"{_short(self.prompt_tokens * self.remaining)} + {_short(self.completion_tokens * self.remaining)} tokens"
        ]
        if costs:
            rest.append(f"{dollars(self.total)}{_interval(self.interval)}")
        if self.seconds is not None:
            rest.append(f"about {duration(self.seconds)}")
        lines.append(f"{_count(self.remaining, 'unit')} to go: {', '.join(rest)}")
        if costs and left is not None:
            lines.extend(self._of_budget(left))
        return lines

    def _of_unit(self) -> tuple[float, float] | None:
        return None if self.margin is None else (max(0.0, self.unit_cost - self.margin), self.unit_cost + self.margin)

    def _of_budget(self, left: int) -> list[str]:
        high = self.interval[1] if self.interval else self.total
        if left >= high:
            return []
        reach = min(self.remaining, int(left / self.unit_cost)) if self.unit_cost else self.remaining
        if reach < self.remaining:
            return [f"the budget has {dollars(left)} left: it will end before the units do, after about {reach:,} more"]
        return [f"the budget has {dollars(left)} left, which is within the interval: it may end before the units do"]


def estimate(sample: Sample, remaining: int, prices: Prices, *, rate: float | None = None) -> Estimate:
    """Judges the rest by what was answered.

    The interval is that of a normal approximation of the mean over requests; units are drawn at random, so the first
    ones stand for all.

    Args:
      sample: `Journal.sample`, of a pilot or of everything so far.
      remaining: units still to come.
      prices: by which the sample's cost was counted.
      rate: units ended per second; None: not measured.
    """
    n, units = sample.requests, max(1, sample.units)
    margin = None
    if n > 1:
        variance = max(0.0, sample.squares - sample.cost**2 / n) / (n - 1)
        margin = 1.96 * math.sqrt(variance / n) * n / units
    return Estimate(
        requests=n,
        units=sample.units,
        remaining=remaining,
        unit_cost=sample.cost / units,
        margin=margin,
        prompt_tokens=sample.prompt_tokens / units,
        completion_tokens=sample.completion_tokens / units,
        seconds=remaining / rate if rate else None,
        known=prices.known,
    )


@dataclass(frozen=True, slots=True)
class Bracket:
    """Between what a plan must cost and what it can cost, before anything was measured.

    requests: of the plan, one attempt each. prompt_low: tokens, at 4 bytes each. prompt_high, completion_high: upper
    bounds, see `most_tokens`. low: picodollars of `prompt_low` and no answers. high: of the upper bounds.
    """

    requests: int
    prompt_low: int
    prompt_high: int
    completion_high: int
    low: int
    high: int
    known: bool

    def lines(self, cap: int | None = None) -> list[str]:
        """For a person; `cap` is the budget in picodollars (None: no limit)."""
        lines = [
            f"{_count(self.requests, 'request')}: {_short(self.prompt_low)} to {_short(self.prompt_high)} "
            f"prompt tokens, at most {_short(self.completion_high)} completion tokens"
        ]
        if not self.known:
            return [*lines, "cost not known: set config.price.input and config.price.output"]
        if not self.high:
            return [*lines, "no cost: config.price says 0"]
        lines.append(
            f"between {dollars(self.low)} and {dollars(self.high)}; a pilot (config.request.pilot) measures it closer"
        )
        if cap is not None and cap < self.high:
            share = f"may end before the units do, after {cap * self.requests // self.high:,} requests at the earliest"
            if cap < self.low:
                share = "will end before the units do"
            lines.append(f"the budget of {dollars(cap)} {share}")
        return lines


def bracket(bodies: Iterable[Mapping[str, Any]], max_tokens: int, prices: Prices) -> Bracket:
    """The bracket of a plan, from the bodies of its requests, read as a stream."""
    requests = low_bytes = prompt_high = completion_high = high = 0
    for body in bodies:
        requests += 1
        low_bytes += sum(len(str(message["content"]).encode("utf-8", "replace")) for message in body["messages"])
        prompt, completion = most_tokens(body, max_tokens)
        prompt_high += prompt
        completion_high += completion
        high += prices.worst(body, max_tokens)
    prompt_low = low_bytes // 4
    low = math.floor(prompt_low * min(prices.prompt, prices.cached))
    return Bracket(requests, prompt_low, prompt_high, completion_high, low, high, prices.known)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _short(number: float) -> str:
    """1,234 as "1.2k", 56,000,000 as "56M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" (95% interval {dollars(bounds[0])} to {dollars(bounds[1])})"
