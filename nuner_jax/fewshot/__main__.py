"""Measures encoders by few-shot transfer: `python -m nuner_jax.fewshot --config=configs/fewshot.py:ENCODER,BASELINE`.

Started again with the same workdir, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from nuner_jax import command
from nuner_jax import config as config_lib
from nuner_jax.errors import run_command
from nuner_jax.fewshot.run import fewshot
from nuner_jax.writers import Console


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and measures."""
    config = command.read_config(argv, tasks=("fewshot",), example="configs/fewshot.py:ENCODER,BASELINE")
    workdir = command.workdir()
    command.keep_compiled(config.cache_dir)
    fewshot(config, workdir, Console(active=True), dry_run=flags.FLAGS.dry_run)


if __name__ == "__main__":
    command.define_flags()
    flags.DEFINE_bool("dry_run", False, "Check all, show prompts of language models and an estimate; ask nothing.")
    run_command(main, parse_flags=config_lib.parse_flags)
