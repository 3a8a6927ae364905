"""The figures of compiled steps as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_HELD = ("parameters", "optimizer", "batch", "temporaries", "program")


def lines(figures: dict) -> Iterator[str]:
    """A topology: what it is, memory, operations, bytes and collectives."""
    devices, memory, operations = figures["devices"], figures["memory"], figures["operations"]
    yield ""
    yield f"{figures['topology']}: {devices['number']} x {devices['kind']}, mesh {figures['mesh']}"
    text, concepts = figures["batch"]["tokens"], figures["batch"].get("concept_tokens")
    more = f", concept names {_shape(concepts)}, {figures['batch']['concept_ids'][-1]} a row" if concepts else ""
    yield f"batch: text {_shape(text)}{more} (micro-batches x rows x tokens, over all devices)"
    yield "memory of a device, GB"
    for name in _HELD:
        if memory.get(name) is not None:
            yield f"  {name:<24}{_number(memory[name] / 1e9):>10}"
    limit = f" of {memory['limit'] / 1e9:.1f}" if memory["limit"] else ""
    verdict = "" if memory["fits"] else ": does not fit"
    yield f"  {'all, at the peak':<24}{_gigabytes(memory['peak']):>10}{limit}{verdict}"
    if "refused" in memory:
        yield f"  the compiler said: {memory['refused']}"
    yield "operations of a step (1e12), all devices together, counted from the model"
    for name, number in operations["parts"].items():
        yield f"  {name:<24}{_number(number / 1e12):>10}"
    yield f"  {'all':<24}{_number(operations['model'] / 1e12):>10}"
    if "compiled" not in operations:
        return
    yield (
        f"of the compiled program, a device (the body of a loop once): {_number(operations['compiled'] / 1e12)}e12 "
        f"operations, {_number(figures['bytes_accessed'] / 1e9)} GB read and written"
    )
    yield "collectives of a step, on each device        number     arrays, MB       sent, MB"
    for row in figures["collectives"]:
        name = f"  {row['kind']} of {row['of']}"
        yield f"{name:<42}{row['number']:>9,}{_number(row['bytes'] / 1e6):>15}{_number(row['sent'] / 1e6):>15}"
    if not figures["collectives"]:
        yield "  none"


def memory_line(memory: dict) -> str:
    """What a step needs of a device's memory, what there is, and what takes it."""
    limit = f" of {memory['limit'] / 1e9:.1f}" if memory["limit"] else ""
    parts = ", ".join(f"{name} {memory[name] / 1e9:.2f}" for name in _HELD if memory.get(name) is not None)
    return f"memory of a device: a step needs {_gigabytes(memory['peak'])}{limit} GB ({parts})"


def advice_line(advice: dict) -> str:
    """What a change of the config does to the memory."""
    changes = " ".join(f"--config.{key}={value}" for key, value in advice["changes"].items())
    return f"  {changes}: {_gigabytes(advice['peak'])} GB, {'fits' if advice['fits'] else 'does not fit'}"


def growth_lines(figures: Sequence[dict]) -> Iterator[str]:
    """Collectives side by side: which of them carry more, on each device, the more devices there are."""
    tables = [{(row["kind"], row["of"]): row for row in one["collectives"]} for one in figures]
    yield ""
    yield "Collectives of a step on each device: number, and MB of arrays. Rows for each device are the same."
    yield f"{'devices':<42}" + "".join(f"{one['devices']['number']:>18,}" for one in figures)
    for key in sorted(set().union(*tables)):
        cells = [table.get(key, {"number": 0, "bytes": 0}) for table in tables]
        shown = "".join(f"{cell['number']:>6,}{_number(cell['bytes'] / 1e6):>12}" for cell in cells)
        yield f"{'  ' + ' of '.join(key):<42}{shown}{'  grows' if grows(cells) else ''}"


def grows(cells: Sequence[dict]) -> bool:
    """Whether the last topology's devices carry more than the first one's."""
    return cells[-1]["bytes"] > cells[0]["bytes"]


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(f"{size:,}" for size in sizes)


def _gigabytes(size: float | None) -> str:
    return "unknown" if size is None else _number(size / 1e9)


def _number(value: float) -> str:
    """Four digits, of which none is after a whole number's."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
