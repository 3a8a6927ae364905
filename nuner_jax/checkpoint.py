"""Checkpoints: saved in the background, the best and the latest kept, restored onto any mesh. (Orbax lives here.)

A checkpoint folder WORKDIR/checkpoints/STEP holds `params` and `opt_state` apart, so that another run, an
export or an evaluation reads the parameters alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from nuner_jax.errors import NunerError
from nuner_jax.folders import check_free, local_path, told_size
from nuner_jax.sharding import tree_paths
from nuner_jax.state import TrainState

_FOLDER = "checkpoints"
_REASON_CHARACTERS = 300


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: Path, *, keep: int, best_metric: str, best_is_lower: bool):
        """Opens (or makes) WORKDIR/checkpoints.

        Args:
          workdir: of the run.
          keep: latest checkpoints kept.
          best_metric: the metric whose best checkpoint is kept too, among those saved with metrics.
          best_is_lower: whether a lower value is better.
        """
        policies = ocp.training.preservation_policies
        self._best_metric, self._best_is_lower = best_metric, best_is_lower
        with _opening(workdir / _FOLDER):
            self._checkpointer = ocp.training.Checkpointer(
                epath.Path(workdir) / _FOLDER,
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the loop decides
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), _KeepBest(best_metric, best_is_lower)]
                ),
                cleanup_tmp_directories=True,
            )

    @property
    def latest(self) -> int | None:
        """The step of the latest whole checkpoint."""
        return self._checkpointer.latest.step if self._checkpointer.latest else None

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint that was saved with metrics, else the latest."""
        return _best(self._checkpointer.checkpoints, self._best_metric, self._best_is_lower)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that a step was saved with."""
        return next((c.metrics or {} for c in self._checkpointer.checkpoints if c.step == step), {})

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return Path(self._checkpointer.directory) / str(step)

    def save(self, state: TrainState, metrics: dict[str, float], info: dict) -> None:
        """Starts saving in the background; returns once the arrays are copied off the devices.

        A step that was saved before, without metrics, gets these; with metrics, it stays as it is.

        Raises:
          NunerError: this or the save before it could not be written (a full disk, say); what was saved
            before is whole.
        """
        step = int(state.step)
        if step == self.latest:
            if metrics and not self.metrics(step):
                self._add_metrics(step, metrics)
            return
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step,
                {"params": state.params, "opt_state": state.opt_state},
                force=True,
                metrics=metrics or None,
                custom_metadata=info | {"best_metric": self._best_metric, "best_is_lower": self._best_is_lower},
            )

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Puts metrics where Orbax reads those of a step; it would delete the step to save it anew."""
        self.wait()
        with self._writing():
            if jax.process_index() == 0:
                folder = self.path(step) / "metrics"
                folder.mkdir(exist_ok=True)
                partial = folder / "metrics.partial"
                partial.write_text(json.dumps(metrics))
                partial.replace(folder / "metrics")
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"metrics of step {step}")
            self._checkpointer.reload()

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
        way_on = functools.partial(_resume_without, self.path(step))
        another = "use the config that it was trained with, or another --workdir"
        check_leaves(self.path(step), "params", abstract.params, another, way_on)
        check_leaves(self.path(step), "opt_state", abstract.opt_state, another, way_on)
        trees = {"params": abstract.params, "opt_state": abstract.opt_state}
        with _reading(self.path(step), way_on):
            restored = self._checkpointer.load_checkpointables(step, trees)
        count = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return _donatable(TrainState(count, restored["params"], restored["opt_state"]))

    def _writing(self):
        return _storage_errors(f"cannot write a checkpoint to {self._checkpointer.directory}", self._kept)

    def _kept(self) -> str:
        steps = _steps(Path(self._checkpointer.directory))
        kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint was written before"
        return f"{kept}; free some space or choose another --workdir, and start the same command again to resume"


def resolve(path: str) -> Path:
    """The folder of one checkpoint: itself, or the best one of a workdir.

    Raises:
      NunerError: there is none.
    """
    folder = local_path(path)
    if (folder / "params").exists():
        return folder
    for parent in (folder / _FOLDER, folder):
        if _steps(parent):
            with _opening(parent), ocp.training.Checkpointer(epath.Path(parent)) as checkpointer:
                info = read_info(parent / str(checkpointer.latest.step))
                best = _best(checkpointer.checkpoints, info.get("best_metric"), info.get("best_is_lower"))
                return parent / str(best)
    raise NunerError(f"{path}: no checkpoint there; give a workdir, or one of its {_FOLDER}/STEP folders")


@dataclasses.dataclass(frozen=True)
class _KeepBest:
    """Keeps the best checkpoint: of equally good ones the earliest, so that a plateau does not move it."""

    metric: str
    is_lower: bool

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """As Orbax asks: whether to keep each of these."""
        best = _best(checkpoints, self.metric, self.is_lower)
        return [c.step == best and bool(c.metrics) for c in checkpoints]


def _best(checkpoints, metric: str | None, is_lower: bool) -> int | None:
    """The step of the best of those that have the metric, the earliest of equals; without any, the latest.

    Step 0 does not compete: it is saved only where a run is interrupted there, which must not change the choice.
    """
    measured = [c for c in checkpoints if c.step and c.metrics and metric in c.metrics]
    if not measured:
        return max((c.step for c in checkpoints), default=None)
    sign = 1 if is_lower else -1
    return min(measured, key=lambda c: (sign * c.metrics[metric], c.step)).step


def read_info(folder: Path) -> dict:
    """What `save` was told about the model.

    Raises:
      NunerError: it cannot be read.
    """
    with _reading(folder):
        info = ocp.checkpointables_metadata(folder).custom_metadata
        if not info:  # Orbax passes over a file that it cannot read
            raise ValueError("it does not tell what model it holds (_CHECKPOINT_METADATA)")
        return info


def load_params(
    folder: Path, abstract_params: dict | None = None, *, name: str = "params", donatable: bool = False
) -> dict:
    """The parameters of a checkpoint: placed as `abstract_params` says, else as they are on one device.

    With `abstract_params` all processes of a run read together; without, this one reads alone.

    Args:
      folder: WORKDIR/checkpoints/STEP.
      abstract_params: shapes, dtypes and shardings; None takes what is there.
      name: "params", or "opt_state" to look at the optimizer's memory.
      donatable: whether a jitted function may be given the result as a donated argument: a copy, which takes the
        memory twice for a moment.

    Raises:
      NunerError: naming every leaf that differs from `abstract_params`, or a checkpoint that cannot be read.
    """
    if abstract_params is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place), _saved_tree(folder, name))
        with _reading(folder), _alone():
            params = ocp.load_checkpointables(folder, {name: tree})[name]
    else:
        way_on = "make config.model that of the checkpoint, or config.checkpoint.init_from a run of this model"
        check_leaves(folder, name, abstract_params, way_on)
        with _reading(folder):
            params = ocp.load_checkpointables(folder, {name: abstract_params})[name]
    return _donatable(params) if donatable else params


def check_leaves(
    folder: Path, name: str, abstract_tree, way_on: str, way_on_if_damaged: Callable[[], str] | None = None
) -> None:
    """Compares shapes leaf by leaf, since a mismatch inside Orbax does not name the leaf.

    Args:
      folder: WORKDIR/checkpoints/STEP.
      name: "params" or "opt_state".
      abstract_tree: the shapes that are wanted.
      way_on: what to do about another model; ends the error.
      way_on_if_damaged: what to do about a checkpoint that cannot be read.

    Raises:
      NunerError: naming every leaf that is missing, unexpected, or of another shape.
    """
    there, here = tree_paths(_saved_tree(folder, name, way_on_if_damaged)), tree_paths(abstract_tree)
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
            f"{folder} is a checkpoint of another model ({name}: {len(lines)} leaves differ):\n{shown}\n{way_on}"
        )


def _saved_tree(folder: Path, name: str, way_on: Callable[[], str] | None = None):
    """The shapes and dtypes that a checkpoint holds under a name."""
    with _reading(folder, way_on):
        tree = ocp.checkpointables_metadata(folder).metadata.get(name)
        if tree is None and (folder / name).is_dir():  # Orbax logs what it cannot read, and goes on
            raise ValueError(f"the sizes of its {name} cannot be read")
    if tree is None:
        raise NunerError(f"{folder} holds no {name}: it is not a checkpoint of this program's training")
    return tree


def _alone() -> ocp.Context:
    """Reading by this process only; Orbax would else wait for all the others to do the same."""
    me, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    context.multiprocessing.barrier_sync_key_prefix = f"process_{me}_alone"
    return context


def check_space(workdir: Path, state: TrainState, keep: int) -> None:
    """Compares the disk space that the checkpoints will take, beside those already there, with what is free.

    Raises:
      NunerError: it does not suffice.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    folder = workdir / _FOLDER
    held = len(_steps(folder))
    # Beside the latest: the best, and the one being written, for which an old one makes way only when it is whole.
    more = max(1, keep + 2 - held)
    # Orbax deletes what an interrupted save left behind.
    unfinished = [child for child in folder.iterdir() if not child.name.isdigit()] if folder.is_dir() else []
    what = f"{more} {'more ' if held else ''}checkpoint{'s' * (more > 1)} of {told_size(size)}"
    way_on = "choose another --workdir, or lower config.checkpoint.keep"
    check_free(workdir, more * size, what, way_on, making_way=sum(map(_bytes_in, unfinished)))


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process may be deleting it
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _steps(folder: Path) -> list[int]:
    """The steps that a folder has whole checkpoints of, ascending: Orbax renames them when they are."""
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else []


def _donatable(tree):
    """Copies into buffers that XLA owns: those that Orbax filled may not be donated to a step."""
    return jax.jit(
        lambda t: jax.tree.map(lambda x: x.copy(), t), out_shardings=jax.tree.map(lambda x: x.sharding, tree)
    )(tree)


def _opening(folder: Path):
    way_on = "if the metrics/metrics of a step in it are damaged, delete that step"
    return _storage_errors(f"cannot open the checkpoints {folder}", lambda: way_on)


def _reading(folder: Path, way_on: Callable[[], str] | None = None):
    return _storage_errors(f"cannot read the checkpoint {folder}", way_on or functools.partial(_another, folder))


def _resume_without(damaged: Path) -> str:
    older = [step for step in _steps(damaged.parent) if step < int(damaged.name)]
    return f"delete {damaged} to " + (f"resume from step {older[-1]}" if older else "start afresh")


def _another(damaged: Path) -> str:
    others = [str(step) for step in _steps(damaged.parent) if str(step) != damaged.name]
    if not others:
        return "is it whole, and of this program?"
    return f"is it whole? another one can be given: {damaged.parent}/{' or '.join(others)}"


@contextlib.contextmanager
def _storage_errors(what: str, way_on: Callable[[], str]):
    """Turns the many errors of storage into one that names the folder and says what to do."""
    try:
        yield
    except NunerError:
        raise
    except Exception as error:  # Orbax and TensorStore raise a dozen types, ValueError among them
        raise NunerError(f"{what}: {_reason(error)}; {way_on()}") from error


def _reason(error: BaseException) -> str:
    """What an error began with, in a line: Orbax wraps it in pages about its registry of handlers."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        if not isinstance(cause, Exception) or isinstance(cause, StopIteration):  # of Python's own json module
            break
        error = cause
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= _REASON_CHARACTERS else line[:_REASON_CHARACTERS] + "…"
