"""Builds a data set of records from annotated files, and prints what became of every row.

python -m nuner_jax.data.build --input=pile.jsonl.gz --out=data/pile
python -m nuner_jax.data.build --input=hf:numind/NuNER:full --out=data/nuner
python -m nuner_jax.data.build --input=sample --input=more.parquet --out=data/mix
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from nuner_jax.data.builder import REPORT_FILE, BuildOptions, build_inputs, read_report
from nuner_jax.data.importers import FORMATS, report_table
from nuner_jax.errors import NunerError, run_command

DEFAULTS = BuildOptions()

INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "A file, hf:org/data_set[@revision][:part], or 'sample'. May be given many times.",
)
OUT = flags.DEFINE_string("out", None, "The folder to build.")
FORMAT = flags.DEFINE_string("format", DEFAULTS.format, f"auto, or the format of all inputs: {', '.join(FORMATS)}.")
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", DEFAULTS.validation_fraction, "Share of texts, by hash; 0 for none."
)
DROP_CONCEPT = flags.DEFINE_string(
    "drop_concept", DEFAULTS.drop_concept, "Drop rows annotated with it, as the paper; '' for none."
)
LOWER_CONCEPTS = flags.DEFINE_bool("lower_concepts", DEFAULTS.lower_concepts, "Make 'Person' and 'person' one concept.")
KEEP_UNLABELLED = flags.DEFINE_bool("keep_unlabelled", DEFAULTS.keep_unlabelled, "Keep rows without any entity.")
MAX_MALFORMED = flags.DEFINE_float(
    "max_malformed",
    DEFAULTS.max_malformed,
    "Share of malformed rows beyond which nothing is built.",
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the data set that --out holds.")


def main(argv: Sequence[str]) -> None:
    """Builds what the flags say, then prints the report and the next command."""
    if len(argv) > 1:
        raise NunerError(f"unexpected argument {argv[1]!r}; inputs are given as --input=FILE")
    if not INPUT.value or not OUT.value:
        raise NunerError("--input=FILE and --out=DIR are needed; see --helpshort")
    start = time.monotonic()
    built = build_inputs(INPUT.value, OUT.value, _options(), overwrite=OVERWRITE.value)
    seconds = time.monotonic() - start
    print(_summary(OUT.value, read_report(OUT.value), built, seconds))


def _options() -> BuildOptions:
    return BuildOptions(
        format=FORMAT.value,
        drop_concept=DROP_CONCEPT.value,
        lower_concepts=LOWER_CONCEPTS.value,
        keep_unlabelled=KEEP_UNLABELLED.value,
        max_malformed=MAX_MALFORMED.value,
        validation_fraction=VALIDATION_FRACTION.value,
    )


def _summary(out: str, stored: dict[str, Any], built: bool, seconds: float) -> str:
    state = f"built in {seconds:.1f} s" if built else "up to date, nothing was written"
    sizes = ", ".join(f"{split} {size:,}" for split, size in stored["splits"].items())
    return "\n".join(
        [
            "",
            report_table(stored["report"]) if stored["report"] else "(built without an import report)",
            "",
            f"data set     {out}: {state}",
            f"splits       {sizes}",
            f"fingerprint  {stored['fingerprint']}",
            f"report       {Path(out) / REPORT_FILE}",
            "",
            "next: pre-train on it",
            "  python -m nuner_jax.train --config=configs/quickstart.py"
            f" --config.data.sources.sample.path={out} --workdir=runs/{Path(out).name}",
        ]
    )


if __name__ == "__main__":
    run_command(main)
