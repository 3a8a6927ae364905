"""How fast this machine's devices are: matrix products and memory, from a data sheet or measured by short programs."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nuner_jax.sharding import AXES, local_mesh

# Dense bf16 products, operations per second of one device, by the beginning of its `device_kind`; the first that fits.
# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "Peak compute per chip (bf16)". NVIDIA: the data sheets of A100,
# H100 and H200, "BFLOAT16 Tensor Core", half of what is given "with sparsity".
_PEAK_BF16 = {
    "TPU v4 lite": None,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}

_SIZES = {"cpu": (512, 1024)}  # of the square matrices that are multiplied
_ACCELERATOR_SIZES = (4096, 8192, 16384)
_QUICK_SIZE, _QUICK_ACCELERATOR_SIZE = 768, 8192
_MEMORY_SIZES = (2**24, 2**25)  # float32 numbers, on each device: more than a cache holds
_LINK_SIZE, _LINK_ROUNDS = 2**22, 4  # float32 numbers, on each device
_CALL_SECONDS = 0.05  # of one timed call, so that starting it does not count
_CALLS = 5
_QUICK_SECONDS = 0.1  # after which no further call is made at the start of a run


@dataclasses.dataclass(frozen=True)
class Rate:
    """Something per second of one device, and where the figure is from, in words."""

    per_second: float
    origin: str


def reference_matrix_rate(dtype: jnp.dtype) -> Rate:
    """What the utilisation in a training log is a share of: the data sheet's peak, or a measurement of 0.2 s.

    Args:
      dtype: of the products.
    """
    kind, dtype = jax.devices()[0].device_kind, jnp.dtype(dtype)
    peak = next((peak for name, peak in _PEAK_BF16.items() if kind.startswith(name)), None)
    if peak and dtype == jnp.bfloat16 and "MIG" not in kind:  # which is a slice of a GPU
        return Rate(peak, f"the data sheet's bfloat16 peak of {kind}")
    size = _QUICK_SIZE if jax.default_backend() == "cpu" else _QUICK_ACCELERATOR_SIZE
    program, began, seconds = _product(size, dtype), time.perf_counter(), []
    while not seconds or time.perf_counter() - began < _QUICK_SECONDS:
        seconds.append(program.seconds(1))
    # The fastest: others' work on this machine can only slow it.
    return Rate(2 * size**3 / min(seconds), f"what {dtype} products of {size} x {size} matrices reach here")


def measured_matrix_rate(dtype: jnp.dtype) -> Rate:
    """The best that products of several sizes reach, on all devices of this process at once.

    Args:
      dtype: of the products.
    """
    sizes = _SIZES.get(jax.default_backend(), _ACCELERATOR_SIZES)
    rates = {size: 2 * size**3 / _median_seconds(_product(size, jnp.dtype(dtype))) for size in sizes}
    best = max(rates, key=rates.get)
    return Rate(rates[best], f"{jnp.dtype(dtype)} products of {best} x {best} matrices, the best of {len(sizes)} sizes")


def measured_bandwidth() -> Rate:
    """Bytes per second, read and written, of a program that does little else, on all local devices at once."""
    rates = {size: 8 * size / _median_seconds(_scaling(size)) for size in _MEMORY_SIZES}
    best = max(rates, key=rates.get)
    return Rate(rates[best], f"an array of {best * 4 / 2**20:,.0f} MiB scaled in place")


def measured_link(mesh: Mesh) -> Rate:
    """Bytes per second that one device of a mesh sends while all of them add up an array, as a ring would do it."""
    program, devices = _summing(_LINK_SIZE, mesh), mesh.size
    # As many rounds on every host: each waits for the others in each of them.
    seconds = statistics.median(program.seconds(_LINK_ROUNDS) for _ in range(_CALLS)) / _LINK_ROUNDS
    sent = 4 * _LINK_SIZE * 2 * (devices - 1) / devices
    return Rate(sent / seconds, f"an all-reduce of {_LINK_SIZE * 4 / 2**20:,.0f} MiB over {devices} devices")


def _product(size: int, dtype: jnp.dtype) -> _Rounds:
    """Multiplies a matrix by another in each round."""

    # Random numbers, since a chip is faster on zeros; scaled, so that the products stay as large as they are.
    def draw():
        a_SxS, b_SxS = jax.random.normal(jax.random.key(0, impl="rbg"), (2, size, size))
        return a_SxS.astype(dtype), (b_SxS / size**0.5).astype(dtype)

    return _Rounds(draw, lambda a_SxS, b_SxS: a_SxS @ b_SxS)


def _scaling(size: int) -> _Rounds:
    """Reads and writes an array in each round."""
    return _Rounds(lambda: (jnp.ones(size, jnp.float32), jnp.float32(0.9999)), lambda x_S, factor: x_S * factor)


def _summing(size: int, mesh: Mesh) -> _Rounds:
    """Adds up an array over devices in each round, and takes the mean."""
    share = 1 / mesh.size
    return _Rounds(
        lambda: (jnp.ones(size), jnp.float32(share)), lambda x_S, share: jax.lax.psum(x_S, AXES) * share, mesh
    )


class _Rounds:
    """A program that does `x = one(x, other)` as often as it is told, on each device of a mesh."""

    def __init__(self, draw: Callable, one: Callable, mesh: Mesh | None = None):
        """Compiles it.

        Args:
          draw: makes the first x, and the other.
          one: a round.
          mesh: of the devices; None: those of this process.
        """
        mesh = mesh or local_mesh()
        each = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        own = P(AXES)  # each device has arrays of its own, side by side
        self._whole = NamedSharding(mesh, P())
        self._arrays = jax.jit(each(lambda: jax.tree.map(jnp.atleast_1d, draw()), in_specs=(), out_specs=(own, own)))()

        def repeat(number, x, other):
            return jax.lax.fori_loop(0, number, lambda _, x: one(x, other), x)

        self._repeat = jax.jit(each(repeat, in_specs=(P(), own, own), out_specs=own), donate_argnums=1)
        self.seconds(1)

    def seconds(self, rounds: int) -> float:
        """How long so many rounds take."""
        number = jax.device_put(rounds, self._whole)
        start = time.perf_counter()
        x, other = self._arrays
        self._arrays = jax.block_until_ready(self._repeat(number, x, other)), other
        return time.perf_counter() - start


def _median_seconds(program: _Rounds) -> float:
    """The median over calls of the time that one round takes."""
    rounds = max(1, round(_CALL_SECONDS / program.seconds(1)))
    return statistics.median(program.seconds(rounds) for _ in range(_CALLS)) / rounds
