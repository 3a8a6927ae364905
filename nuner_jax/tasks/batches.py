"""What tasks make of a loader's batches: the micro-batches of a step, and an evaluation's batches on the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from nuner_jax import sharding
from nuner_jax.data.loader import PackedLoader


def stacked(batch: Callable[[int], dict[str, np.ndarray]], step: int, accumulate: int) -> dict[str, np.ndarray]:
    """The micro-batches of a step as one batch.

    Args:
      batch: gives the micro-batch of a number, arrays [rows, ...].
      step: of training.
      accumulate: micro-batches of a step.

    Returns:
      Arrays [accumulate, rows, ...].
    """
    parts = [batch(step * accumulate + part) for part in range(accumulate)]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def on_devices(
    loader: PackedLoader,
    local_batch: Callable[[PackedLoader, Callable[[int], np.ndarray]], Callable[[int], dict[str, np.ndarray]]],
    rows: Mapping[str, int],
    mesh: Mesh,
    most: int | None,
) -> Iterator[dict[str, jax.Array]]:
    """The batches of an evaluation, one after another, as global arrays [1, rows, ...].

    Args:
      loader: of the split.
      local_batch: of the loader and of what tells a process its own rows of so many, makes what gives these rows of
        the batch of a number.
      rows: of the whole batch, for each of its arrays.
      mesh: over which they are split.
      most: batches at most; None or 0: all.
    """
    place = sharding.batch_sharding(mesh)
    batch = local_batch(loader, functools.partial(sharding.local_rows, place))
    for index in range(min(loader.num_batches, most or loader.num_batches)):
        yield sharding.to_global(place, {name: value[None] for name, value in batch(index).items()}, rows)
