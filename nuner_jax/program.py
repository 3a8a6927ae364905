"""What a config makes of its task before any parameter exists: the optimizer, the state's shapes and places, the step.

Training begins with it, and so does everything that looks at a step without taking one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import initialise, optim, steps
from nuner_jax.state import TrainState
from nuner_jax.tasks.protocol import Task


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step, jitted and not yet compiled, and what it works on.

    total_steps: optimizer updates of the whole run.
    optimizer: whose memory the state holds.
    abstract: shapes, dtypes and shardings of the state.
    train_step: see `steps.make_train_step`.
    """

    total_steps: int
    optimizer: optax.GradientTransformation
    abstract: TrainState
    train_step: Callable


def make_program(config: ConfigDict, task: Task, mesh: Mesh) -> Program:
    """The program of a config.

    Args:
      config: the resolved config.
      task: of the config, on this mesh.
      mesh: of devices that need not be there.

    Raises:
      NunerError: an unknown schedule, or parameters that the mesh cannot split.
    """
    total = config.steps if config.steps is not None else math.ceil(config.epochs * task.steps_per_epoch)
    o = config.optim
    schedule = optim.learning_rate(
        o.schedule, peak=config.lr, end=o.end_lr, warmup_steps=round(o.warmup * total), total_steps=total
    )
    optimizer = optim.make_optimizer(
        schedule,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        share=task.learning_rate_share,
    )
    abstract = initialise.abstract_state(task, optimizer, mesh, config.mesh.rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return Program(
        total, optimizer, abstract, steps.make_train_step(task, optimizer, schedule, shardings, mesh, config.seed)
    )
