"""The folder of an annotation run, in which each stage leaves what the next ones read.

WORKDIR/
  config.json          the config, resolved
  selection/           select: units.jsonl.gz, selection.json
  journal.sqlite       request: every attempt, its answer and its cost
  aligned.jsonl.gz     align: records; rejected.jsonl.gz and align.json beside it
  shards/              build: the data set that pre-training reads
  report/              report: index.html, DATA_CARD.md, figures, concepts.csv
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nuner_jax.errors import NunerError

CONFIG_FILE = "config.json"
SELECTION_FOLDER = "selection"
UNITS_FILE = "units.jsonl.gz"  # this and the next one in SELECTION_FOLDER
SELECTION_FILE = "selection.json"
JOURNAL_FILE = "journal.sqlite"
ALIGNED_FILE = "aligned.jsonl.gz"
REJECTED_FILE = "rejected.jsonl.gz"
COUNTS_FILE = "align.json"
SHARDS_FOLDER = "shards"
REPORT_FOLDER = "report"


def of_stage(path: Path, stage: str) -> Path:
    """`path`, which `stage` makes; raises `NunerError` if it is not there."""
    if not path.exists():
        raise NunerError(f"{path} does not exist: run the stage {stage} first (--stages={stage},…)")
    return path


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """What the JSON file `path` holds, which `stage` makes; raises `NunerError` if it is missing or broken."""
    try:
        return json.loads(of_stage(path, stage).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NunerError(f"{path} cannot be read ({error}): run the stage {stage} again") from error
