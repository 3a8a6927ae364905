"""What annotation costs on the client's side: completions per second, and memory.

    python tests/benchmarks/annotate_client.py [--units=4000] [--runs=3] [--concurrency=64]

asks a local server (a process of its own, which answers at once) for the same completions in two ways, by turns: with
the bare client of the package openai, and with all of the stage `request` (journal on disk, budget, throttle). It
prints the median of each, their ratio, and a line of JSON. --memory instead sends --units=200000 through the stage
against a server of a few lines, and prints the resident memory at 10%, 50% and 100%.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ml_collections import ConfigDict  # noqa: E402

from nuner_jax.annotate.journal.journal import Journal  # noqa: E402
from nuner_jax.annotate.prompts import Prompt, request_body  # noqa: E402
from nuner_jax.annotate.request import live  # noqa: E402
from nuner_jax.annotate.request.endpoints import LiveEndpoint  # noqa: E402
from nuner_jax.annotate.units import Unit  # noqa: E402
from nuner_jax.config import annotate_schema  # noqa: E402
from nuner_jax.writers import Console  # noqa: E402

KEY_VARIABLE = "BENCHMARK_KEY"
KEY = "test-key"  # the one that the server takes


def main() -> None:
    """Measures, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    os.environ[KEY_VARIABLE] = KEY
    if options.memory:
        measure_memory(options.units or 200_000, options.concurrency)
    else:
        measure_speed(options.units or 4000, options.runs, options.concurrency)


def measure_speed(count: int, runs: int, concurrency: int) -> None:
    """Completions per second of the bare client and of the stage, by turns."""
    bare, stage = [], []
    with server(ROOT / "tests" / "fake_openai.py", "--port=0") as base_url:
        config = make_config(base_url, concurrency)
        asyncio.run(ask_bare(config, 500))  # warm both sides up
        for _ in range(runs):
            began = time.perf_counter()
            asyncio.run(ask_bare(config, count))
            bare.append(count / (time.perf_counter() - began))
            stage.append(count / ask_all(config, count))
            print(f"bare client {bare[-1]:,.0f}/s, whole stage {stage[-1]:,.0f}/s", flush=True)
    result = {
        "units": count,
        "concurrency": concurrency,
        "bare_per_s": round(statistics.median(bare)),
        "stage_per_s": round(statistics.median(stage)),
    }
    result["ratio"] = round(result["stage_per_s"] / result["bare_per_s"], 3)
    print(
        f"medians of {runs}: bare client {result['bare_per_s']:,}/s, whole stage {result['stage_per_s']:,}/s, "
        f"ratio {result['ratio']}"
    )
    print(json.dumps(result))


async def ask_bare(config: ConfigDict, count: int) -> None:
    """The loop that one would write with the client alone: no journal, no budget, no retries."""
    import openai

    prompt = Prompt.make(config.prompt)
    units = iter(make_units(count))

    async def worker(client: openai.AsyncOpenAI) -> None:
        for unit in units:
            body = request_body(config.endpoint, prompt, [unit.text])
            response = await client.chat.completions.with_raw_response.create(**body)
            assert json.loads(response.text)["choices"]

    async with openai.AsyncOpenAI(base_url=config.endpoint.base_url, api_key=KEY, max_retries=0) as client:
        await asyncio.gather(*(worker(client) for _ in range(config.request.max_concurrency)))


def ask_all(config: ConfigDict, count: int) -> float:
    """Seconds of the stage for so many units, in a journal of their own; the selection is there before."""
    with tempfile.TemporaryDirectory() as folder, Journal.open(pathlib.Path(folder) / "journal.sqlite", {}) as journal:
        journal.set_units(make_units(count), "benchmark")
        began = time.perf_counter()
        summary = live.run(
            config, journal, Prompt.make(config.prompt), LiveEndpoint(config), console=Console(active=False)
        )
        seconds = time.perf_counter() - began
        assert summary.totals.done == count, summary
        return seconds


def measure_memory(count: int, concurrency: int) -> None:
    """Resident memory while the stage works through many units."""
    rss: dict[int, float] = {}

    class Watch(Console):
        def progress(self, line: str, final: bool) -> None:
            ended = journal.totals().done
            for percent in (10, 50, 100):
                if ended * 100 >= percent * count and percent not in rss:
                    rss[percent] = resident_mib()
                    print(f"{percent:3d}%  {rss[percent]:6.1f} MiB  {line}", flush=True)

    with (
        server(ROOT / "tests" / "benchmarks" / "instant_server.py") as base_url,
        tempfile.TemporaryDirectory() as folder,
        Journal.open(pathlib.Path(folder) / "journal.sqlite", {}) as journal,
    ):
        config = make_config(base_url, concurrency)
        config.request.pilot = 0
        journal.set_units(make_units(count), "benchmark")
        print(f"  0%  {resident_mib():6.1f} MiB", flush=True)
        began = time.perf_counter()
        live.run(config, journal, Prompt.make(config.prompt), LiveEndpoint(config), console=Watch(active=True))
        seconds = time.perf_counter() - began
    result = {"units": count, "per_s": round(count / seconds)} | {f"mib_{key}": round(rss[key], 1) for key in rss}
    print(json.dumps(result))


def make_config(base_url: str, concurrency: int) -> ConfigDict:
    """A config with a cap, so that money is counted."""
    config = annotate_schema.annotate()
    config.endpoint.update(base_url=base_url, model="fake-model", key_variable=KEY_VARIABLE)
    config.price.update(input=0.15, output=0.6)
    config.request.update(max_concurrency=concurrency, budget=1e6)
    return config


def make_units(count: int) -> Iterator[Unit]:
    """Different sentences of 150 characters."""
    for number in range(count):
        yield Unit.of(
            f"Divers from station {number} recorded a bloom of the salp Thalia democratica off Brittany in late May, "
            "the densest seen there since sampling began.",
            f"benchmark:{number}",
        )


def resident_mib() -> float:
    """Resident memory of this process now, in MiB (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def server(script: pathlib.Path, *arguments: str) -> Iterator[str]:
    """A server in a process of its own, which prints its address first."""
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
