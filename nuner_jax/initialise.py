"""Where the parameters of a run come from.

In this order, the first that applies:
1. this workdir's latest checkpoint (resume: parameters, optimizer, step);
2. another run's checkpoint, `config.checkpoint.init_from` (parameters alone);
3. pretrained weights, `config.model.init = "pretrained"`;
4. random numbers.
"""

from __future__ import annotations

import dataclasses

import jax
import optax
from ml_collections import ConfigDict

from nuner_jax import checkpoint, sharding, steps
from nuner_jax.models.params import flatten, unflatten
from nuner_jax.state import TrainState
from nuner_jax.tasks.protocol import Task


@dataclasses.dataclass(frozen=True)
class Start:
    """A state to start from; `origin` says in words where it is from; `resumed` that it is this run's own."""

    state: TrainState
    origin: str
    resumed: bool


def start(
    config: ConfigDict,
    task: Task,
    optimizer: optax.GradientTransformation,
    checkpoints: checkpoint.Checkpoints,
    abstract: TrainState,
) -> Start:
    """The state to train from.

    Args:
      config: the resolved config.
      task: the task of the config.
      optimizer: whose memory the state holds.
      checkpoints: of this workdir.
      abstract: shapes, dtypes and shardings of the state.

    Raises:
      NunerError: a checkpoint or weights that do not fit the model, naming every leaf.
    """
    if checkpoints.latest is not None:
        path = checkpoints.path(checkpoints.latest)
        return Start(checkpoints.restore(abstract), f"resumed at step {checkpoints.latest} from {path}", True)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if config.checkpoint.init_from:
        path = checkpoint.resolve(config.checkpoint.init_from)
        params, origin = checkpoint.load_params(path, abstract.params), f"parameters of the checkpoint {path}"
    else:
        init = jax.jit(task.init_params, out_shardings=shardings.params)
        params, origin = init(jax.random.key(config.seed)), f"random parameters of seed {config.seed}"
        if config.model.init == "pretrained":
            weights = task.pretrained_params(abstract.params)
            params = _replace(params, weights, shardings.params)
            origin = "pretrained weights: " + ", ".join(f"{name} {config.model[name]}" for name in weights)
    new = jax.jit(lambda p: steps.new_state(task, optimizer, p), out_shardings=shardings, donate_argnums=0)
    return Start(new(params), origin, False)


def _replace(params: dict, weights: dict, shardings: dict) -> dict:
    """Puts host arrays in the place of the parameters of the same path, split over the devices alike."""
    places = flatten(shardings)
    placed = {
        path: jax.make_array_from_callback(value.shape, places[path], lambda index, value=value: value[index])
        for path, value in flatten(weights).items()
    }
    return unflatten(flatten(params) | placed)


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh, rules) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, without computing any of it."""
    shapes = jax.eval_shape(lambda: steps.new_state(task, optimizer, task.init_params(jax.random.key(0))))
    return sharding.with_shardings(mesh, shapes, rules)
