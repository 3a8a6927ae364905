"""The processes of one run: joined at its start, held to the same config, code and data, and ended together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import nuner_jax
from nuner_jax import workdir as workdir_lib
from nuner_jax.config.values import leaves
from nuner_jax.distributed import roll_call
from nuner_jax.errors import NunerError

flags.disclaim_key_flags()  # --help tells of them as flags of the command

_PLATFORMS = ("jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")  # one installed on some hosts alone
_CLOSING_SECONDS = 24 * 3600  # processes that have ended wait so long for the first one's export and few-shot table
_PARTING_SECONDS = 5.0  # a process that fails waits so long for the others to fail too


def define_flags() -> None:
    """Defines the flags by which a command's processes find each other."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where several processes train.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator.")
    flags.DEFINE_bool("distributed", False, "Several processes, which JAX finds itself (TPU pods, SLURM).")
    flags.DEFINE_float("join_timeout", 300.0, "Seconds that processes wait for each other at the start.", 1.0)


def join(config: ConfigDict) -> None:
    """Connects the processes of a run that has several, once all are there and have the same config and code.

    Args:
      config: the one that this process would train with.

    Raises:
      NunerError: flags that do not go together; a process that is missing after --join_timeout seconds; processes that
        differ in config, source files or versions, or have other devices than process 0.
    """
    given = flags.FLAGS
    cluster = (given.coordinator, given.num_processes, given.process_id)
    if any(value is not None for value in cluster) and None in cluster:
        raise NunerError("--coordinator, --num_processes and --process_id go together (or --distributed alone)")
    if not given.distributed and not given.coordinator:
        return
    address, processes, number = _checked(*(cluster if given.coordinator else _detected(given.join_timeout)))
    member = roll_call.Member(number, processes, socket.gethostname(), _facts(config))
    if number == 0:
        print(
            f"process 0 of {processes} waits at {address} for the others, {given.join_timeout:g} s at most", flush=True
        )
    roll_call.meet(address, member, given.join_timeout)
    jax.distributed.initialize(address, processes, number, shutdown_timeout_seconds=_CLOSING_SECONDS)
    _check_devices()


def describe() -> str:
    """How many devices there are, of what kind, and in how many processes, if in several."""
    several = f" in {jax.process_count()} processes, {jax.local_device_count()} each" if jax.process_count() > 1 else ""
    return workdir_lib.devices() + several


def same_data(fingerprint: str) -> None:
    """Holds the training data of this process to that of process 0; every process calls it.

    Raises:
      NunerError: some have other data, by their numbers.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(fingerprint.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = [number for number, digest in enumerate(digests) if (digest != digests[0]).any()]
    if others:
        raise NunerError(
            f"the training data of {roll_call.named(others)} is not that of process 0: give every host the same files "
            "as config.data names, and where they were changed, remove what config.data.cache_dir keeps of them"
        )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where one process of several fails inside, it ends within seconds, and JAX ends the others.

    Without it, it would wait for them before it ends, and they for its share of the next step.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            code = 2 if isinstance(error, NunerError) else 1
            watch = threading.Timer(_PARTING_SECONDS, _leave, [code])
            watch.daemon = True
            watch.start()
        raise


def _leave(code: int) -> None:
    """Ends this process, whatever it waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _detected(seconds: float) -> tuple[str | None, int | None, int | None]:
    """Address, number of processes and number of this one, as JAX finds them on TPU pods, under SLURM and the like.

    The only way to them before JAX has started on its own is this part of it, which is not public.
    """
    from jax._src.clusters import ClusterEnv

    return ClusterEnv.auto_detect_unset_distributed_params(None, None, None, (), None, round(seconds))[:3]


def _checked(address: str | None, processes: int | None, number: int | None) -> tuple[str, int, int]:
    """The same, if a run can start with them."""
    if None in (address, processes, number):
        raise NunerError(
            "--distributed: JAX knows of no TPU pod, SLURM step or MPI run here; give --coordinator, --num_processes "
            "and --process_id instead"
        )
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise NunerError(f"--coordinator={address}: host:port is needed, the same on every host")
    if not 0 <= number < processes:
        raise NunerError(f"--process_id={number}: from 0 to {processes - 1}, as --num_processes={processes} says")
    return address, processes, number


def _facts(config: ConfigDict) -> dict[str, str]:
    """What must be the same on every process: config, versions, and the package's source files."""
    found = workdir_lib.versions((*workdir_lib.LIBRARIES, *_PLATFORMS))
    package = Path(nuner_jax.__file__).parent
    sources = {path.relative_to(package.parent).as_posix(): path for path in sorted(package.rglob("*.py"))}
    return {
        **{f"config.{key}": repr(value) for key, value in leaves(config)},
        **{f"version of {name}": version for name, version in found.items()},
        **{name: f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}" for name, path in sources.items()},
    }


def _check_devices() -> None:
    """Every process must have as many devices of the same kind."""
    kinds: dict[int, list[str]] = {number: [] for number in range(jax.process_count())}
    for device in jax.devices():
        kinds[device.process_index].append(device.device_kind)
    shown = {
        number: ", ".join(f"{found.count(kind)} x {kind}" for kind in sorted(set(found)))
        for number, found in kinds.items()
    }
    if len(set(shown.values())) > 1:
        raise NunerError(
            f"the processes have different devices: {roll_call.by_value(shown)}; give each the same number of one kind "
            "(JAX_PLATFORMS, CUDA_VISIBLE_DEVICES and drivers decide which JAX sees)"
        )
