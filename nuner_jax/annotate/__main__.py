"""Annotates text with a language model: `python -m nuner_jax.annotate --config=configs/annotate_openai.py:MODEL`.

Started again with the same workdir, it goes on where it was; no answer that arrived is asked for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from nuner_jax import config as config_lib
from nuner_jax.annotate.pipeline import STAGES, annotate
from nuner_jax.errors import NunerError, run_command
from nuner_jax.folders import local_path
from nuner_jax.writers import Console


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and annotates."""
    if len(argv) > 1:
        raise NunerError(f"unexpected argument {argv[1]!r}: every option begins with --")
    given = flags.FLAGS
    config = given.config
    if config is None:
        raise NunerError("--config=FILE is needed, for example --config=configs/annotate_sample.py")
    config_lib.check(config, tasks=("annotate",))
    for stage in given.stages:
        if stage not in STAGES:
            raise NunerError(f"--stages={','.join(given.stages)}: no stage {stage!r}; there are {', '.join(STAGES)}")
    config_file = config_flags.get_config_filename(given["config"])
    workdir = local_path(given.workdir or f"runs/{Path(config_file.partition(':')[0]).stem}")
    annotate(
        config,
        workdir,
        Console(active=True),
        stages=given.stages,
        dry_run=given.dry_run,
        pilot_only=given.pilot,
    )


if __name__ == "__main__":
    # Defined here and not above: whoever imports this module may have flags of its own.
    config_flags.DEFINE_config_file("config", None, "The config file, with its argument if any: x.py:arg.")
    flags.DEFINE_string("workdir", None, "Folder of the run (default: runs/NAME_OF_THE_CONFIG).")
    flags.DEFINE_list("stages", list(STAGES), f"What to do, of {','.join(STAGES)}.")
    flags.DEFINE_bool("dry_run", False, "Select, show the first prompts, the plan and an estimate; ask nothing.")
    flags.DEFINE_bool("pilot", False, "Ask for config.request.pilot units, tell what all would cost, and stop.")
    run_command(main, parse_flags=config_lib.parse_flags)
