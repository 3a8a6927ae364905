"""Evaluates a checkpoint: `python -m nuner_jax.evaluate --checkpoint=runs/quickstart`.

Runs the evaluations that training runs, the final ones among them, on the data of the run's own config, and prints
them as one JSON line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import flags
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from nuner_jax import checkpoint, sharding
from nuner_jax import workdir as workdir_lib
from nuner_jax.errors import NunerError, run_command
from nuner_jax.tasks import make_task, run_evaluators
from nuner_jax.tasks.protocol import Evaluator, Task


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and evaluates."""
    if len(argv) > 1 or not flags.FLAGS.checkpoint:
        raise NunerError("--checkpoint=WORKDIR_OR_CHECKPOINT is needed")
    print(json.dumps(evaluate(flags.FLAGS.checkpoint)))


def evaluate(path: str) -> dict[str, float | int | str]:
    """The evaluations of a checkpoint's task, with the checkpoint's folder and step.

    Args:
      path: a workdir (its best checkpoint) or WORKDIR/checkpoints/STEP.

    Raises:
      NunerError: there is no such checkpoint, its data cannot be opened, or it does not fit its config.
    """
    folder = checkpoint.resolve(path)
    config = workdir_lib.read_config(folder.parent.parent)
    mesh = _mesh(config)
    task = make_task(config, mesh)
    metrics = measure(folder, task, task.evaluators() | task.final_evaluators(), mesh, config.mesh.rules)
    return {"checkpoint": str(folder), "step": int(folder.name), **metrics}


def measure(folder: Path, task: Task, evaluators: Mapping[str, Evaluator], mesh: Mesh, rules) -> dict[str, float]:
    """What evaluators of a task say of a checkpoint: "evaluator/metric" -> value.

    Args:
      folder: WORKDIR/checkpoints/STEP.
      task: of the checkpoint.
      evaluators: by name.
      mesh, rules: place the parameters.

    Raises:
      NunerError: the checkpoint does not fit the task.
    """
    shapes = jax.eval_shape(task.init_params, jax.random.key(0))
    return run_evaluators(evaluators, checkpoint.load_params(folder, sharding.with_shardings(mesh, shapes, rules)))


def _mesh(config: ConfigDict) -> Mesh:
    """The run's mesh where it fits the devices at hand, else as many of them along `data` as its rows split over.

    The number of rows stays what it was in training, because the loss depends on it: a row's negatives are the
    concepts of its batch.
    """
    rows = [config.eval.rows, config.data.rows // config.optim.accumulate]
    rows += [config.data.row_multiple] if config.task == "pretrain" else []  # of the concepts
    try:
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        if all(number % sharding.batch_devices(mesh) == 0 for number in rows):
            return mesh
    except NunerError:  # of a run on another number of devices
        pass
    count = math.gcd(jax.device_count(), *rows)
    return jax.make_mesh(
        (count, 1, 1), sharding.AXES, devices=jax.devices()[:count], axis_types=(AxisType.Auto,) * len(sharding.AXES)
    )


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Workdir of a run (its best checkpoint), or one checkpoint.")
    run_command(main)
