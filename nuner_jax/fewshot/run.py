"""A few-shot evaluation: every set with every encoder, head, k and seed, then tables, curves and a page.

Everything is looked at before anything is computed. Then, for each set and encoder, the words' vectors are computed
once, and for each k the heads of all seeds are trained at once, scored, and written to WORKDIR/results.jsonl; language
models are asked about the same sentences. A second start goes on from there.
"""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from nuner_jax import workdir as workdir_lib
from nuner_jax.fewshot import frozen
from nuner_jax.fewshot.llm import baseline
from nuner_jax.fewshot.plan import prepare
from nuner_jax.fewshot.report import report
from nuner_jax.fewshot.results import Results, read_rows
from nuner_jax.fewshot.starts import Starts
from nuner_jax.folders import held, writing
from nuner_jax.writers import Console


def fewshot(config: ConfigDict, workdir: Path, console: Console, *, dry_run: bool = False) -> Results:
    """Runs a few-shot evaluation, or the rest of one.

    Args:
      config: see `nuner_jax.config.fewshot_schema`.
      workdir: where results, tables, curves and the page go.
      console: for progress and the table.
      dry_run: read and check all, show the first prompts of language models and what asking may cost, and stop.

    Returns:
      What is there; not all if the budget of a language model or a signal ended it before.

    Raises:
      NunerError: bad input, named before anything is computed.
    """
    workdir_lib.refuse_other_task(config, workdir)
    workdir_lib.make(workdir)
    with held(workdir), writing(workdir):
        starts = Starts(workdir)
        plan = prepare(config, workdir, console)
        if dry_run:
            baseline.show(plan, console)
            return Results(read_rows(plan.rows_file), plan.grid)
        baseline.check(plan, console)
        starts.write()  # before the first row, which a kill right after it must not leave without its start
        frozen.measure(plan, console, starts)
        go_on = baseline.measure(plan, console, starts)
        starts.write()
        if not go_on:
            return Results(read_rows(plan.rows_file), plan.grid)
        return report(plan, starts, console)
