"""Between a Flax NNX module and a plain nested dict of arrays, and from a dict to named paths.

Everything outside a module's own code (optimizer, checkpoints, shardings, import and export) sees
parameters as a nested dict with str keys, or as `{"layers/0/mlp/up/kernel": leaf}`; nothing else
needs to know NNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx, traverse_util

Params = dict[str, Any]
"""Nested dict with str keys; leaves are arrays or what stands for one (shape, sharding, mask)."""


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Takes a module apart: its structure (static, hashable) and its parameters.

    Works on real, traced and abstract modules, so it may be called inside `jax.jit` and
    `jax.eval_shape`, and on what `nnx.eval_shape` returns. Raises ValueError if the module holds
    any state besides `nnx.Param`.
    """
    graphdef, state = nnx.split(module, nnx.Param)
    return graphdef, _with_str_keys(nnx.to_pure_dict(state))


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> nnx.Module:
    """Puts a module together again: the inverse of `split`, also inside `jax.jit`, `jax.grad`."""
    return nnx.merge(graphdef, _with_layer_numbers(params))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Names every leaf by its path: {"layers": {"0": {"bias": x}}} -> {"layers/0/bias": x}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`: {"layers/0/bias": x} -> {"layers": {"0": {"bias": x}}}."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def _with_str_keys(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _with_str_keys(value) for key, value in tree.items()}


def _with_layer_numbers(tree: Any) -> Any:
    # NNX matches leaves to the module by sorted key, and "10" sorts before "2": the numbers of an
    # `nnx.List` must be numbers again, or the layers of a model with more than ten change places.
    if not isinstance(tree, Mapping):
        return tree
    return {int(key) if key.isdecimal() else key: _with_layer_numbers(value) for key, value in tree.items()}
