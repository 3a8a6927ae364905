"""Devices by the name of a topology, `v5e:4x4` or `cpu:8`: to compile for, whether they are here or not."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax

from nuner_jax.errors import NunerError

# Bytes of memory of one device, by its `device_kind`. docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "HBM capacity".
_MEMORY = {"TPU v4": 32 * 2**30, "TPU v5 lite": 16 * 10**9, "TPU v5": 95 * 10**9, "TPU v6 lite": 32 * 10**9}

# What can be rented, as the same pages list it: squares and their halves of a 2D torus, blocks of a 3D one.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_BLOCKS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_MOST_CHIPS = {"v4": 4096, "v5p": 6144}  # of one job, in blocks whose sides are multiples of 4
_FAMILIES = {"v4": _BLOCKS, "v5e": _FLAT, "v5p": _BLOCKS, "v6e": _FLAT}

EXISTING = (
    f"v5e: and v6e: {', '.join(_FLAT)}; v4: and v5p: {', '.join(_BLOCKS)}, or three multiples of 4 in ascending order "
    "(4x4x8); cpu:N, N devices of this machine's CPU; gpu, all GPUs of this machine"
)
"""The topologies that there are, for a message."""


def devices(names: Sequence[str]) -> list[list[jax.Device]]:
    """The devices of each topology.

    A TPU need not be here, but its compiler (libtpu) must. CPU devices are made: as many as the largest `cpu:N` says,
    if no device has been asked for before.

    Args:
      names: "v5e:4x4" and its like, "cpu:8", "gpu".

    Raises:
      NunerError: no such topology; libtpu or a GPU is missing.
    """
    for name in names:
        _check(name)
    if "gpu" not in names:
        jax.config.update("jax_platforms", "cpu")  # whatever else is here is left alone
    counts = [int(name.partition(":")[2]) for name in names if name.startswith("cpu:")]
    if counts:
        with contextlib.suppress(RuntimeError):  # devices are there already: those must do
            jax.config.update("jax_num_cpu_devices", max(counts))
    return [_devices(name) for name in names]


def _check(name: str) -> None:
    if name == "gpu" or re.fullmatch(r"cpu:[1-9]\d*", name):
        return
    family, _, shape = name.partition(":")
    if family not in _FAMILIES or not (shape in _FAMILIES[family] or _is_block(family, shape)):
        raise NunerError(f"--topology={name}: there is no such topology. There are {EXISTING}")
    if importlib.util.find_spec("libtpu") is None:
        raise NunerError(
            f"--topology={name} needs libtpu, the compiler for TPUs (no TPU is needed): install the extra `tpu`, "
            "pip install 'nuner_jax[tpu]' or NUNER_EXTRAS=tpu launch/local.sh; --topology=cpu:8 needs neither"
        )


def _is_block(family: str, shape: str) -> bool:
    if family not in _MOST_CHIPS or not re.fullmatch(r"\d+x\d+x\d+", shape):
        return False
    sides = [int(side) for side in shape.split("x")]
    whole = all(side and side % 4 == 0 for side in sides) and sides == sorted(sides)
    return whole and math.prod(sides) <= _MOST_CHIPS[family]


def _devices(name: str) -> list[jax.Device]:
    family, _, shape = name.partition(":")
    if family in _FAMILIES:
        return _tpu(family, shape)
    try:
        found = jax.devices(family)
    except RuntimeError as error:
        raise NunerError(f"--topology={name}: no {family.upper()} was found on this machine ({error})") from error
    count = int(shape) if shape else len(found)
    if len(found) < count:
        raise NunerError(f"--topology={name}: this process has made {len(found)} CPU devices already")
    return found[:count]


def _tpu(family: str, shape: str) -> list[jax.Device]:
    from jax.experimental import topologies

    # So that libtpu does not look for the machine that it is to run on, nor wants to be the only one that runs.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    options = {"chip_config_name": "megacore"} if family == "v4" else {}  # the others' chips are one device anyway
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{family}:{shape}", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise NunerError(f"--topology={family}:{shape}: libtpu refuses it: {error}") from error


def memory(device: jax.Device) -> int | None:
    """Bytes of memory that a program on this device may fill; None where it is the host's, or nobody tells."""
    if device.platform == "gpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return _MEMORY.get(device.device_kind)


def free_memory(devices: Sequence[jax.Device], state: object) -> float | None:
    """Bytes of memory of one of the devices of this process, `state` being there already; None where nobody tells.

    CPU devices share what is free of the machine's, or of the container's.

    Args:
      devices: of this process, all of one kind.
      state: the arrays, part of which each device holds.
    """
    first = devices[0]
    if first.platform != "cpu":
        return memory(first)
    free = _free_host_memory()
    if free is None:
        return None
    held = sum(piece.data.nbytes for array in jax.tree.leaves(state) for piece in array.addressable_shards)
    return (free + held) / len(devices)


def _free_host_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return None
    with contextlib.suppress(OSError, ValueError, StopIteration):  # no container, or one without a limit ("max")
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        free = min(free, limit - next(int(line.split()[1]) for line in used if line.startswith("anon ")))
    return free
