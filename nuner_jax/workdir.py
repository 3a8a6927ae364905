"""The folder of a run: its config, its result, and the checks that it can be written."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

import nuner_jax
from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError

_CONFIG_FILE = "config.json"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets", "numpy")
"""Those whose release may change what a training run gives."""


def make(workdir: Path) -> None:
    """Makes the folder, and writes to it once.

    Raises:
      NunerError: it cannot be made or written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{jax.process_index()}"
        probe.write_text("written to see whether it can be\n")
        probe.unlink()
    except OSError as error:
        raise NunerError(f"--workdir={workdir} cannot be written: {error}") from error


def write_config(config: ConfigDict, workdir: Path, resumed: bool) -> list[str]:
    """Writes the resolved config, and returns what it changes where the run resumes under another one.

    The first process does both: the others might read what is half written.
    """
    if jax.process_index() > 0:
        return []
    path = workdir / _CONFIG_FILE
    changes = config_lib.difference(config, path) if resumed and path.exists() else []
    config_lib.save(config, path)
    return changes


def refuse_other_task(config: ConfigDict, workdir: Path) -> None:
    """Keeps a run from writing over one of another task; raises `NunerError` if there is one in the folder."""
    path = workdir / _CONFIG_FILE
    task = config_lib.read(path).get("task") if path.exists() else config.task
    if task != config.task:
        raise NunerError(f"--workdir={workdir} holds a run of the task {task!r}: choose another one")


def read_config(workdir: Path) -> ConfigDict:
    """The config that a run was trained with.

    Raises:
      NunerError: the folder has none.
    """
    path = workdir / _CONFIG_FILE
    if not path.exists():
        raise NunerError(f"{path} does not exist: is {workdir} the workdir of a run?")
    return config_lib.read(path)


def versions(libraries: Sequence[str]) -> dict[str, str]:
    """The versions of Python, of this project and of libraries; those that are not installed are left out."""
    found = {"python": platform.python_version(), "nuner_jax": nuner_jax.__version__}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def command() -> str:
    """The command line of this process, as a shell takes it; the interpreter without its folder."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def devices() -> str:
    """How many devices there are, and of what kind."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def circumstances(config: ConfigDict) -> dict[str, object]:
    """What else is needed to get a figure again, for JSON: command, config, devices and versions."""
    return {
        "command": command(),
        "config": json.loads(config.to_json_best_effort()),
        "devices": devices(),
        "versions": versions(LIBRARIES),
    }


def write_result(
    workdir: Path, config: ConfigDict, step: int, metrics: dict[str, float], info: dict, began: float
) -> Path:
    """Writes result.json: the best checkpoint's step and numbers, and all that is needed to get them again."""
    path = workdir / "result.json"
    result = {
        "step": step,
        "metrics": metrics,
        **circumstances(config),
        "seed": config.seed,
        "data_fingerprint": info["data"],
        "seconds_of_last_start": round(time.time() - began, 1),
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
