"""The roll-call of a run of several processes, before JAX joins them: is each there, and do they agree.

JAX ends a process from inside its library where another one is missing, and names nobody. So they meet here first, at
the address where process 0 will then serve JAX: each sends a line of JSON, who it is and what it has; process 0
compares, and sends all the same verdict. Nothing of it stays open.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nuner_jax.errors import NunerError

_GREETING = "nuner_jax roll-call, 1"  # strangers (a scan of ports, another program) do not say it
_LONGEST_LINE = 2**24  # bytes
_RETRY_SECONDS = 0.2
_SLOW_SECONDS = 10.0  # of the network and of busy machines, beyond the time that the user gives
_SHOWN = 8  # differences; one wrong file or flag seldom makes more


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of the run.

    process, processes: its number, and how many it believes there are.
    host: its machine, for messages.
    facts: what must be the same on every process, as it is shown: name -> value.
    """

    process: int
    processes: int
    host: str
    facts: Mapping[str, str]


def meet(address: str, member: Member, seconds: float) -> None:
    """Returns on every process once all are there and agree; process 0 calls the roll, the others answer.

    Args:
      address: "host:port" of process 0, where the port is free.
      member: this process.
      seconds: how long process 0 waits for the others, and these for it.

    Raises:
      NunerError: a process is missing, or two have one number, or some differ: by name, the same on all that are there.
    """
    host, _, port = address.rpartition(":")
    if member.process == 0:
        verdict = asyncio.run(_call(address, int(port), member, seconds))
    else:
        verdict = asyncio.run(_answer(address, host.strip("[]"), int(port), member, seconds))
    if verdict:
        raise NunerError(verdict)


async def _call(address: str, port: int, own: Member, seconds: float) -> str:
    """Process 0: waits for all, and sends the verdict; empty: all is well."""
    arrived, answering = {own.process: own}, set()
    verdict = asyncio.get_running_loop().create_future()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            member = await _read_member(reader)
            if member is None or verdict.done():
                return
            answering.add(asyncio.current_task())
            if wrong := _misfit(member, arrived):
                verdict.set_result(wrong)
            else:
                arrived[member.process] = member
                if len(arrived) == own.processes:
                    verdict.set_result(_differences(arrived.values()))
            gone = asyncio.ensure_future(_hung_up(reader))
            await asyncio.wait([gone, verdict], return_when=asyncio.FIRST_COMPLETED)
            if verdict.done():
                writer.write(json.dumps({"greeting": _GREETING, "verdict": verdict.result()}).encode() + b"\n")
                await gone  # the other side hangs up first, so that the port is free for JAX at once
            else:
                del arrived[member.process]  # it has ended, and may come again

    try:
        server = await asyncio.start_server(greet, None, port, limit=_LONGEST_LINE)
    except OSError as error:
        reason = "another program has the port" if error.errno == errno.EADDRINUSE else error.strerror
        return f"process 0 cannot listen at {address} (--coordinator): {reason}; choose another port"
    if own.processes == 1:
        verdict.set_result("")
    await asyncio.wait([verdict], timeout=seconds)
    if not verdict.done():
        verdict.set_result(_missing(address, arrived, own.processes, seconds))
    server.close()
    if answering:
        await asyncio.wait(answering, timeout=_SLOW_SECONDS)
    return verdict.result()


async def _hung_up(reader: asyncio.StreamReader) -> None:
    """Returns when the other side has closed the connection, or lost it."""
    with contextlib.suppress(OSError):
        await reader.read()


async def _read_member(reader: asyncio.StreamReader) -> Member | None:
    """Who has connected; None: a stranger."""
    said = _parse(await _read_line(reader, _SLOW_SECONDS))
    return Member(**said["member"]) if said else None


async def _answer(address: str, host: str, port: int, own: Member, seconds: float) -> str:
    """Any other process: tells process 0 what it is, as soon as that is there, and waits for the verdict."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    line = json.dumps({"greeting": _GREETING, "member": dataclasses.asdict(own)}).encode() + b"\n"
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                reader, writer = await asyncio.open_connection(host, port, limit=_LONGEST_LINE)
            with contextlib.closing(writer):
                writer.write(line)
                said = _parse(await _read_line(reader, seconds + _SLOW_SECONDS))
            if said:
                return said["verdict"]
            reason = "what answers there is not process 0 of this run, or has ended"
        except OSError as error:  # TimeoutError is one
            reason = error.strerror or str(error) or "no answer"
        if loop.time() + _RETRY_SECONDS > deadline:
            return (
                f"process {own.process} on {own.host} cannot reach process 0 at {address} (--coordinator) within "
                f"{seconds:g} s (--join_timeout): {reason}; start process 0 on that host, and see that no firewall "
                "keeps the port from the others"
            )
        await asyncio.sleep(_RETRY_SECONDS)


async def _read_line(reader: asyncio.StreamReader, seconds: float) -> bytes:
    """The next line; empty if none comes in time, or one that is too long."""
    try:
        async with asyncio.timeout(seconds):
            return await reader.readline()
    except (OSError, ValueError):
        return b""


def _parse(line: bytes) -> dict | None:
    """What a line of the roll-call says; None: it is none."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) and said.get("greeting") == _GREETING else None


def _misfit(member: Member, arrived: Mapping[int, Member]) -> str:
    """What is wrong with the number of a process that has come, if anything."""
    number, own = member.process, arrived[0]
    if number in arrived:
        return (
            f"two processes have the number {number} (--process_id), on {arrived[number].host} and on {member.host}: "
            f"give each its own, from 0 to {own.processes - 1}"
        )
    if number >= own.processes:
        return (
            f"process {number} on {member.host} belongs to {member.processes} processes (--num_processes), and process "
            f"0 on {own.host} to {own.processes}: give all the same number"
        )
    return ""


def _missing(address: str, arrived: Mapping[int, Member], processes: int, seconds: float) -> str:
    """Who has not come."""
    absent = [number for number in range(processes) if number not in arrived]
    there = ", ".join(f"{number} on {arrived[number].host}" for number in sorted(arrived)[:_SHOWN])
    there += f" and {len(arrived) - _SHOWN} more" if len(arrived) > _SHOWN else ""
    return (
        f"{named(absent)} of {processes} did not join at {address} (--coordinator) within {seconds:g} s "
        f"(--join_timeout); there: {there}. Start the same command on every host, each with its own --process_id, and "
        "see that no firewall keeps that port from them"
    )


def _differences(members: Iterable[Member]) -> str:
    """Which facts differ, with the processes of every value; empty: none does."""
    by_number = {member.process: member for member in sorted(members, key=lambda member: member.process)}
    facts = {number: {"--num_processes": str(one.processes), **one.facts} for number, one in by_number.items()}
    found = []
    for name in dict.fromkeys(name for one in facts.values() for name in one):
        values = {number: one.get(name, "missing") for number, one in facts.items()}
        if len(set(values.values())) > 1:
            found.append(f"{name}: {by_value(values)}")
    if not found:
        return ""
    shown = "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else "")
    return (
        f"the processes of a run must be alike, and differ: {shown}. Give every host the same command, code and "
        "installation"
    )


def by_value(values: Mapping[int, str]) -> str:
    """Which processes have which value: the commonest value first."""
    counted = Counter(values.values()).most_common()
    return ", ".join(
        f"{value} ({named([number for number, one in values.items() if one == value])})" for value, _ in counted
    )


def named(numbers: Sequence[int]) -> str:
    """As it is said: "process 3", or "processes 1, 2, 5"; of many the first."""
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (
        f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    )
    return f"process{'es' if len(numbers) > 1 else ''} {shown}"
