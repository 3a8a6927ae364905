"""The numbers of a run while it trains: fetched a step late, checked, averaged, timed, shown."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence

import jax

from nuner_jax.errors import NunerError
from nuner_jax.writers import Console, MetricWriter, NoWriter, duration

_REFRESH = 0.2  # seconds between updates of the live line


class Progress:
    """Turns the metrics of steps into lines of a log.

    A step's metrics are fetched when the next step is already on its way, so that the device never waits for
    the host; and they are checked, so that a loss or gradient that is not finite stops the run at once.
    """

    def __init__(
        self,
        *,
        step: int,
        total: int,
        log_every: int,
        counts: Sequence[str],
        full_rate_seconds: float | None,
        waited: Callable[[], float],
        last_good: Callable[[], str],
        writer: MetricWriter | NoWriter,
        console: Console,
    ):
        """Starts the clock.

        Args:
          step, total: steps done, and to do in all.
          log_every: steps between lines.
          counts: metrics that are amounts of a step (tokens, …): they are shown as rates; others are averaged.
          full_rate_seconds: that a step would take at the devices' full matrix rate; None: unknown.
          waited: seconds spent waiting for data so far.
          last_good: says which checkpoint to fall back on.
          writer, console: where lines go.
        """
        self._step, self._total, self._log_every = step, total, log_every
        self._counts, self._waited, self._full_rate_seconds = counts, waited, full_rate_seconds
        self._last_good, self._writer, self._console = last_good, writer, console
        self._pending: tuple[int, dict] | None = None
        self._compiled = False
        self._shown = 0.0
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._start_clock()

    def _start_clock(self) -> None:
        """The interval's steps from here on are timed; those before it count for the means alone."""
        self._untimed_sums, self._untimed_steps = dict(self._sums), self._steps
        self._began, self._paused, self._waited_before = time.perf_counter(), 0.0, self._waited()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was started, and records those of the one before."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Records the last step's metrics, waiting for them.

        Raises:
          NunerError: the loss, the gradient or the parameters of a step are not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(values[name]):
                raise NunerError(
                    f"{name} is {values[name]} at step {step}: training stops. {self._last_good()} "
                    "Lower config.lr or config.optim.clip_norm, or look at the data of this step"
                )
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if not self._compiled:
            self._compiled = True  # the first step compiles: its time says nothing about the next ones
            self._start_clock()
        due = step % self._log_every == 0 or step == self._total
        pace = self._pace()
        self._show(step, values["loss"], pace, due)
        if due:
            self._log(step, pace)

    @contextlib.contextmanager
    def paused(self):
        """Time inside does not count as training; not around `flush`, which may start another interval."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Records an evaluation.

        Raises:
          NunerError: a figure is not finite: the model is broken, and must not be saved as the best one.
        """
        broken = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise NunerError(f"{', '.join(broken)} at step {step}: training stops. {self._last_good()}")
        self._writer.write(step, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self._console.say(f"step {step:,}: {shown}")

    def _elapsed(self) -> float:
        return max(1e-9, time.perf_counter() - self._began - self._paused)

    def _pace(self) -> dict[str, float]:
        """Time per step, amounts per second and utilisation of the steps that were timed in this interval, if any."""
        steps, elapsed = self._steps - self._untimed_steps, self._elapsed()
        if not steps:
            return {}
        pace = {
            f"{name}_per_second": (self._sums[name] - self._untimed_sums.get(name, 0.0)) / elapsed
            for name in self._counts
        }
        pace["seconds_per_step"] = elapsed / steps
        pace["data_wait_share"] = min(1.0, (self._waited() - self._waited_before) / elapsed)
        if self._full_rate_seconds is not None:
            pace["mfu"] = self._full_rate_seconds * steps / elapsed
        return pace

    def _log(self, step: int, pace: dict[str, float]) -> None:
        """One line of metrics: means over the interval, rates per second of its training time."""
        metrics = {name: total / self._steps for name, total in self._sums.items()} | pace
        self._writer.write(step, {f"train/{name}": value for name, value in metrics.items()})
        self._begin_interval()

    def _show(self, step: int, loss: float, pace: dict[str, float], due: bool) -> None:
        now = time.perf_counter()
        if not due and now - self._shown < _REFRESH:
            return
        self._shown = now
        parts = [f"step {step:,}/{self._total:,}", f"loss {loss:.4f}"]
        if pace:
            rates = [f"{pace[f'{name}_per_second']:,.0f} {name}/s" for name in self._counts[:1]]
            left = duration(pace["seconds_per_step"] * (self._total - step))
            rates += [f"mfu {pace['mfu']:.1%}"] if "mfu" in pace else []
            parts += [f"{pace['seconds_per_step']:.3g} s/step", *rates, f"{left} left"]
        self._console.progress("  ".join(parts), final=due)
