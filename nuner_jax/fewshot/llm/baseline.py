"""Language models in context: asked about the query sentences with the samples' sentences as examples, and scored.

Annotation's client asks (`annotate.request`), so what holds there holds here: WORKDIR/llms/NAME/journal.sqlite has
every prompt, attempt, answer and its cost before it counts, no answer that arrived is asked for again, and the budget
is never exceeded. A prompt is a unit of the journal; two that are alike, as of samples that are, are asked once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nuner_jax import metrics
from nuner_jax.annotate import money
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.plan import PROMPTS_SHOWN, show_plan
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.ask import ask, check_endpoint, identity
from nuner_jax.annotate.request.work import Summary
from nuner_jax.annotate.units import Completed, Unit
from nuner_jax.annotate.workdir import JOURNAL_FILE
from nuner_jax.data.ner.words import label_words
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError
from nuner_jax.fewshot.llm.answers import Found, TypeNames, read_answer
from nuner_jax.fewshot.llm.prompt import make_prompt
from nuner_jax.fewshot.outcome import keep_detail, rows_of
from nuner_jax.fewshot.plan import Job, Plan
from nuner_jax.fewshot.results import IN_CONTEXT, append_rows, remove_rows
from nuner_jax.fewshot.starts import Starts
from nuner_jax.writers import Console

_PROMPT = Prompt.verbatim()
_CLIENTS_KEYS = re.compile(r"config\.(?=(?:endpoint|request|price|batch)\.)")

Answers = Mapping[str, Completed]


# --- What is asked -----------------------------------------------------------------------------


def show(plan: Plan, console: Console) -> None:
    """Tells what each model would be asked, and what that may cost; asks nothing."""
    for name, config in plan.llms.items():
        console.say(f"llm {name}")

        def texts(name: str = name) -> Iterator[str]:
            return (unit.text for unit in _units(plan, name, PROMPTS_SHOWN))

        with _named(name):
            show_plan(config, _PROMPT, texts, _journal_file(plan, name), _Renaming(console, name).say)
    if not plan.llms:
        console.say("dry run: nothing was computed")


def check(plan: Plan, console: Console) -> None:
    """Finds what would stop the requests before anything is computed.

    Results that miss answers are made again where config.llms.NAME.request.retry_failed says so.

    Raises:
      NunerError: an endpoint that cannot be used; a journal of another model.
    """
    for name, config in plan.llms.items():
        if config.request.retry_failed:
            mine = (name, IN_CONTEXT)  # an encoder may have had the name before
            remove_rows(
                plan.rows_file,
                lambda row, mine=mine: (row["encoder"], row["head"]) == mine and bool(row["answers"]["failed"]),
            )
        if not plan.missing_jobs((name,)):
            continue
        with _named(name):
            if not _is_answered(plan, name):
                check_endpoint(config)
        console.say(f"llm {name}: {config.endpoint.model} at {config.endpoint.base_url}")


def _is_answered(plan: Plan, name: str) -> bool:
    """Whether the journal has all the answers, so that there need be no endpoint; refuses one of another model."""
    file, config = _journal_file(plan, name), plan.llms[name]
    if not file.exists():
        return False
    with Journal.open(file, identity(config, _PROMPT), read_only=True) as journal:
        totals, same = journal.totals(), journal.fingerprint() == _fingerprint(plan, name)
    return same and not totals.pending and not (config.request.retry_failed and totals.failed)


def _fingerprint(plan: Plan, name: str) -> str:
    """That of all prompts and their order."""
    samples = [plan.sets[of_set].samples for of_set in plan.grid.sets]
    settings = [plan.settings[of_set, name, IN_CONTEXT] for of_set in plan.grid.sets]
    decides = (plan.grid.sets, plan.grid.k, settings, samples, plan.llms[name].request.pilot)
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def _units(plan: Plan, name: str, first: int) -> Iterator[Unit]:
    """Every prompt, in the order of asking: the `first` ones are from everywhere, so that a pilot stands for all."""
    sentences = sum(len(material.query.texts) for material in plan.sets.values())
    stride = max(1, sentences * sum(len(plan.grid.seeds_at(k)) for k in plan.grid.k) // max(1, first))
    for early in (True, False):
        for number, unit in enumerate(_in_order(plan, name)):
            if (number % stride == 0) is early:
                yield unit


def _in_order(plan: Plan, name: str) -> Iterator[Unit]:
    for of_set in plan.grid.sets:
        for k in plan.grid.k:
            for seed in plan.grid.seeds_at(k):
                yield from _units_of(plan, name, of_set, k, seed)


def _units_of(plan: Plan, name: str, of_set: str, k: int, seed: int) -> Iterator[Unit]:
    """A prompt for each query sentence, in their order."""
    material = plan.sets[of_set]
    shown = material.samples[k, seed].ids[: plan.llms[name].examples]
    examples = [material.data.train[number] for number in shown]
    for number, text in enumerate(material.query.texts):
        prompt = make_prompt(plan.definitions[of_set], examples, text)
        yield Unit.of(prompt, f"{of_set}, k = {k}, seed {seed}, query sentence {number}")


# --- Asking and scoring ------------------------------------------------------------------------


def measure(plan: Plan, console: Console, starts: Starts) -> bool:
    """Asks for the answers that are not there yet, and writes the results of what is answered.

    Returns:
      Whether to go on: a signal that stopped the asking is meant for the whole run.
    """
    for name in plan.llms:
        jobs = plan.missing_jobs((name,))
        if not jobs:
            continue
        summary, answers = _ask(plan, name, console)
        for job in jobs:
            _score(plan, job, answers, console)
        starts.write()
        if summary.stopped == "signal":
            console.say(f"llm {name}: stopped with {summary.totals.pending:,} prompts to go; the same command goes on")
            return False
        if summary.stopped == "budget":
            console.say(
                f"the budget of llm {name} is used up: {summary.totals.pending:,} of {summary.totals.units:,} prompts "
                f"were not asked; raise config.llms.{name}.request.budget to go on"
            )
    return True


def _ask(plan: Plan, name: str, console: Console) -> tuple[Summary, Answers]:
    """Asks for what the journal lacks; gives all that it has then, by the prompts' ids."""
    config = plan.llms[name]
    with _named(name), Journal.open(_journal_file(plan, name), identity(config, _PROMPT)) as journal:
        journal.set_units(_units(plan, name, config.request.pilot), _fingerprint(plan, name))
        if config.request.retry_failed and (again := journal.retry_failed()):
            console.say(f"llm {name}: {again:,} failed prompts are asked again")
        summary = ask(config, journal, _PROMPT, _Renaming(console, name))
        # Without their texts, which would fill the memory: each holds all the examples.
        return summary, {one.id: dataclasses.replace(one, text="") for one in journal.completions()}


def _score(plan: Plan, job: Job, answers: Answers, console: Console) -> None:
    """Writes the rows of those seeds of a job that have all their answers."""
    material = plan.sets[job.set]
    found = {seed: read for seed in job.seeds if (read := _read(plan, job, seed, answers)) is not None}
    if not found:
        return
    job = dataclasses.replace(job, seeds=tuple(found))
    numbers = {name: number for number, name in enumerate(material.data.types, start=1)}
    predicted_HxW = np.zeros((len(found), len(material.query.labels_W)), np.int32)
    mentions = []
    for head, (readings, _) in enumerate(found.values()):
        records = [reading.record for reading in readings]
        labels = [
            label_words(record, words, numbers) for record, words in zip(records, material.query.spans, strict=True)
        ]
        predicted_HxW[head] = np.concatenate(labels)
        mentions += [
            (head, sentence, entity.start, entity.end, numbers[entity.concept])
            for sentence, record in enumerate(records)
            for entity in record.entities
        ]
    spans = metrics.Spans(*np.array(mentions, np.int64).reshape(-1, 5).T)
    rows = rows_of(plan, job, predicted_HxW, spans)
    for row, (_, told) in zip(rows, found.values(), strict=True):
        row["answers"] = told
    keep_detail(plan, job, predicted_HxW, spans)
    append_rows(plan.rows_file, rows)
    mean = np.mean([row["token_macro_f1"] for row in rows])
    console.say(
        f"{job.set}, {plan.grid.name_of(job.encoder, job.head)}, k = {job.k}: token macro F1 {100 * mean:.1f}, "
        f"mean of {len(rows)} seeds"
    )


def _read(plan: Plan, job: Job, seed: int, answers: Answers) -> tuple[list[Found], dict[str, Any]] | None:
    """What the answers of one seed say of each sentence, and what became of them; None if one is not there yet.

    A sentence whose prompt failed for good counts as one without entities.
    """
    material = plan.sets[job.set]
    types, readings, failed = TypeNames(material.data.types), [], 0
    for text, unit in zip(material.query.texts, _units_of(plan, job.encoder, job.set, job.k, seed), strict=True):
        answer = answers[unit.id]
        if answer.state == "pending":
            return None
        failed += answer.state == "failed"
        done = answer.state == "done"
        cut = answer.finish == "length"
        readings.append(
            read_answer(answer.completion, text, types, cut=cut) if done else Found(Record(text), Counter())
        )
    told = {
        "examples": min(len(material.samples[job.k, seed].ids), plan.llms[job.encoder].examples),
        "asked": len(readings),
        "failed": failed,
        "mentions": sum(len(reading.record.entities) for reading in readings),
        "left_out": dict(sum((reading.left_out for reading in readings), Counter())),
    }
    return readings, told


# --- What is told ------------------------------------------------------------------------------


def notes(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the tables' readers should know of the language models: examples, cost, and lines that were of no use."""
    lines = []
    if 0 in plan.grid.k:
        lines.append("k = 0: definitions only. Without examples all seeds would ask the same, so there is one result")
    for name, config in plan.llms.items():
        lines += _about_cost(plan, name)
        mine = [row for row in rows if row["encoder"] == name]
        if any(row["answers"]["examples"] < row["sentences"] for row in mine):
            lines.append(
                f"{name}: of larger samples the first {config.examples} sentences are shown, in the order of the pool "
                f"(config.llms.{name}.examples)"
            )
        for of_set in plan.grid.sets:
            lines += _about_answers(f"{name}, {of_set}", [row["answers"] for row in mine if row["set"] == of_set])
    return lines


def _about_cost(plan: Plan, name: str) -> list[str]:
    file, endpoint = _journal_file(plan, name), plan.llms[name].endpoint
    if not file.exists():
        return []
    with Journal.open(file, read_only=True) as journal:
        totals = journal.totals()
    cost = f", {money.dollars(totals.spent)}" if totals.spent else ""
    unsure = f" and at most {money.dollars(totals.unsure)} unsure" if totals.unsure else ""
    return [
        f"{name}: {endpoint.model} at {endpoint.base_url}; {totals.attempts:,} requests, {totals.prompt_tokens:,} + "
        f"{totals.completion_tokens:,} tokens{cost}{unsure}"
    ]


def _about_answers(where: str, told: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became of the answers about one set, over all k and seeds."""
    if not told:
        return []
    left_out = sum((Counter(one["left_out"]) for one in told), Counter())
    asked, failed, mentions = (sum(one[key] for one in told) for key in ("asked", "failed", "mentions"))
    line = f"{where}: {asked:,} answers with {mentions:,} mentions"
    if left_out:
        reasons = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in left_out.most_common())
        line += f"; lines of no use: {reasons}"
    if failed:
        line += f"; {failed:,} sentences without an answer count as without entities"
    return [line]


def _journal_file(plan: Plan, name: str) -> Path:
    return plan.workdir / "llms" / name / JOURNAL_FILE


class _Renaming:
    """A console on which annotation's client calls its keys as they are called here."""

    def __init__(self, console: Console, name: str):
        self._console, self._name = console, name

    def say(self, line: str = "") -> None:
        self._console.say(_renamed(line, self._name))

    def progress(self, line: str, final: bool) -> None:
        self._console.progress(_renamed(line, self._name), final=final)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """The same for its errors."""
    try:
        yield
    except NunerError as error:
        raise NunerError(_renamed(str(error), name)) from error


def _renamed(line: str, name: str) -> str:
    return _CLIENTS_KEYS.sub(f"config.llms.{name}.", line)
