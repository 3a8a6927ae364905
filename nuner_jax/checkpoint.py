"""Checkpoints: saved in the background, the best and the latest kept, restored onto any mesh. (Orbax lives here.)

A checkpoint folder WORKDIR/checkpoints/STEP holds `params` and `opt_state` apart, so that another run, an
export or an evaluation reads the parameters alone.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from nuner_jax.errors import NunerError
from nuner_jax.sharding import tree_paths
from nuner_jax.state import TrainState

_FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str, *, keep: int, best_metric: str, best_is_lower: bool):
        """Opens (or makes) WORKDIR/checkpoints.

        Args:
          workdir: of the run.
          keep: latest checkpoints kept.
          best_metric: the metric whose best checkpoint is kept too, among those saved with metrics.
          best_is_lower: whether a lower value is better.
        """
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics[best_metric],
            reverse=best_is_lower,  # Orbax keeps the end of the sorted list
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._best_metric, self._best_is_lower = best_metric, best_is_lower
        self._checkpointer = ocp.training.Checkpointer(
            epath.Path(workdir) / _FOLDER,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The step of the latest whole checkpoint."""
        return self._checkpointer.latest.step if self._checkpointer.latest else None

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint that was saved with metrics, else the latest."""
        return _best(self._checkpointer, self._best_metric, self._best_is_lower)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that a step was saved with."""
        return next((c.metrics or {} for c in self._checkpointer.checkpoints if c.step == step), {})

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return Path(self._checkpointer.directory) / str(step)

    def save(self, state: TrainState, metrics: dict[str, float], info: dict) -> None:
        """Starts saving in the background; returns once the arrays are copied off the devices.

        Raises:
          NunerError: this or the save before it could not be written (a full disk, say); what was saved
            before is whole.
        """
        step = int(state.step)
        if step == self.latest:
            return
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step,
                {"params": state.params, "opt_state": state.opt_state},
                force=True,
                metrics=metrics or None,
                custom_metadata=info | {"best_metric": self._best_metric, "best_is_lower": self._best_is_lower},
            )

    def wait(self) -> None:
        """Returns when all that was started is on disk; raises as `save` does."""
        with self._writing():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits and lets go of the folder; raises as `save` does."""
        with self._writing():
            self._checkpointer.close()

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest state, every leaf placed as `abstract` says, on whatever mesh it was saved.

        Raises:
          NunerError: naming every leaf that is missing, unexpected, or of another shape.
        """
        step = self.latest
        check_leaves(self.path(step), "params", abstract.params)
        check_leaves(self.path(step), "opt_state", abstract.opt_state)
        trees = {"params": abstract.params, "opt_state": abstract.opt_state}
        with _reading(self.path(step)):
            restored = self._checkpointer.load_checkpointables(step, trees)
        count = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return _donatable(TrainState(count, restored["params"], restored["opt_state"]))

    def _writing(self):
        return _storage_errors(f"cannot write a checkpoint to {self._checkpointer.directory}", self._kept)

    def _kept(self) -> str:
        steps = sorted(int(p.name) for p in Path(self._checkpointer.directory).iterdir() if p.name.isdigit())
        kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint was written before"
        return f"{kept}; free some space or choose another --workdir, and start the same command again to resume"


def resolve(path: str) -> Path:
    """The folder of one checkpoint: itself, or the best one of a workdir.

    Raises:
      NunerError: there is none.
    """
    folder = Path(path).expanduser().absolute()
    if (folder / "params").exists():
        return folder
    for parent in (folder / _FOLDER, folder):
        if parent.is_dir() and any(child.name.isdigit() for child in parent.iterdir()):
            with _reading(parent), ocp.training.Checkpointer(epath.Path(parent)) as checkpointer:
                info = read_info(parent / str(checkpointer.latest.step))
                return parent / str(_best(checkpointer, info.get("best_metric"), info.get("best_is_lower")))
    raise NunerError(f"{path}: no checkpoint there; give a workdir, or one of its {_FOLDER}/STEP folders")


def _best(checkpointer, metric: str | None, is_lower: bool) -> int | None:
    measured = [c for c in checkpointer.checkpoints if c.metrics and metric in c.metrics]
    if not measured:
        return checkpointer.latest.step if checkpointer.latest else None
    sign = 1 if is_lower else -1
    return min(measured, key=lambda c: sign * c.metrics[metric]).step


def read_info(folder: Path) -> dict:
    """What `save` was told about the model."""
    with _reading(folder):
        return ocp.checkpointables_metadata(folder).custom_metadata or {}


def load_params(folder: Path, abstract_params: dict | None = None, *, name: str = "params") -> dict:
    """The parameters of a checkpoint: placed as `abstract_params` says, else as they are on one device.

    Args:
      folder: WORKDIR/checkpoints/STEP.
      abstract_params: shapes, dtypes and shardings; None takes what is there.
      name: "params", or "opt_state" to look at the optimizer's memory.

    Raises:
      NunerError: naming every leaf that differs from `abstract_params`, or a checkpoint that cannot be read.
    """
    if abstract_params is None:
        with _reading(folder):
            tree = ocp.checkpointables_metadata(folder).metadata[name]
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract_params = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place), tree)
    else:
        check_leaves(folder, name, abstract_params)
    with _reading(folder):
        return _donatable(ocp.load_checkpointables(folder, {name: abstract_params})[name])


def check_leaves(folder: Path, name: str, abstract_tree) -> None:
    """Compares shapes leaf by leaf, since a mismatch inside Orbax does not name the leaf.

    Raises:
      NunerError: naming every leaf that is missing, unexpected, or of another shape.
    """
    with _reading(folder):
        saved = ocp.checkpointables_metadata(folder).metadata
    if name not in saved:
        raise NunerError(f"{folder} holds no {name}: it is not a checkpoint of this program's training")
    there, here = tree_paths(saved[name]), tree_paths(abstract_tree)
    shape = lambda leaf: tuple(getattr(leaf, "shape", ()))  # noqa: E731
    lines = [
        f"  {path}: in the model {shape(here[path])}, not in the checkpoint" for path in here.keys() - there.keys()
    ]
    lines += [
        f"  {path}: in the checkpoint {shape(there[path])}, not in the model" for path in there.keys() - here.keys()
    ]
    lines += [
        f"  {path}: {shape(there[path])} in the checkpoint, {shape(here[path])} in the model"
        for path in here.keys() & there.keys()
        if shape(there[path]) != shape(here[path])
    ]
    if lines:
        shown = "\n".join(sorted(lines)[:20]) + (f"\n  … and {len(lines) - 20} more" if len(lines) > 20 else "")
        raise NunerError(
            f"{folder} is a checkpoint of another model ({name}: {len(lines)} leaves differ):\n{shown}\n"
            "use the config that it was trained with, or another --workdir"
        )


def check_space(workdir: Path, state: TrainState, keep: int) -> None:
    """Compares the disk space that the checkpoints will take with what is free.

    Raises:
      NunerError: it does not suffice.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    needed, free = size * (keep + 2), shutil.disk_usage(workdir).free  # the best, and the one being written
    if free < needed:
        raise NunerError(
            f"{workdir}: {free / 1e9:.2f} GB are free, and {keep + 2} checkpoints of {size / 1e9:.2f} GB need "
            f"{needed / 1e9:.2f} GB; free some space, choose another --workdir, or lower config.checkpoint.keep"
        )


def _donatable(tree):
    """Copies into buffers that XLA owns: those that Orbax filled may not be donated to a step."""
    return jax.jit(
        lambda t: jax.tree.map(lambda x: x.copy(), t), out_shardings=jax.tree.map(lambda x: x.sharding, tree)
    )(tree)


def _reading(folder: Path):
    return _storage_errors(f"cannot read the checkpoint {folder}", lambda: "is it whole, and of this program?")


@contextlib.contextmanager
def _storage_errors(what: str, hint: Callable[[], str]):
    """Turns the many errors of storage into one that names the folder and says what to do."""
    try:
        yield
    except NunerError:
        raise
    except Exception as error:  # Orbax and TensorStore raise a dozen types, ValueError among them
        raise NunerError(f"{what}: {error}; {hint()}") from error
