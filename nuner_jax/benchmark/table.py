"""The figures of a benchmark as lines that a person reads."""

from __future__ import annotations

from collections.abc import Iterator

from nuner_jax.writers import duration

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def lines(figures: dict) -> Iterator[str]:
    """The table of costs, and below it what was measured.

    Args:
      figures: what `measure.measure` found, with `of` (the config) and `devices`.
    """
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    yield ""
    yield f"{figures['of']} ({figures['task']}, {figures['dtype']}) on {figures['devices']}, mesh {mesh}"
    yield ""
    yield from _costs(figures)
    yield ""
    for name, told in _measured(figures):
        yield f"  {name:<28}{told}"
    yield ""


def _costs(figures: dict) -> Iterator[str]:
    """One line for each part of a step, and one for all."""
    yield f"  {'a step':<21}{'forward':>10}{'backward':>10}{'padding':>9}{'bytes':>10}{'floor':>11}"
    for name, part in figures["parts"].items():
        if not part["bytes"]:
            continue  # no layer is frozen, say
        lost = figures["padding"].get(name)
        yield _row(name, part, "" if lost is None else f"{lost:.1%}")
    names = next(iter(figures["parts"].values()))
    whole = {name: sum(part[name] for part in figures["parts"].values()) for name in names}
    yield _row("all", whole, f"{figures['padding']['step']:.1%}")


def _row(name: str, part: dict, lost: str) -> str:
    forward, backward = (_si(part[f"{which}_operations"], "op") for which in ("forward", "backward"))
    return (
        f"  {name:<21}{forward:>10}{backward:>10}{lost:>9}{_si(part['bytes'], 'B'):>10}"
        f"{_milliseconds(part['floor_seconds']):>11}"
    )


def _measured(figures: dict) -> Iterator[tuple[str, str]]:
    """What was measured, and how it compares with the floor."""
    matrix, memory = figures["matrix_rate"], figures["bandwidth"]
    yield "matrix products", f"{_si(matrix['per_second'], 'op/s')} a device ({matrix['origin']})"
    yield "memory", f"{_si(memory['per_second'], 'B/s')} a device ({memory['origin']})"
    step, loaded, encoders = figures["step"], figures["with_loader"], figures["encoders"]
    yield "step, batches on the device", _spread(step)
    yield "  of the matrix rate", f"{step['mfu']:.1%} (model FLOP utilisation)"
    yield "  of the floor", f"{step['floor_share']:.1%} ({_milliseconds(step['floor_seconds'])})"
    yield "encoders alone", f"{_milliseconds(encoders['seconds'])}, {encoders['mfu']:.1%} of the matrix rate"
    yield "step, with the loader", f"{_spread(loaded)}, {loaded['data_wait_share']:.1%} of it waiting for data"
    dispatch, making = _milliseconds(figures["dispatch_seconds"]), _milliseconds(figures["batch_seconds"])
    yield "host", f"{dispatch} to start a step; {making} to make a batch, in a thread of its own"
    if collectives := figures["collectives"]:
        yield "collectives", _sent(collectives)
    compilation = figures["compilation"]
    yield "compilation", f"{compilation['seconds']:.1f} s, first step {compilation['first_step']:.1f} s; none after it"
    rates = (f"{amount / loaded['median']:,.0f} {name}/s" for name, amount in figures["amounts"].items())
    yield "speed", ", ".join(rates).replace("_", " ")
    run = figures["run"]
    total = f"{run['steps']:,} steps x {loaded['median']:.3g} s = {duration(run['seconds'])}"
    yield "the whole run", f"{total}, without evaluations"


def _sent(collectives: dict) -> str:
    sent, link = _si(collectives["bytes_sent"], "B"), collectives["link"]
    return (
        f"{_milliseconds(collectives['seconds'])} if nothing else went on: {collectives['number']} a step, in which a "
        f"device sends {sent} at {_si(link['per_second'], 'B/s')} ({link['origin']})"
    )


def _spread(times: dict) -> str:
    low, high = _milliseconds(times["p10"]), _milliseconds(times["p90"])
    return f"{_milliseconds(times['median'])} (10% to 90%: {low} to {high})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _si(amount: float, unit: str) -> str:
    """Three digits and a prefix: "12.3 Gop"."""
    for size, prefix in _PREFIXES:
        if amount >= size:
            return f"{amount / size:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}"
