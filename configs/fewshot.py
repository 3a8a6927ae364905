"""Few-shot transfer of a frozen encoder beside a baseline: on the two embedded sets, or on all sets of a folder.

    python -m nuner_jax.fewshot --config=configs/fewshot.py:ENCODER,BASELINE
    python -m nuner_jax.fewshot --config=configs/fewshot.py:ENCODER,BASELINE,FOLDER

ENCODER and BASELINE are Hugging Face folders, hub names, or workdirs of pre-training (WORKDIR@start is what a run
started from); the baseline may be empty, or left out with the folder. Each folder in FOLDER is a data set with a train
and a test file, CoNLL or JSONL. One set more, or one known by name: `config.sets.conll2003 = {}` in a copy of this
file.

Cost: half a minute on two CPU cores for the embedded sets and encoders of MiniLM's size; 10 minutes for eight sets of a
folder (640 heads). Expect: tests/benchmarks/README.md has the tables.
"""

from pathlib import Path

from nuner_jax.config import fewshot
from nuner_jax.errors import NunerError


def get_config(encoders):
    encoder, _, others = encoders.partition(",")
    baseline, _, folder = others.partition(",")
    config = fewshot()
    config.encoders = {"encoder": encoder}
    if baseline:
        config.encoders = {"encoder": encoder, "baseline": baseline}
        config.baseline = "baseline"
    if folder:
        config.sets = _sets_in(Path(folder).expanduser())
        config.k = (1, 4, 16, 64)  # mentions of each type
        config.seeds = 10
    else:
        config.sets = {"travel_desk": {}, "lab_notes": {}}
        config.k = (4, 16)
        config.seeds = 5  # the fewest that have an interval
    return config


def _sets_in(folder):
    if not folder.is_dir():
        raise NunerError(f"there is no folder {folder}")
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {path.name: {"path": str(path)} for path in folders}
    if not found:
        raise NunerError(f"{folder} holds no folder; each data set is one, with its files")
    return found
