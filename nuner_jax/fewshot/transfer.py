"""The table that closes pre-training: few-shot transfer of the best checkpoint, beside what the run started from."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from nuner_jax import text_encoder
from nuner_jax.config import fewshot as fewshot_config
from nuner_jax.data.ner import datasets
from nuner_jax.data.ner.named_sets import NAMED
from nuner_jax.errors import NunerError
from nuner_jax.fewshot.results import Results
from nuner_jax.fewshot.run import fewshot
from nuner_jax.writers import Console


def sets(config: ConfigDict) -> tuple[str, ...]:
    """The names of the data sets that a training config asks for; none where its task has no such table."""
    return tuple(config.transfer.sets) if "transfer" in config else ()


def check(config: ConfigDict) -> None:
    """Reads those data sets, so that what is wrong with one is known before training.

    Raises:
      NunerError: naming the key and the set.
    """
    for name in sets(config):
        if name not in NAMED:
            known = ", ".join(NAMED)
            raise NunerError(f"config.transfer.sets: no set is known by the name {name!r}; known are: {known}")
        try:
            datasets.load({"name": name})
        except NunerError as error:
            raise NunerError(f"config.transfer.sets: {error}") from error


def measure(config: ConfigDict, workdir: Path, best: Path, console: Console) -> Results:
    """Prints the table, and writes it with all that belongs to it to WORKDIR/fewshot/STEP.

    What is there already is not computed again. This process works alone, on its own devices.

    Args:
      config: of a training run that has ended.
      workdir: of the run.
      best: the folder of its best checkpoint.
      console: for progress and the table.
    """
    table = fewshot_config()
    table.encoders = {"before": f"{workdir}{text_encoder.START}", "after": str(best)}
    table.baseline = "before"
    table.sets = {name: {} for name in sets(config)}
    table.k, table.seeds = config.transfer.k, config.transfer.seeds
    table.dtype = config.model.dtype
    # Another checkpoint's results are others: a run that goes on, and gets better, has a table for each.
    return fewshot(table, workdir / "fewshot" / best.name, console)
