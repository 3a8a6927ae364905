"""Measures encoders by few-shot transfer: `python -m nuner_jax.fewshot --config=configs/fewshot.py:ENCODER,BASELINE`.

Started again with the same workdir, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError, run_command
from nuner_jax.fewshot.run import fewshot
from nuner_jax.folders import local_path
from nuner_jax.writers import Console


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and measures."""
    if len(argv) > 1:
        raise NunerError(f"unexpected argument {argv[1]!r}: every option begins with --")
    given = flags.FLAGS
    config = given.config
    if config is None:
        raise NunerError("--config=FILE is needed, for example --config=configs/fewshot.py:ENCODER,BASELINE")
    config_lib.check(config, tasks=("fewshot",))
    config_file = config_flags.get_config_filename(given["config"])
    workdir = local_path(given.workdir or f"runs/{Path(config_file.partition(':')[0]).stem}")
    if not jax.config.jax_compilation_cache_dir:  # a second start finds its programs compiled
        jax.config.update("jax_compilation_cache_dir", str(local_path(config.cache_dir) / "compiled"))
    fewshot(config, workdir, Console(active=True), dry_run=given.dry_run)


if __name__ == "__main__":
    # Defined here and not above: whoever imports this module may have flags of its own.
    config_flags.DEFINE_config_file("config", None, "The config file, with its argument if any: x.py:arg.")
    flags.DEFINE_string("workdir", None, "Folder of the run (default: runs/NAME_OF_THE_CONFIG).")
    flags.DEFINE_bool("dry_run", False, "Check all, show prompts of language models and an estimate; ask nothing.")
    run_command(main, parse_flags=config_lib.parse_flags)
