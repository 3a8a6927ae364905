"""Tasks: what pre-training and fine-tuning do not share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax.errors import NunerError
from nuner_jax.tasks.protocol import Evaluator, Task


def make_task(config: ConfigDict, mesh: Mesh, say: Callable[[str], None] = lambda line: None) -> Task:
    """The task that `config.task` names, its data opened and its shapes known.

    `say` is told what takes long, and what was found.

    Raises:
      NunerError: an unknown task, or anything wrong with its data, weights or sizes.
    """
    from nuner_jax.tasks.closed_set import ClosedSet
    from nuner_jax.tasks.pretrain import Pretrain
    from nuner_jax.tasks.tagging import Tagging

    tasks = {"pretrain": Pretrain, "pretrain_classes": ClosedSet, "finetune": Tagging}
    if config.task not in tasks:
        raise NunerError(f"config.task: unknown {config.task!r}; choose one of {', '.join(tasks)}")
    return tasks[config.task](config, mesh, say)


def run_evaluators(evaluators: Mapping[str, Evaluator], params: dict) -> dict[str, float]:
    """All of these evaluations: "evaluator/metric" -> value."""
    return {f"{name}/{metric}": value for name, evaluator in evaluators.items() for metric, value in evaluator(params)}
