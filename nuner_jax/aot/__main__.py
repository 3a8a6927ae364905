"""Compiles a config for hardware that is not here: `python -m nuner_jax.aot --config=… --topology=v5e:4x4`.

Prints what the train step needs on each device (memory, operations, bytes) and what devices send each other; what does
not fit is told with settings that would. With several topologies (`--topology=cpu:8,cpu:64`) the batch grows with the
devices, and the table shows which collectives do too. Nothing is trained, no weights are read, and with --shapes no
data either; the step is the one that `nuner_jax.train` runs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from absl import flags

from nuner_jax import command, train
from nuner_jax import workdir as workdir_lib
from nuner_jax.aot import compile as compile_lib
from nuner_jax.aot import sizing, topology
from nuner_jax.config import parse_flags
from nuner_jax.errors import NunerError, run_command
from nuner_jax.folders import local_path, writing


def main(argv: Sequence[str]) -> None:
    """Reads the flags, and compiles."""
    config = train.read_config(argv)
    given = flags.FLAGS
    if not given.topology:
        raise NunerError(f"--topology=NAME is needed. There are {topology.EXISTING}")
    stated = None if given.shapes is None else sizing.parse_shapes(given.shapes)
    limit = None if given.memory is None else given.memory * 1e9
    say = lambda line: print(line, flush=True)  # noqa: E731
    figures = compile_lib.compile_all(config, given.topology.split(","), stated, limit, say)
    if given.out:
        out = local_path(given.out)
        with writing(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            record = {"of": command.config_name(), **workdir_lib.circumstances(config), "topologies": figures}
            out.write_text(json.dumps(record, indent=2) + "\n")
        print(f"All figures: {out}")


if __name__ == "__main__":
    command.define_flags(workdir=False)
    flags.DEFINE_string("topology", None, "Hardware, such as v5e:4x4, v5p:2x2x2 or cpu:8; several, with commas.")
    flags.DEFINE_string(
        "shapes", None, "'assumed', or sizes of a batch (pairs_per_row=400,…), if the data is not there to tell them."
    )
    flags.DEFINE_float("memory", None, "Memory of one device in GB (1e9 bytes), if not that of the topology.")
    flags.DEFINE_string("out", None, "JSON file of all figures.")
    run_command(main, parse_flags)
