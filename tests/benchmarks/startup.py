"""What a run does before its first step, and for how long: from cold, and started again with what is on disk by then.

    python tests/benchmarks/startup.py [--runs=3] [--config=configs/quickstart.py] [--config.KEY=VALUE ...]

Each run is a process, `python -m nuner_jax.train --config.steps=2`, in a workdir of its own; the first one of a pair
has an empty `config.data.cache_dir`, the second one what the first left there. The lines of the training log tell the
phases apart, by the clock at which they come out; the evaluation before the first step is left out, as no training
waits for it. Prints the medians over --runs pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from processes import ROOT

PHASES = {  # what begins the line that ends each
    "interpreter, imports, flags": "devices:",
    "data: read or built, tokenised, packed": "packing:",
    "parameters: drawn or read, placed": "initialisation:",
    "compiling": "memory of a device:",
    "evaluation (left out)": "step 0:",
    "first step": "step 1",
}


def main() -> None:
    """Runs the pairs, and prints where the time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--config", default="configs/quickstart.py")
    options, flags = parser.parse_known_args()
    cold, warm = [], []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for number, runs in enumerate((cold, warm)):
                where = [f"--config.data.cache_dir={folder}/cache", f"--workdir={folder}/{number}"]
                runs.append(phases([f"--config={options.config}", *flags, *where]))
    print("| seconds | first start | second |\n|---|---|---|")
    for phase in cold[0]:
        print(
            f"| {phase} | "
            + " | ".join(f"{statistics.median(run[phase] for run in runs):.1f}" for runs in (cold, warm))
            + " |"
        )


def phases(flags: list[str]) -> dict[str, float]:
    """The seconds that each phase of one run took, and of all that count."""
    log = [f"--config.{key}" for key in ("steps=2", "log_every=1", "plot=False", "export=False")]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "nuner_jax.train", *flags, *log, "--config.transfer.sets=()"],
        cwd=ROOT,
        env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    began, taken, waiting, lines = time.perf_counter(), {}, dict(PHASES), []
    for line in process.stdout:
        lines.append(line)
        phase = next(iter(waiting), None)
        if phase and line.startswith(waiting[phase]):
            now = time.perf_counter()
            taken[phase], began = now - began, now
            del waiting[phase]
    if process.wait() or waiting:
        sys.exit(f"the run ended with {process.returncode}, before: {', '.join(waiting)}\n{''.join(lines)[-4000:]}")
    taken.pop("evaluation (left out)")
    return taken | {"all": sum(taken.values())}


if __name__ == "__main__":
    main()
