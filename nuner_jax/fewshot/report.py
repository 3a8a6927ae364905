"""The outcome of a few-shot evaluation: tables, curves and the page, of the rows that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nuner_jax.fewshot import figures, page, tables
from nuner_jax.fewshot.llm import baseline
from nuner_jax.fewshot.plan import Plan
from nuner_jax.fewshot.results import Results, read_rows, summarise
from nuner_jax.fewshot.starts import Starts
from nuner_jax.writers import Console, duration


def report(plan: Plan, starts: Starts, console: Console) -> Results:
    """Writes tables, curves and page, and prints the main table."""
    results = Results(read_rows(plan.rows_file), plan.grid)
    cells, notes = summarise(results), _notes(plan, results.rows)
    manifest = tables.make_manifest(
        plan.config,
        results,
        {name: material.data.report for name, material in plan.sets.items()},
        {name: encoder.fingerprint for name, encoder in plan.encoders.items()},
        starts,
    )
    paths = tables.write_tables(results, cells, manifest, plan.workdir, notes)
    curves = [
        figures.draw_curves(cells, plan.grid, name, plan.workdir / f"{name}.png")
        for name in ("token_macro_f1", "entity_f1")
    ]
    files = {name: plan.detail_file(name) for name in plan.grid.sets}
    details = {name: page.read_detail(file) for name, file in files.items() if file.exists()}
    details = {name: detail for name, detail in details.items() if detail.title == plan.shown_title}
    paths += [*curves, page.write_page(results, cells, manifest, details, curves, plan.workdir / "results.html", notes)]
    console.say()
    console.say("Token macro F1")
    console.say(tables.as_text(tables.score_table(cells, plan.grid, "token_macro_f1")))
    for line in tables.explanations(results, notes):
        console.say(f"  {line}")
    whole = f", all {len(starts.known)} starts {duration(starts.seconds)}" if len(starts.known) > 1 else ""
    console.say(
        f"Done in {duration(starts.known[-1]['seconds'])}{whole}. Written: {', '.join(path.name for path in paths)}"
    )
    console.say(f"  {plan.workdir}")
    return results


def _notes(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [note for material in plan.sets.values() for note in material.notes]
    if plan.config.eval.include_other:
        notes.append("Token macro F1 averages “outside” as one more type (config.eval.include_other)")
    silent = {(row["set"], row["encoder"]): row.get("words_without_tokens", 0) for row in rows}
    notes += [
        f"{name}, {encoder}: {count:,} query words that its tokenizer leaves out, taken as outside"
        for (name, encoder), count in silent.items()
        if count
    ]
    return notes + baseline.notes(plan, rows)
