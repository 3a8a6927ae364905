"""Annotates large corpora: the stages select, align and build in Apache Beam, on this machine or on many.

python -m nuner_jax.annotate.beam --config=configs/annotate_openai.py:MODEL --workdir=DIR --stages=select
python -m nuner_jax.annotate.beam --config=… --workdir=DIR --stages=align,build -- --runner=FlinkRunner --flink_master=…

Between them, `python -m nuner_jax.annotate --stages=request` asks the language model, on one machine or on several.
The stages make the files that `nuner_jax.annotate` makes of the same input, so those of both can be mixed. What comes
after `--` are Beam's own flags; without any, Beam runs in this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from nuner_jax import config as config_lib
from nuner_jax.annotate import pipeline
from nuner_jax.annotate.beam import files
from nuner_jax.annotate.beam.align import align
from nuner_jax.annotate.beam.runner import is_dataflow, pipeline_options, runner, worker_errors
from nuner_jax.annotate.beam.select import select
from nuner_jax.annotate.workdir import ALIGNED_FILE, COUNTS_FILE, JOURNAL_FILE
from nuner_jax.errors import NunerError, run_command
from nuner_jax.folders import local_path, writing
from nuner_jax.writers import Console

STAGES = ("select", "align", "build")


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and runs the stages in their order."""
    given = flags.FLAGS
    config, stages = given.config, given.stages
    if config is None or not given.workdir or not stages:
        raise NunerError(f"--config=FILE, --workdir=DIR and --stages={','.join(STAGES)} (or some) are needed")
    config_lib.check(config, tasks=("annotate",))
    for stage in stages:
        if stage not in STAGES:
            other = "; python -m nuner_jax.annotate has it" if stage in ("request", "report") else ""
            raise NunerError(f"--stages: no stage {stage!r} in Beam; there are {', '.join(STAGES)}{other}")
    if given.shards > 1 and config.source.shard != "0/1":
        raise NunerError(f"--shards={given.shards} divides what config.source.shard = {config.source.shard} divides")
    options = pipeline_options(argv[1:])
    workdir = _usable(given.workdir, stages, options)
    run, console = runner(options), Console(active=True)
    with writing(Path(workdir)):
        if "select" in stages:
            select(config, workdir, run, console.say, shards=given.shards)
        if "align" in stages:
            journals = given.journals or [files.join(workdir, JOURNAL_FILE)]
            align(config, journals, workdir, run, console.say)
        if "build" in stages:
            with worker_errors():
                pipeline.build(config, Path(workdir), console.say, beam_options=options)


def _usable(workdir: str, stages: Sequence[str], options: Any) -> str:
    """The workdir as all use it; what the stages or the runner cannot do with it is told before any work."""
    if not files.is_remote(workdir):
        if is_dataflow(options):
            raise NunerError(f"--workdir={workdir}: Dataflow's workers do not see folders of this machine; give gs://…")
        return str(local_path(workdir))
    if "build" in stages:
        raise NunerError(
            f"--workdir={workdir}: shards cannot be written to a bucket; copy {COUNTS_FILE} and "
            f"{ALIGNED_FILE} to a folder that all workers see, and run --stages=build there"
        )
    files.exists(workdir)  # there may be no file system for it
    return workdir


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The config file, with its argument if any: x.py:arg.")
    flags.DEFINE_string("workdir", None, "Folder of the run, which all workers see; select and align: or gs://….")
    flags.DEFINE_list("stages", None, f"What to do, of {','.join(STAGES)}.")
    flags.DEFINE_integer("shards", 1, "Divide the selection for so many machines: WORKDIR/shard-I-of-N.", 1)
    flags.DEFINE_list("journals", None, "Journals to align, globs too (default: WORKDIR/journal.sqlite).")
    run_command(main, parse_flags=config_lib.parse_flags)
