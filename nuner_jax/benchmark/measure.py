"""The measurements: what a step must take by its costs, what it does take, and what takes the difference."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nuner_jax import train
from nuner_jax.aot.compile import compile_to_run
from nuner_jax.data.prefetch import Prefetch
from nuner_jax.performance import costs, device_rates, hlo
from nuner_jax.state import TrainState, combine, partition

_BATCHES = 8  # different ones that are kept on the device
_TRACED_STEPS = 3

_COMPILED = "/jax/core/compile/backend_compile_duration"  # once per program, out of the cache on disk too
_COMPILING = (_COMPILED, "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")


@dataclasses.dataclass
class Compilations:
    """Programs compiled (or read from the cache on disk), and the time for tracing and compiling."""

    programs: int = 0
    seconds: float = 0.0


@contextlib.contextmanager
def compilations() -> Iterator[Compilations]:
    """Counts them in this process while the context lasts."""
    counted = Compilations()

    def listen(event: str, seconds: float, **_) -> None:
        counted.programs += event == _COMPILED
        counted.seconds += seconds if event in _COMPILING else 0.0

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counted
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure(run: train.Run, *, steps: int, warmup: int, profile: str | None = None, say: Callable[[str], None]) -> dict:
    """All figures of a run that is prepared and has not begun, as JSON; in seconds, operations and bytes.

    Args:
      run: what `train.prepare` made; its state is used up.
      steps: to time with the batches on the device, and again with the loader.
      warmup: steps before, beside the one that compiles.
      profile: folder for a trace of three more steps.
      say: is told the memory that a step needs.

    Raises:
      NunerError: a step does not fit into the memory.
      RuntimeError: the step was compiled again after the first one.
    """
    dtype = jnp.dtype(run.config.model.dtype)
    floor = _Floor(run, device_rates.measured_matrix_rate(dtype), device_rates.measured_bandwidth())
    with compilations() as compiled:
        start = time.perf_counter()
        program = compile_to_run(run.config, run.task, run.mesh, run.train_step, run.state, say)
        first_step = time.perf_counter() - start
    kept, making = _batches(run, min(_BATCHES, steps))
    encoders = _encoder_seconds(run, kept[0], steps)
    with compilations() as again:  # none: the first step makes use of what has been compiled
        start = time.perf_counter()
        state, metrics = run.train_step(run.state, kept[0])
        jax.device_get(metrics)
        first_step += time.perf_counter() - start
        state, _ = pace(run, state, lambda index: kept[index % len(kept)], warmup)
        state, ready = pace(run, state, lambda index: kept[index % len(kept)], steps)
        make, stop = functools.partial(train.global_batch, run), len(kept) + steps + 1
        with contextlib.closing(Prefetch(make, len(kept), stop, run.config.data.prefetch)) as batches:
            state, loaded = pace(run, state, lambda index: batches.get(), steps)
        if profile:
            with jax.profiler.trace(profile):
                pace(run, state, lambda index: kept[index % len(kept)], _TRACED_STEPS)
    if again.programs:
        raise RuntimeError(
            f"{again.programs} programs were compiled after the one of the step: its shapes or types change"
        )
    return floor.figures() | {
        "task": run.config.task,
        "dtype": dtype.name,
        "mesh": dict(run.mesh.shape),
        "steps": steps,
        "warmup": warmup,
        "amounts": ready.amounts(run.task.counts),
        "encoders": {"seconds": encoders} | floor.shares(encoders, floor.encoders),
        "step": ready.spread() | floor.shares(ready.spread()["median"], floor.parts),
        "with_loader": loaded.spread() | {"data_wait_share": sum(loaded.waited) / sum(loaded.seconds)},
        "batch_seconds": float(np.median(making)),
        "dispatch_seconds": float(np.median(ready.dispatched)),
        "collectives": _collectives(program.as_text(), run.mesh),
        "compilation": dataclasses.asdict(compiled) | {"first_step": first_step},
        "run": {"steps": run.total_steps, "seconds": run.total_steps * loaded.spread()["median"]},
    }


def _batches(run: train.Run, number: int) -> tuple[list[dict], list[float]]:
    """The first batches, on the devices, and the time that the making of each took."""
    kept, seconds = [], []
    for index in range(number):
        start = time.perf_counter()
        kept.append(jax.block_until_ready(train.global_batch(run, index)))
        seconds.append(time.perf_counter() - start)
    return kept, seconds


class _Floor:
    """What a step costs, and the least time that this takes at measured rates."""

    def __init__(self, run: train.Run, matrix: device_rates.Rate, memory: device_rates.Rate):
        self._run, self._matrix, self._memory, self._devices = run, matrix, memory, run.mesh.size
        trained = partition(run.state.params, run.task.is_frozen)[0]
        update = costs.optimizer(sum(leaf.size for leaf in trained.values()))
        self.encoders = {name: part for name, part in run.task.costs().items() if name not in costs.ON_TOP}
        self.parts = run.task.costs() | {"optimizer": update}

    def _seconds(self, part: costs.Part) -> float:
        rates = {"matrix_rate": self._matrix.per_second, "bandwidth": self._memory.per_second}
        return sum(cost.seconds(devices=self._devices, **rates) for cost in (part.forward, part.backward))

    def shares(self, seconds: float, parts: dict[str, costs.Part]) -> dict[str, float]:
        """What share of the matrix rate some parts reach that took so long, and of their floor."""
        operations = costs.total(parts.values()).operations
        return {
            "operations": operations,
            "mfu": operations / (seconds * self._matrix.per_second * self._devices),
            "floor_seconds": (floor := sum(map(self._seconds, parts.values()))),
            "floor_share": floor / seconds,
        }

    def figures(self) -> dict:
        """The rates, each part, and what padding takes."""
        parts = {
            name: {
                "forward_operations": part.forward.operations,
                "backward_operations": part.backward.operations,
                "bytes": part.both.activation_bytes + part.both.parameter_bytes,
                "floor_seconds": self._seconds(part),
            }
            for name, part in self.parts.items()
        }
        rates = {"matrix_rate": self._matrix, "bandwidth": self._memory}
        return {name: dataclasses.asdict(rate) for name, rate in rates.items()} | {
            "parts": parts,
            "padding": self._padding(),
        }

    def _padding(self) -> dict[str, float]:
        """The share of each part's operations that no token needed, over some batches; "step": of all."""
        batches = [self._run.task.train_batch(index, np.arange) for index in range(_BATCHES)]
        useful = [self._run.task.costs(batch) for batch in batches]
        computed = self._run.task.costs()

        def lost(names: Iterable[str]) -> float:
            needed = sum(costs.total(one[name] for name in names).operations for one in useful) / len(useful)
            return 1 - needed / costs.total(computed[name] for name in names).operations

        shares = {name: lost([name]) for name, part in computed.items() if part.both.operations}
        return shares | {"step": lost(list(computed))}


def _encoder_seconds(run: train.Run, batch: dict, calls: int) -> float:
    """The median time that the encoders alone take, forward and backward: no loss, no head, no optimizer."""
    task = run.task

    @jax.jit
    def both_passes(params: dict, batch: dict):
        trained, frozen = partition(params, task.is_frozen)
        micro_batch, key = jax.tree.map(lambda x: x[0], batch), jax.random.key(0)
        vectors, gradients_of = jax.vjp(
            lambda trained: task.vectors(combine(trained, frozen), micro_batch, key), trained
        )
        return vectors, gradients_of(vectors)

    def call() -> float:
        start = time.perf_counter()
        jax.block_until_ready(both_passes(run.state.params, batch))
        return time.perf_counter() - start

    call()  # compiles
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    return micro_batches * float(np.median([call() for _ in range(calls)]))


def _collectives(program: str, mesh: Mesh) -> dict | None:
    """What a device sends in a step, by the compiled program's text, and the time for it if nothing else went on."""
    if mesh.size == 1:
        return None
    found, link = hlo.collectives(program), device_rates.measured_link(mesh)
    sent = sum(one.times * one.sent_share * sum(one.sizes) for one in found)
    return {
        "number": sum(one.times for one in found),
        "bytes_sent": sent,
        "link": dataclasses.asdict(link),
        "seconds": sent / link.per_second,
    }


@dataclasses.dataclass(frozen=True)
class Pace:
    """Of each of some steps: its time, the host's for calling it, the wait for its batch (seconds), and its metrics."""

    seconds: list[float]
    dispatched: list[float]
    waited: list[float]
    metrics: list[dict[str, float]]

    def spread(self) -> dict[str, float]:
        """Median, tenth and ninetieth percentile of the times."""
        low, median, high = np.percentile(self.seconds, (10, 50, 90))
        return {"median": float(median), "p10": float(low), "p90": float(high)}

    def amounts(self, names: Sequence[str]) -> dict[str, float]:
        """The mean of these metrics."""
        return {name: float(np.mean([metrics[name] for metrics in self.metrics])) for name in names}


def pace(run: train.Run, state: TrainState, batch: Callable[[int], dict], steps: int) -> tuple[TrainState, Pace]:
    """Takes steps as the training loop does, metrics fetched a step late, and times them; nothing moves unasked.

    Args:
      run: whose train step it is.
      state: to begin with; it is donated.
      batch: gives the batch of the step of a number, from 0.
      steps: to time; one more is taken first, so that each of them begins while its forerunner is at work.

    Returns:
      The state after all steps, and the times.
    """
    pending, ends, dispatched, waited, fetched = None, [], [], [], []
    for index in range(steps + 1):
        start = time.perf_counter()
        arrays = batch(index)
        called = time.perf_counter()
        with jax.transfer_guard("disallow"):
            state, metrics = run.train_step(state, arrays)
        dispatched.append(time.perf_counter() - called)
        waited.append(called - start)
        fetched.append(jax.device_get(pending))
        pending = metrics
        ends.append(time.perf_counter())
    jax.block_until_ready(state)
    return state, Pace(np.diff(ends).tolist(), dispatched[1:], waited[1:], fetched[1:])
