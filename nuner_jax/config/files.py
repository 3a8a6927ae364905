"""Config files: read, checked, compared and written."""

from __future__ import annotations

import json
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from nuner_jax.config import (
    annotate_schema,
    fewshot_schema,
    finetune_schema,
    pretrain_classes_schema,
    pretrain_schema,
)
from nuner_jax.config.values import check_values, leaves, nearest
from nuner_jax.errors import NunerError

SCHEMAS = {
    "pretrain": pretrain_schema,
    "pretrain_classes": pretrain_classes_schema,
    "annotate": annotate_schema,
    "finetune": finetune_schema,
    "fewshot": fewshot_schema,
}
"""The module of each schema, by the value of `config.task`."""


def parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """Parses absl flags; before that, looks whether the config file and the overrides of its keys are sound.

    Raises:
      NunerError: a config file that is missing or wrong, with its line; an unknown key, with the nearest one.
    """
    name = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            name = following if match[1] is None else match[1]
    if name:
        known = [key for key, _ in leaves(load_file(name))]
        for argument in argv:
            override = re.fullmatch(r"--?config\.([^=]+)(=.*)?", argument)
            if override and override[1] not in known:
                raise NunerError(f"--config.{override[1]}: no such key{nearest(override[1], known)}")
    return flags.FLAGS(list(argv))


def load_file(name: str) -> ConfigDict:
    """The config of "FILE" or "FILE:ARGUMENT".

    Raises:
      NunerError: whatever goes wrong in the file, with its line.
    """
    file, _, argument = name.partition(":")
    try:
        return runpy.run_path(file)["get_config"](*([argument] if argument else []))
    except FileNotFoundError as error:
        raise NunerError(f"--config={name}: {error.strerror}") from error
    except Exception as error:  # a config file is a program: anything can go wrong in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f"{file}, line {lines[-1]}" if lines else file
        unknown = re.search(r'Key "(\w+)" does not exist', str(error))
        reason = f"{type(error).__name__}: {error}"
        if unknown:
            reason = f"no such key {unknown[1]!r}{nearest(unknown[1], _all_keys())}"
        raise NunerError(f"--config={name}: {place}: {reason}") from error


def _all_keys() -> list[str]:
    """The keys of every kind of config."""
    return list(dict.fromkeys(key for task, schema in SCHEMAS.items() for key, _ in leaves(getattr(schema, task)())))


def check(config: ConfigDict, *, tasks: Sequence[str] = tuple(SCHEMAS)) -> None:
    """Refuses values that no run could use, by name, before any work.

    Args:
      config: a config of one of the schemas, told by its key `task`.
      tasks: those that the command at hand can do.

    Raises:
      NunerError: naming the key, its value and what it may be.
    """
    task = config.get("task")
    if task not in tasks:
        raise NunerError(f"config.task = {task!r}: this command takes a config of {' or '.join(tasks)}")
    schema = SCHEMAS[task]
    check_values(config, getattr(schema, task)(), schema)
    schema.check(config)


def save(config: ConfigDict, path: Path) -> None:
    """Writes the resolved config as JSON: wholly, or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
    os.replace(partial, path)


def read(path: Path) -> ConfigDict:
    """The config that `save` wrote.

    Raises:
      NunerError: there is none, or it cannot be read.
    """
    try:
        return ConfigDict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise NunerError(f"{path} cannot be read as a config: {error}") from error


def difference(config: ConfigDict, path: Path) -> list[str]:
    """What differs between this config and one that `save` wrote: lines "key: there -> here".

    Args:
      config: the config at hand.
      path: the saved one.
    """
    there = dict(leaves(read(path)))
    here = dict(leaves(ConfigDict(json.loads(config.to_json_best_effort()))))
    keys = [key for key in here | there if here.get(key) != there.get(key)]
    return [f"{key}: {there.get(key)!r} -> {here.get(key)!r}" for key in keys]
