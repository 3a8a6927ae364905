"""Compiles the train step of a config on topologies; where it does not fit, looks for settings that would."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import sharding
from nuner_jax.aot import compiled_step, sizing, topology
from nuner_jax.aot.table import advice_line, growth_lines, lines, memory_line
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import REMAT
from nuner_jax.state import TrainState
from nuner_jax.tasks import make_task
from nuner_jax.tasks.protocol import Task


def compile_all(
    config: ConfigDict,
    names: Sequence[str],
    stated: Mapping[str, int] | None,
    limit: float | None,
    say: Callable[[str], None],
) -> list[dict]:
    """The figures of a config on each topology, told as they come.

    Args:
      config: the resolved config; where there are several topologies its rows are those on the first one.
      names: of topologies, see `topology.devices`.
      stated: the shapes of a batch, see `sizing.parse_shapes`; None: the config's data tells.
      limit: bytes of a device's memory, where it is not to be that of the topology.
      say: is told the tables.

    Raises:
      NunerError: no such topology, or one that the config does not fit: its mesh, its rows, its attention.
    """
    figures = []
    every = topology.devices(names)
    for name, devices in zip(names, every, strict=True):
        grown = _grown(config, len(devices), len(every[0]))
        one = {"topology": name, **figures_of(grown, devices, stated, limit)}
        figures.append(one)
        for line in lines(one):
            say(line)
        if not one["memory"]["fits"]:
            say("Settings that need less, compiled one by one:")
            one["advice"] = []
            for advice in _advice(grown, devices, stated, limit):
                one["advice"].append(advice)
                say(advice_line(advice))
    if len(figures) > 1:
        for line in growth_lines(figures):
            say(line)
    return figures


def _grown(config: ConfigDict, devices: int, first: int) -> ConfigDict:
    """The config with as many rows for each device as it has on the first topology."""
    grown = copy.deepcopy(config)
    for group, key in (("data", "rows"), ("data", "row_multiple"), ("eval", "rows")):
        if key in config[group]:
            if config[group][key] * devices % first:
                raise NunerError(
                    f"config.{group}.{key} = {config[group][key]} on {first} devices is no whole number on {devices}: "
                    "name the topologies from the smallest to the largest"
                )
            grown[group][key] = config[group][key] * devices // first
    return grown


def figures_of(
    config: ConfigDict, devices: Sequence[jax.Device], stated: Mapping[str, int] | None, limit: float | None
) -> dict:
    """What the compiled step of a config tells on these devices; see `compiled_step.figures`."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    if stated is not None and config.task != "pretrain":
        raise NunerError(f"--shapes is for config.task = 'pretrain'; of {config.task!r} the data tells the labels too")
    task = make_task(config, mesh) if stated is None else sizing.Sized(config, mesh, stated)
    return compiled_step.figures(config, task, mesh, limit or topology.memory(devices[0]))


def compile_to_run(
    config: ConfigDict, task: Task, mesh: Mesh, train_step: Callable, state: TrainState, say: Callable[[str], None]
) -> jax.stages.Compiled:
    """Compiles a step that is about to run here, and tells what it needs of a device's memory.

    Args:
      config: the resolved config.
      task: of the config.
      mesh: of the devices.
      train_step: jitted; its first call makes use of what was compiled.
      state: what the first call is to be given.
      say: is told what is needed.

    Raises:
      NunerError: it does not fit; the message says what takes the memory, and which settings would fit.
    """
    limit = topology.free_memory(mesh.local_devices, state)
    batch = sizing.batch_shapes(task, mesh, int(state.step))
    compiled, memory = compiled_step.compile_step(train_step, state, batch, limit)
    needs = memory_line(memory)
    say(needs)
    # The compiler for TPUs refuses what does not fit, and so knows better than a sum of sizes.
    if memory["fits"] or (compiled is not None and mesh.local_devices[0].platform == "tpu"):
        return compiled
    say("It does not fit: other settings are compiled one by one, to see which would.")
    advice = [advice_line(one).strip() for one in _advice(config, list(mesh.devices.flat), None, limit)]
    raise NunerError(f"{needs}. It does not fit. With other settings: {'; '.join(advice) or 'none was found'}")


def _advice(config: ConfigDict, devices, stated, limit) -> Iterator[dict]:
    """Of each kind of setting the first that fits, or the last that was tried: the keys, and the memory then needed."""
    for attempts in alternatives(config, devices):
        tried = None
        for changes in attempts:
            other = copy.deepcopy(config)
            for key, value in changes.items():
                group, _, name = key.partition(".")
                other[group][name] = value
            try:
                memory = figures_of(other, devices, stated, limit)["memory"]
            except NunerError:  # the mesh cannot have it
                break
            tried = {"changes": changes, "peak": memory["peak"], "fits": memory["fits"]}
            if memory["fits"]:
                break
        if tried:
            yield tried


def alternatives(config: ConfigDict, devices: Sequence[jax.Device]) -> list[list[dict]]:
    """Settings that need less memory, kind by kind, from the mildest: config keys and their values."""
    rows, accumulate, parts = config.data.rows, config.optim.accumulate, len(devices) // max(1, config.mesh.tensor)
    remat = REMAT[REMAT.index(config.model.remat) + 1 :] if devices[0].platform != "cpu" else ()  # saves nothing there
    halvings = [2**n for n in range(1, 5)]
    kinds = [
        [{"model.remat": again} for again in remat],
        [{"optim.accumulate": accumulate * n} for n in halvings if rows % (accumulate * n * parts) == 0],
        [{"mesh.data": 1, "mesh.fsdp": -1}] if parts > 1 and config.mesh.fsdp == 1 and config.mesh.tensor != -1 else [],
        [{"data.rows": rows // n} for n in halvings if rows % (n * accumulate * parts) == 0],
    ]
    if "loss" in config and "chunk" in config.loss and (config.loss.chunk or 2**20) > 1024:
        kinds.insert(2, [{"loss.chunk": 1024}])
    return kinds
