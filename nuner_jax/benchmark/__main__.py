"""Measures a config: `python -m nuner_jax.benchmark --config=configs/quickstart.py`.

Prints what a step must compute and move, the least time in which this machine's devices can do so, the time that the
real train step takes on the config's own data, and where the rest of it goes; the same figures go to a JSON file.
Nothing is trained that is kept: the run's folder is a temporary one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from nuner_jax import command, train
from nuner_jax import workdir as workdir_lib
from nuner_jax.benchmark import measure, table
from nuner_jax.config import parse_flags
from nuner_jax.distributed import cluster
from nuner_jax.errors import NunerError, run_command
from nuner_jax.folders import local_path, writing
from nuner_jax.writers import Console


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and measures."""
    config = train.read_config(argv)
    steps, warmup = flags.FLAGS.steps, flags.FLAGS.warmup
    if steps < 3 or warmup < 1:
        raise NunerError(f"--steps={steps} --warmup={warmup}: at least 3 steps are timed, after 1 or more")
    out = local_path(flags.FLAGS.out or f"runs/benchmark_{command.config_stem()}.json")
    cache = Path(config.data.cache_dir).expanduser()
    with writing(out.parent), writing(cache):
        out.parent.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        train.join(config)
        console = Console(jax.process_index() == 0)
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=cache) as folder:
            run = train.prepare(config, Path(folder), console)
            figures = measure.measure(run, steps=steps, warmup=warmup, profile=flags.FLAGS.profile, say=console.say)
            run.checkpoints.close()
        figures = {"of": command.config_name(), **figures, **workdir_lib.circumstances(config)}
        for line in table.lines(figures):
            console.say(line)
        if console.active:
            out.write_text(json.dumps(figures, indent=2) + "\n")
            console.say(f"All figures: {out}")


if __name__ == "__main__":
    command.define_flags(workdir=False)
    cluster.define_flags()
    flags.DEFINE_integer("steps", 20, "Steps that are timed: so many with batches on the device, and with the loader.")
    flags.DEFINE_integer("warmup", 3, "Steps before them, the one that compiles not counted.")
    flags.DEFINE_string("out", None, "JSON file for all figures (default: runs/benchmark_CONFIG.json).")
    flags.DEFINE_string("profile", None, "Folder for a trace of three steps, which TensorBoard and xprof read.")
    run_command(main, parse_flags)
