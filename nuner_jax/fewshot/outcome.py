"""What is kept of the labels that heads, or language models, give: a row for each, and what the page shows of a set."""

from __future__ import annotations

from typing import Any

import numpy as np

from nuner_jax import metrics
from nuner_jax.fewshot import page
from nuner_jax.fewshot.plan import Job, Plan
from nuner_jax.fewshot.scoring import score


def rows_of(plan: Plan, job: Job, predicted_HxW: np.ndarray, found: metrics.Spans) -> list[dict[str, Any]]:
    """The results of a job, one for each of its seeds, which are the heads of `predicted_HxW` and `found`."""
    material = plan.sets[job.set]
    query, types = material.query, material.data.types
    scores = score(query, types, predicted_HxW, found, plan.config.eval.include_other)
    return [
        {
            "set": job.set,
            "encoder": job.encoder,
            "head": job.head,
            "k": job.k,
            "rule": plan.grid.rule,
            "seed": seed,
            **material.facts(job.k, seed),
            **of_head,
            "settings": plan.settings[job.set, job.encoder, job.head],
        }
        for seed, of_head in zip(job.seeds, scores, strict=True)
    ]


def keep_detail(plan: Plan, job: Job, predicted_HxW: np.ndarray, found: metrics.Spans) -> None:
    """Writes what the page tells of a job's errors, its seeds together, if it is the one that is shown."""
    if job.system != plan.shown:
        return
    material = plan.sets[job.set]
    query, types = material.query, material.data.types
    confusion_HxCxC = metrics.confusion(query.labels_W, predicted_HxW, len(types))
    plan.detail_file(job.set).parent.mkdir(exist_ok=True)
    page.write_detail(
        page.examine(plan.shown_title, types, query.texts, query.mentions, found, confusion_HxCxC),
        plan.detail_file(job.set),
    )
