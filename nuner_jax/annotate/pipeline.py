"""The stages of annotation in their order.

Each reads what the ones before left in the folder of the run (`workdir.py` lists it), so each can run by itself, and
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax import config as config_lib
from nuner_jax.annotate import alignment
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.plan import show_plan
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.report import page as report_lib
from nuner_jax.annotate.request.ask import ask, check_endpoint, identity
from nuner_jax.annotate.selection.select import read_units, select
from nuner_jax.annotate.workdir import (
    ALIGNED_FILE,
    CONFIG_FILE,
    COUNTS_FILE,
    JOURNAL_FILE,
    SELECTION_FILE,
    SELECTION_FOLDER,
    SHARDS_FOLDER,
    UNITS_FILE,
    of_stage,
    read_json,
)
from nuner_jax.data import builder
from nuner_jax.errors import NunerError
from nuner_jax.folders import locked, writing
from nuner_jax.writers import Console

STAGES = ("select", "request", "align", "build", "report")


def annotate(
    config: ConfigDict,
    workdir: Path,
    console: Console,
    *,
    stages: Sequence[str] = STAGES,
    dry_run: bool = False,
    pilot_only: bool = False,
) -> None:
    """Runs stages in their order; what is done already is not done again.

    Args:
      config: see `nuner_jax.config.annotate`.
      workdir: where everything goes; a journal there is gone on with.
      console: tells what happens.
      stages: some of `STAGES`.
      dry_run: select, then only show the first prompts, the plan and the estimate; nothing is asked.
      pilot_only: ask for the pilot's units, tell what all would cost, and stop.

    Raises:
      NunerError: bad input, named before anything is asked; an endpoint that cannot be used.
    """
    prompt = Prompt.make(config.prompt)
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if "request" in stages and not dry_run:
            _check_before(config, prompt, workdir)
        config_lib.save(config, workdir / CONFIG_FILE)
        if "select" in stages or dry_run:
            select(config, workdir / SELECTION_FOLDER, console.say)
        if dry_run:
            units_file = workdir / SELECTION_FOLDER / UNITS_FILE
            show_plan(
                config,
                prompt,
                lambda: (unit.text for unit in read_units(units_file)),
                workdir / JOURNAL_FILE,
                console.say,
            )
            return
        if "request" in stages and not _request(config, prompt, workdir, console, pilot_only):
            return
        if "align" in stages:
            _align(config, workdir, console)
        failure = None
        if "build" in stages:
            try:
                build(config, workdir, console.say)
            except NunerError as error:  # where nothing was aligned, the report tells why
                failure = error
        if "report" in stages:
            page = report_lib.write_report(config, workdir)
            console.say(f"report       {page}")
        if failure:
            raise failure


def ensure_annotated(config_file: str, cache_dir: Path) -> Path:
    """The shards of an annotation config, made first if need be; for the trainer.

    Only recorded completions are annotated so: an endpoint that takes time and money is for
    `python -m nuner_jax.annotate`.

    Raises:
      NunerError: the config is of another kind, or of an endpoint.
    """
    config = config_lib.load_file(config_file)
    config_lib.check(config, tasks=("annotate",))
    if config.endpoint.kind != "replay":
        raise NunerError(
            f"{config_file}: asks a language model; annotate first, and give WORKDIR/shards as the source: "
            f"python -m nuner_jax.annotate --config={config_file} --workdir=WORKDIR"
        )
    prompt = Prompt.make(config.prompt)
    key = hashlib.sha256(json.dumps([identity(config, prompt), config.to_json_best_effort()]).encode()).hexdigest()
    workdir = cache_dir / f"{Path(config_file).stem}-{key[:12]}"
    shards = workdir / SHARDS_FOLDER
    if not builder.is_built(shards):
        with locked(workdir):
            if not builder.is_built(shards):
                annotate(config, workdir, Console(active=False))
        if not builder.is_built(shards):  # a signal
            raise NunerError(f"{config_file}: stopped before its shards were built; the same command goes on")
    return shards


def _check_before(config: ConfigDict, prompt: Prompt, workdir: Path) -> None:
    """Finds what would stop the requests before the selection is made, which may take hours.

    In a later start the selection is there already, and there may be nothing left to ask for: then the endpoint is
    looked at when it is needed.
    """
    if (workdir / JOURNAL_FILE).exists():
        Journal.open(workdir / JOURNAL_FILE, identity(config, prompt), read_only=True).close()
        return
    check_endpoint(config)


def _request(config: ConfigDict, prompt: Prompt, workdir: Path, console: Console, pilot_only: bool) -> bool:
    """Asks for what is not answered yet; whether the next stages are to go on."""
    selection = workdir / SELECTION_FOLDER
    fingerprint = read_json(selection / SELECTION_FILE, "select")["fingerprint"]
    with Journal.open(workdir / JOURNAL_FILE, identity(config, prompt)) as journal:
        journal.set_units(read_units(selection / UNITS_FILE), fingerprint)
        if config.request.retry_failed and (again := journal.retry_failed()):
            console.say(f"request      {again:,} failed units are asked for again")
        summary = ask(config, journal, prompt, console, pilot_only=pilot_only)
        totals = summary.totals
    if summary.stopped in ("signal", "pilot"):
        return False
    if summary.stopped == "budget":
        console.say(
            f"the budget of ${config.request.budget:g} is used up: {totals.pending:,} of {totals.units:,} units were "
            "not asked; raise config.request.budget to go on"
        )
    return True


def _align(config: ConfigDict, workdir: Path, console: Console) -> None:
    with Journal.open(of_stage(workdir / JOURNAL_FILE, "request"), read_only=True) as journal:
        alignment.align_journal(config, journal, workdir, console.say)


def build(config: ConfigDict, workdir: Path, say: Callable[[str], None], *, beam_options: Any = None) -> None:
    """The stage `build`: the aligned records as shards, which replace those of an earlier state of the journal.

    Args:
      config: its `build` counts.
      workdir: with what `align` wrote.
      say: gets the summary.
      beam_options: Beam's PipelineOptions, if Beam is to write the shards; all its workers must see `workdir`.

    Raises:
      NunerError: nothing is aligned yet, or the shards cannot be written.
    """
    counts = read_json(workdir / COUNTS_FILE, "align")
    made_of = {"aligned": counts["sha256"], "validation_fraction": config.build.validation_fraction}
    shards = workdir / SHARDS_FOLDER
    stored = builder.read_report(shards) if builder.is_built(shards) else {}
    fresh = any(stored.get(key) != value for key, value in made_of.items())
    if fresh:
        builder.build(
            alignment.read_records(workdir / ALIGNED_FILE),
            shards,
            validation_fraction=config.build.validation_fraction,
            overwrite=True,
            provenance={"aligned": counts["sha256"], "annotation": counts},
            beam_options=beam_options,
        )
    sizes = ", ".join(f"{split} {size:,}" for split, size in builder.read_report(shards)["splits"].items())
    say(f"shards       {shards}: {sizes}{'' if fresh else ' (up to date)'}")
