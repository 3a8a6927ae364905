"""What the commands that take a config have in common: --config, --workdir, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError
from nuner_jax.folders import local_path

flags.disclaim_key_flags()  # --help tells of them as flags of the command


def define_flags(*, workdir: bool = True) -> None:
    """Defines --config, and --workdir for what keeps a run.

    Only the program itself may: who imports it may have flags of its own.
    """
    config_flags.DEFINE_config_file("config", None, "The config file, with its argument if any: x.py:arg.")
    if workdir:
        flags.DEFINE_string("workdir", None, "Folder of the run (default: runs/NAME_OF_THE_CONFIG).")


def read_config(argv: Sequence[str], *, tasks: Sequence[str], example: str) -> ConfigDict:
    """The config that the flags name, checked.

    Args:
      argv: what absl left of the command line: the program, and arguments that are no flags.
      tasks: those that the command can do.
      example: a value of --config, for who gave none.

    Raises:
      NunerError: an argument that is no flag, no config, one of another task, or a value that no run could use.
    """
    if len(argv) > 1:
        raise NunerError(f"unexpected argument {argv[1]!r}: every option begins with --")
    config = flags.FLAGS.config
    if config is None:
        raise NunerError(f"--config=FILE is needed, for example --config={example}")
    config_lib.check(config, tasks=tasks)
    return config


def config_name() -> str:
    """What --config names: a file, with its argument if it has one."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def config_stem() -> str:
    """The name of the config's file alone."""
    return Path(config_name().partition(":")[0]).stem


def workdir() -> Path:
    """The folder of the run: --workdir, or one named after the config."""
    return local_path(flags.FLAGS.workdir or f"runs/{config_stem()}")


def keep_compiled(cache_dir: str) -> None:
    """Makes a second start find its programs compiled, below `cache_dir`, unless the user keeps them elsewhere."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(local_path(cache_dir) / "compiled"))
