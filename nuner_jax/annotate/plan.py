"""What a run is about to do, before it asks for anything: the first prompts, the plan, and what it may cost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.money import Prices, bracket, estimate, picodollars
from nuner_jax.annotate.prompts import Prompt, request_body

PROMPTS_SHOWN = 3


def show_plan(
    config: ConfigDict,
    prompt: Prompt,
    texts: Callable[[], Iterable[str]],
    journal_file: Path,
    say: Callable[[str], None],
) -> None:
    """Tells the first prompts, what would be asked and where, and the bracket of its cost.

    Where a journal has answers already, the estimate that they give is told, too.

    Args:
      config, prompt: of the run.
      texts: of the units, in order; read anew at each call.
      journal_file: the journal, which may not be there yet.
      say: takes a line.
    """
    for number, group in enumerate(itertools.islice(_requests(texts(), prompt), PROMPTS_SHOWN), start=1):
        body = request_body(config.endpoint, prompt, group)
        say(f"--- request {number} " + "-" * 60)
        for message in body.pop("messages"):
            say(f"[{message['role']}]")
            say(message["content"])
        say(f"[with] {json.dumps(body, ensure_ascii=False)}")
    say("-" * 72)
    bodies = (request_body(config.endpoint, prompt, group) for group in _requests(texts(), prompt))
    prices = Prices.make(config)
    plan = bracket(bodies, config.endpoint.max_tokens, prices)
    units = sum(1 for _ in texts())
    say(f"plan         {units:,} units, {prompt.units_per_request} in a request, {_where(config)}")
    for line in plan.lines(picodollars(config.request.budget)):
        say(f"             {line}")
    if journal_file.exists():
        with Journal.open(journal_file, read_only=True) as journal:
            totals, sample = journal.totals(), journal.sample()
        say(f"journal      {totals.done:,} units done, {totals.failed:,} failed, {totals.pending:,} to go")
        for line in estimate(sample, totals.pending, prices).lines():
            say(f"             {line}")
    say("dry run: nothing was asked")


def _requests(texts: Iterable[str], prompt: Prompt) -> Iterator[Sequence[str]]:
    """The texts of each request, in order."""
    left = iter(texts)
    while group := list(itertools.islice(left, prompt.units_per_request)):
        yield group


def _where(config: ConfigDict) -> str:
    endpoint = config.endpoint
    if endpoint.kind == "replay":
        return f"from the recorded completions of {endpoint.replay}"
    way = "by the Batch API of" if endpoint.kind == "batch" else f"up to {config.request.max_concurrency} at a time, to"
    return f"{way} {endpoint.base_url}, model {endpoint.model}"
