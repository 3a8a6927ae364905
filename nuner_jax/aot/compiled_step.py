"""The figures of a train step that is compiled and not run: memory, operations, bytes, collectives."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax.aot import sizing
from nuner_jax.models.params import flatten
from nuner_jax.performance import costs, hlo
from nuner_jax.program import make_program
from nuner_jax.state import TrainState
from nuner_jax.tasks.protocol import Task

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def figures(config: ConfigDict, task: Task, mesh: Mesh, limit: float | None) -> dict:
    """Compiles the train step, and reads what it tells.

    Args:
      config: the resolved config.
      task: of the config.
      mesh: of devices that need not be here.
      limit: bytes of memory of one device, if known.

    Returns:
      JSON: `devices`, `mesh`, `batch` (its shapes); `memory` (bytes on one device; where the compiler refused for lack
      of it, what it said is `refused`); `operations` (`model`, of the whole step as `performance.costs` counts them, in
      all and by part; `compiled`, of one device as XLA counts them, a loop's body once); `bytes_accessed` of one
      device, counted likewise; `collectives`, one entry for each kind and what it carries.
    """
    program = make_program(config, task, mesh)
    batch = task.abstract_batch() if isinstance(task, sizing.Sized) else sizing.batch_shapes(task, mesh)
    parts = task.costs()
    found = {
        "devices": {"number": mesh.devices.size, "kind": mesh.devices.flat[0].device_kind},
        "mesh": dict(mesh.shape),
        "batch": {name: list(leaf.shape) for name, leaf in batch.items()},
        "operations": {
            "model": costs.total(parts.values()).operations,
            "parts": {name: part.both.operations for name, part in parts.items()},
        },
    }
    compiled, memory = compile_step(program.train_step, program.abstract, batch, limit)
    if compiled is None:
        return found | {"memory": memory, "collectives": []}
    counted = compiled.cost_analysis()
    found["operations"]["compiled"] = counted["flops"]
    return found | {
        "memory": memory,
        "bytes_accessed": counted["bytes accessed"],
        "collectives": summary(hlo.collectives(compiled.as_text()), program.abstract.params),
    }


def compile_step(
    train_step: Callable, state: TrainState, batch: Mapping, limit: float | None
) -> tuple[jax.stages.Compiled | None, dict]:
    """Compiles a step for what it is to be given, and tells what it needs of a device's memory.

    Args:
      train_step: jitted; called with the like, it makes use of what was compiled here.
      state, batch: arrays, or their shapes and places.
      limit: bytes of memory of one device, if known.

    Returns:
      The compiled step, or None where the compiler refused for lack of memory; and the `memory` of `figures`.
    """
    held = {
        "parameters": _shard_bytes(jax.tree.leaves(state.params)),
        "optimizer": _shard_bytes(jax.tree.leaves(state.opt_state)),
        "batch": _shard_bytes(batch.values()),
    }
    try:
        compiled = train_step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, _refused(held, str(error), limit)
    return compiled, _memory(held, compiled.memory_analysis(), limit)


def _shard_bytes(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _memory(held: dict[str, int], stats, limit: float | None) -> dict:
    """Bytes on one device while the step runs; the state is donated, so that its new values need no more room."""
    peak = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return {
        **held,
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "donated": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
        "peak": peak,
        "limit": limit,
        "fits": limit is None or peak <= limit,
    }


def _refused(held: dict[str, int], said: str, limit: float | None) -> dict:
    """What is known where the compiler found no room: its own account of what is needed."""
    match = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)", said)
    peak = float(match[1]) * _UNITS[match[2]] if match else None
    limit = float(match[3]) * _UNITS[match[4]] if match else limit
    temporaries = None if peak is None else max(0.0, peak - sum(held.values()))
    refused = said.strip().splitlines()[0]
    return {**held, "temporaries": temporaries, "peak": peak, "limit": limit, "fits": False, "refused": refused}


@dataclasses.dataclass
class _Row:
    """Collectives of one kind that carry the same thing: how many run in a step, and bytes of one device."""

    number: int = 0
    bytes: int = 0
    sent: float = 0.0


def summary(collectives: Iterable[hlo.Collective], params: dict) -> list[dict]:
    """The collectives of a step, by kind and by what they carry.

    What they carry is "parameters" (gathered, or sent in the forward pass) or "gradients" where an array has the size
    of a parameter (or of a device's part of one), "scalars", "concepts" where the code of the loss asks for it, and
    else the operation that XLA had to do it for. One that carries several arrays counts in the row of each of them, as
    its share of their bytes.

    Args:
      collectives: see `hlo.collectives`.
      params: the parameters' shapes and places.
    """
    sizes = set()
    for leaf in flatten(params).values():
        sizes |= {math.prod(leaf.shape), math.prod(leaf.sharding.shard_shape(leaf.shape))}
    collectives = list(collectives)
    # What a compiler makes of a scattered sum may have lost its name; its size is that of the gather before it.
    scattered = {math.prod(shape) for one in collectives if "shard_map" in one.origin for _, shape in one.arrays}
    rows: dict[tuple[str, str], _Row] = {}
    for one in collectives:
        carried: dict[str, int] = {}
        for (dtype, shape), size in zip(one.arrays, one.sizes, strict=True):
            floats = dtype.startswith(("f", "bf"))
            of = _carried(one, math.prod(shape), sizes if floats else set(), scattered)
            carried[of] = carried.get(of, 0) + size
        for of, size in carried.items():
            row = rows.setdefault((one.kind, of), _Row())
            row.number += one.times
            row.bytes += one.times * size
            row.sent += one.times * size * one.sent_share
    return [{"kind": kind, "of": of, **dataclasses.asdict(row)} for (kind, of), row in sorted(rows.items())]


def _carried(one: hlo.Collective, elements: int, parameter_sizes: set[int], concept_sizes: set[int]) -> str:
    if elements <= 1:
        return "scalars"
    if elements in parameter_sizes:
        # What is combined has the name of one of its arrays alone.
        forward = len(one.arrays) == 1 and "jvp(" in one.origin and "transpose(" not in one.origin
        return "parameters" if forward or one.kind == "all-gather" else "gradients"
    if "shard_map" in one.origin or (not one.origin and elements in concept_sizes):
        return "concepts"
    return one.origin.rpartition("/")[2] or "unnamed"
