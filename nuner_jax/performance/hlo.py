"""What a compiled program says of itself: the collectives in its text, how often each runs, and how much it sends.

The text is XLA's optimised HLO of one device's program (`compiled.as_text()`), as CPU, GPU and TPU give it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_DTYPE_BITS = {
    "pred": 8,
    "bf16": 16,
    **{f"{kind}{bits}": bits for kind in "sufc" for bits in (2, 4, 8, 16, 32, 64, 128)},
}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_OPERATION = re.compile(rf" = (?P<type>.*?)\)? (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NUMBER = re.compile(r" [su](?:32|64)\[\]\S* constant\((\d+)\)")
_PLACE = re.compile(r" get-tuple-element\(.*?\), index=(\d+)")
_NAMED = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_SUM = re.compile(r" add\(%?([\w.-]+), %?([\w.-]+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation in which devices send to each other.

    kind: one of `KINDS`. group: devices that take part with one another. times: runs per step, loops counted.
    arrays: (dtype, shape) of the whole arrays: what a gather ends with, what a reduction begins with.
    origin: the operation of the source that it comes from, as JAX names it; of a combined one, that of the first.
    """

    kind: str
    group: int
    times: int
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    origin: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each of the arrays."""
        return tuple(math.prod(shape) * _DTYPE_BITS[dtype] // 8 for dtype, shape in self.arrays)

    @property
    def sent_share(self) -> float:
        """What one device sends, as a share of the arrays, in the ring algorithm."""
        others = (self.group - 1) / self.group
        return {"all-reduce": 2 * others, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, others)


def collectives(text: str) -> list[Collective]:
    """All collectives of a program, those among a single device left out.

    A collective that the compiler spread over several places (started here, carried on by each round of a loop beside
    it, waited for there) counts once. Where a loop's number of rounds is not in the text, its body counts once.
    """
    computations, entry = _computations(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    times = _runs(computations, entry)
    found: dict[tuple, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            match = _OPERATION.search(line)
            if not match or not times[name]:
                continue
            one = _collective(line, match, devices, times[name])
            key = (len(found),)
            if "async_collective_fusion_config" in line:  # a TPU's: spread over the computations that it runs beside
                channel = re.search(r"channel_id=(\d+)", line)
                key = (channel and channel[1], one.kind, one.arrays, one.origin)
            if one.group > 1 and (key not in found or one.times < found[key].times):
                found[key] = one
    return list(found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, by name, and the name of the one that is the program."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match["name"], [])
            entry = match["name"] if match["entry"] else entry
        else:
            current.append(line)
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in a run of the program."""
    callers = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            for called, rounds in _calls(line, computations):
                callers[called].append((name, rounds))
    times = {entry: 1}

    def count(name: str) -> int:
        if name not in times:
            times[name] = sum(rounds * count(caller) for caller, rounds in callers[name])
        return times[name]

    return {name: count(name) for name in computations}


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation, how often) that an instruction runs."""
    if match := _WHILE.search(line):
        condition, body = match.groups()
        yield body, _rounds(line, computations.get(condition, ()), computations.get(body, ()))
        return
    for called in _CALLED.findall(line):
        yield called, 1
    for branches in _BRANCHES.findall(line):
        for called in branches.split(","):
            yield called.strip().lstrip("%"), 1


def _rounds(line: str, condition: Sequence[str], body: Sequence[str]) -> int:
    """Rounds of a loop: as the compiler notes them, else up to the one number that its condition compares to."""
    if match := _TRIPS.search(line):
        return int(match[1])
    bounds = {int(match[1]) for other in condition if (match := _NUMBER.search(other))}
    return max(1, bounds.pop() // _step(condition, body)) if len(bounds) == 1 else 1


def _step(condition: Sequence[str], body: Sequence[str]) -> int:
    """What a round adds to the counter that the condition reads: more than 1 where the compiler unrolled the loop."""
    places = {int(match[1]) for line in condition if (match := _PLACE.search(line))}
    lines = {match[1]: line for line in body if (match := _NAMED.match(line))}
    results = [re.findall(r"%([\w.-]+)", line.partition(" tuple(")[2]) for line in body if " ROOT " in line]
    if len(places) != 1 or len(results) != 1:
        return 1
    (place,), (result,) = places, results
    counter = _SUM.search(lines.get(result[place], "")) if place < len(result) else None
    terms = [lines.get(name, "") for name in counter.groups()] if counter else ()
    return max([1, *(int(match[1]) for term in terms if (match := _NUMBER.search(term)))])


def _collective(line: str, match: re.Match, devices: int, times: int) -> Collective:
    kind, group = match["kind"], _group_size(line, devices)
    arrays = [
        (dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(match["type"])
        if dtype in _DTYPE_BITS
    ]
    if match["start"] and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]  # a started one shows its operands, and then its results
    elif match["start"] and kind == "collective-permute":
        arrays = arrays[:1]  # operand, result and two numbers of its own
    elif kind == "reduce-scatter":  # shows what is left of the sum on one device
        arrays = [(dtype, (group, *shape)) for dtype, shape in arrays]
    origin = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, group, times, tuple(arrays), origin[1] if origin else "")


def _group_size(line: str, devices: int) -> int:
    """Devices that take part with one another, in any of the notations for groups."""
    if "source_target_pairs={" in line:
        return devices
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):  # number of groups, size of each
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):  # sizes of axes, those that take part
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])  # an axis, or a part of it of this size
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    match = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(match[1].split(",")) if match and match[1] else devices
