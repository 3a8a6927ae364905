"""Annotates text with a language model: `python -m nuner_jax.annotate --config=configs/annotate_openai.py:MODEL`.

Started again with the same workdir, it goes on where it was; no answer that arrived is asked for again.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from nuner_jax import command
from nuner_jax import config as config_lib
from nuner_jax.annotate.pipeline import STAGES, annotate
from nuner_jax.errors import NunerError, run_command
from nuner_jax.writers import Console


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and annotates."""
    given = flags.FLAGS
    config = command.read_config(argv, tasks=("annotate",), example="configs/annotate_sample.py")
    for stage in given.stages:
        if stage not in STAGES:
            raise NunerError(f"--stages={','.join(given.stages)}: no stage {stage!r}; there are {', '.join(STAGES)}")
    annotate(
        config,
        command.workdir(),
        Console(active=True),
        stages=given.stages,
        dry_run=given.dry_run,
        pilot_only=given.pilot,
    )


if __name__ == "__main__":
    command.define_flags()
    flags.DEFINE_list("stages", list(STAGES), f"What to do, of {','.join(STAGES)}.")
    flags.DEFINE_bool("dry_run", False, "Select, show the first prompts, the plan and an estimate; ask nothing.")
    flags.DEFINE_bool("pilot", False, "Ask for config.request.pilot units, tell what all would cost, and stop.")
    run_command(main, parse_flags=config_lib.parse_flags)
