"""What the training loop asks of a task; pre-training and fine-tuning differ in it and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from nuner_jax.performance.costs import Part

Evaluator = Callable[[dict], Iterable[tuple[str, float]]]
"""Takes the parameters (global arrays), yields (metric name, value)."""


class Task(Protocol):
    """A model, its loss, its data and its evaluation."""

    steps_per_epoch: float
    """Optimizer updates that visit the training data once."""

    best_metric: str
    """The evaluation metric by which the best checkpoint is chosen."""

    best_is_lower: bool
    """Whether a lower `best_metric` is better."""

    counts: tuple[str, ...]
    """Those of `metrics` that are amounts of a step, to be shown as rates; the first one in the progress line."""

    batch_rows: dict[str, int]
    """Rows of the whole batch, for each of its arrays."""

    patience: int | None = None
    """Steps after the best checkpoint at which training ends early, if none is better; None: it never does."""

    def init_params(self, key: jax.Array) -> dict:
        """Random parameters (nested dict of float32 arrays); traced under `jit` and `eval_shape`."""

    def pretrained_params(self, abstract_params: dict) -> dict:
        """Host arrays of the part of the parameters that pretrained weights replace: a nested dict."""

    def begin(self, params: dict, say: Callable[[str], None]) -> None:
        """Whatever of the state's parameters is to be made ready for `train_batch`, before the first step."""

    def is_frozen(self, path: str) -> bool:
        """Whether the parameter of this "/"-joined path is left as it is."""

    def learning_rate_share(self, path: str) -> float:
        """The share of the learning rate that the parameter of this "/"-joined path has."""
        return 1.0

    def vectors(self, params: dict, batch: dict, dropout_key: jax.Array | None):
        """What the encoders make of one micro-batch, before any head or loss: arrays."""

    def sums(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        """Sums over one micro-batch: `loss` (differentiated), `weight` (its divisor) and whatever `metrics` needs."""

    def metrics(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums, added over micro-batches or batches, to metrics; `loss` is among them. Traced and on the host."""

    def train_batch(self, step: int, local_rows: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
        """The batch of this step, arrays [A, rows, ...]: this process's rows of each."""

    def costs(self, batch: dict[str, np.ndarray] | None = None) -> dict[str, Part]:
        """What each part of a step costs, the optimizer left out.

        Args:
          batch: all rows of a step's batch: what its tokens and concepts need; None: what is computed, padding and all.
        """

    def evaluators(self) -> dict[str, Evaluator]:
        """The evaluations to run while training, by name."""

    def final_evaluators(self) -> dict[str, Evaluator]:
        """Those to run once, on the best checkpoint, when training has ended: nothing is chosen by them."""
        return {}

    def describe(self) -> Iterable[str]:
        """Lines for the log that tell what data and model this is."""

    def save_assets(self, workdir: Path) -> None:
        """Writes what a model needs beside its parameters (the tokenizer) to the workdir."""

    def export_info(self) -> dict:
        """What a checkpoint stores so that the model can be rebuilt from it: JSON, with `data`, a fingerprint."""

    def closing_lines(self, metrics: dict[str, float], workdir: Path) -> Iterable[str]:
        """The last lines of a finished run: what its numbers mean, and what to do next."""
