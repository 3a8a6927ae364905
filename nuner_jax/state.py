"""What training carries from step to step, and how its parameters divide into trained and frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from nuner_jax.models.params import flatten, unflatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes.

    step: int32 scalar, optimizer updates done so far; the next batch is the one of this index.
    params: nested dict of float32 arrays, trained and frozen alike.
    opt_state: of the trained parameters only.
    """

    step: jax.Array
    params: dict
    opt_state: object


def partition(params: dict, is_frozen: Callable[[str], bool]) -> tuple[dict[str, object], dict[str, object]]:
    """Divides a nested dict into (trained, frozen), each flat: "/"-joined path -> leaf."""
    paths = flatten(params)
    frozen = {path: leaf for path, leaf in paths.items() if is_frozen(path)}
    return {path: leaf for path, leaf in paths.items() if path not in frozen}, frozen


def combine(trained: dict[str, object], frozen: dict[str, object]) -> dict:
    """The nested dict that `partition` divided."""
    return unflatten(trained | frozen)
