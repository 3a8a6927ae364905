"""What is to be asked, in which requests; and what both ways of asking begin and end with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.journal.journal import Journal, Totals
from nuner_jax.annotate.money import Prices
from nuner_jax.annotate.prompts import Prompt, request_body
from nuner_jax.annotate.units import Pending

PAGE = 500  # pending units read from the journal at a time


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run of requests ended.

    stopped: "finished" (nothing is left to ask for), "budget", "signal" or "pilot". totals: of the journal, then.
    """

    stopped: str
    totals: Totals


def body_for(config: ConfigDict, prompt: Prompt, units: Sequence[Pending]) -> dict[str, Any]:
    """The body of the request that asks for `units`."""
    return request_body(config.endpoint, prompt, [unit.text for unit in units])


def settle_earlier(config: ConfigDict, journal: Journal, prompt: Prompt) -> None:
    """Counts what earlier starts left open: requests in flight are lost.

    Where no price was known then, or another one, answers without a price get one, and what is reserved for the
    requests of open batches is what they cost at most now.
    """
    journal.abandoned()
    live, batch = Prices.make(config, "live"), Prices.make(config, "batch")
    if config.endpoint.kind == "replay" or not live.known:
        return
    journal.price(live.of, batch.of)

    def worst(units: Sequence[Pending]) -> int:
        return batch.worst(body_for(config, prompt, units), config.endpoint.max_tokens)

    for row in journal.batches():
        amounts = ((name, worst(units)) for name, units in journal.batch_requests(row.key))
        first = next(amounts, None)
        if first and first[1] != journal.reserved(first[0]):  # else nor do the others differ
            journal.reserve([first, *amounts])


def groups(journal: Journal, size: int, most: int | None = None) -> Iterator[list[Pending]]:
    """Pending units in order, `most` of them or all, as they share requests of `size`; read as they are asked for.

    One that was asked for before is alone in its request: maybe an answer to several left it out.
    """
    after = -1
    while page := journal.pending(after, PAGE if most is None else min(PAGE, most)):
        after = page[-1].position
        most = None if most is None else most - len(page)
        fresh = [unit for unit in page if not unit.attempts]
        yield from (fresh[start : start + size] for start in range(0, len(fresh), size))
        yield from ([unit] for unit in page if unit.attempts)
