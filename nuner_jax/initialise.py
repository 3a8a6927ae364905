"""Where the parameters of a run come from.

In this order, the first that applies:
1. this workdir's latest checkpoint (resume: parameters, optimizer, step);
2. another run's checkpoint, `config.checkpoint.init_from` (parameters alone);
3. pretrained weights, `config.model.init = "pretrained"`;
4. random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import optax
from ml_collections import ConfigDict

from nuner_jax import checkpoint, sharding, steps
from nuner_jax.errors import NunerError
from nuner_jax.models.params import flatten, unflatten
from nuner_jax.state import TrainState
from nuner_jax.tasks.protocol import Task

_NAMES_SHOWN = 12  # of labels, in a message


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
        state = checkpoints.restore(abstract)
        _check_data(path, task)
        return Start(state, f"resumed at step {checkpoints.latest} from {path}", True)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if config.checkpoint.init_from:
        path = checkpoint.resolve(config.checkpoint.init_from)
        _check_labels(path, task)
        params = checkpoint.load_params(path, abstract.params, donatable=True)
        origin = f"parameters of the checkpoint {path}"
    else:
        weights, origin = {}, f"random parameters of seed {config.seed}"
        if config.model.init == "pretrained":
            weights = task.pretrained_params(abstract.params)
            named = [f"{name} {config.model[name]}" for name in weights if name in config.model]
            origin = f"pretrained weights: {', '.join(named)}"
        params = _random_except(weights, task, config.seed, shardings.params)
    new = jax.jit(lambda p: steps.new_state(task, optimizer, p), out_shardings=shardings, donate_argnums=0)
    return Start(new(params), origin, False)


def _check_data(path: Path, task: Task) -> None:
    """A run goes on with the data that it began with, or it would not be the same run."""
    there, here = checkpoint.read_info(path).get("data"), task.export_info()["data"]
    if there != here:
        raise NunerError(
            f"the training data is not that of the checkpoint {path} (fingerprint {here[:12]}, not {there[:12]}): "
            f"take the old data, or start in another --workdir with --config.checkpoint.init_from={path}"
        )


def _check_labels(path: Path, task: Task) -> None:
    """A head is of no use for other labels or classes, be they as many; and no shape would tell."""
    info, own = checkpoint.read_info(path), task.export_info()
    for what in ("labels", "classes"):
        there, here = info.get(what), own.get(what)
        if there and here and list(there) != list(here):
            raise NunerError(
                f"config.checkpoint.init_from: {path} has a head for the {what} {_shown(there)}, and here they are "
                f"{_shown(here)}: to take its encoder alone, set config.model.text to it"
            )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f", … ({len(names):,})" if len(names) > _NAMES_SHOWN else "")


def _random_except(weights: dict, task: Task, seed: int, shardings: dict) -> dict:
    """Random parameters, but host arrays where there are some; what these replace is never drawn."""
    weights, places = flatten(weights), flatten(shardings)

    def draw(key: jax.Array) -> dict:
        return {path: leaf for path, leaf in flatten(task.init_params(key)).items() if path not in weights}

    drawn = {path: place for path, place in places.items() if path not in weights}
    params = jax.jit(draw, out_shardings=drawn)(jax.random.key(seed))
    for path, value in weights.items():
        params[path] = jax.make_array_from_callback(value.shape, places[path], lambda at, value=value: value[at])
    return unflatten(params)


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh, rules) -> TrainState:
    """Shapes, dtypes and shardings of the whole state, without computing any of it."""
    shapes = jax.eval_shape(lambda: steps.new_state(task, optimizer, task.init_params(jax.random.key(0))))
    return sharding.with_shardings(mesh, shapes, rules)
