"""What the tests of the Batch API share: a config, the stage itself, and processes that run it."""

import itertools
import os
import pathlib
import subprocess
import sys
import time

from fake_answers import completion_of, recorded
from fake_openai import Bill

from nuner_jax import config as config_lib
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request import batch
from nuner_jax.annotate.units import Unit
from nuner_jax.writers import Console

KEY = "sk-batch-0123456789-secret"
TESTS = pathlib.Path(__file__).parent


def make_config(base_url, **changes):
    config = config_lib.annotate()
    config.endpoint.update(kind="batch", base_url=base_url, model="fake-model", key_variable="NUNER_TEST_KEY")
    config.request.update(backoff=0.01, pilot=0, timeout=20.0)
    config.price.update(input=0.15, output=0.6)
    config.batch.update(requests=40, poll=0.01)
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def open_journal(config, workdir, units) -> Journal:
    journal = Journal.open(workdir / "journal.sqlite", {"model": config.endpoint.model})
    texts = itertools.islice(recorded(), units)
    journal.set_units((Unit.of(text, f"sample:{at}") for at, text in enumerate(texts, start=1)), str(units))
    return journal


def annotate(base_url, workdir, units, *, console=None, pilot_only=False, **changes):
    """One start; returns its summary and what the journal then holds of every unit."""
    config = make_config(base_url, **changes)
    with open_journal(config, workdir, units) as journal:
        summary = batch.run(
            config, journal, Prompt.make(config.prompt), console=console or Console(False), pilot_only=pilot_only
        )
        return summary, list(journal.completions())


def totals_of(workdir):
    with Journal.open(workdir / "journal.sqlite", read_only=True) as journal:
        return journal.totals()


def price(bill: Bill) -> int:
    """Picodollars of a bill at the prices of `make_config`, at half of them as is usual for batches."""
    return (bill.prompt * 150_000 + bill.completion * 600_000) // 2


def assert_all_done_once(fake, completed, units):
    assert len(completed) == units
    assert {row.state for row in completed} == {"done"}
    assert all(row.completion == completion_of(row.text) for row in completed)
    assert set(fake.answered().values()) == {1}


class Lines(Console):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(False)
        self.lines = []

    def say(self, line=""):
        self.lines.append(line)


SCRIPT = """
import os, pathlib, signal, sys
import batching
from nuner_jax.annotate.request import batch
from nuner_jax.annotate.journal.journal import Journal
base_url, workdir, units, ends, price = sys.argv[1:]
if int(ends):
    batch.PAGE, real, calls = 7, Journal.finish_many, []
    def finish_many(self, chunk):
        real(self, chunk)
        calls.append(1)
        if len(calls) == int(ends):
            os.kill(os.getpid(), signal.SIGKILL)
    Journal.finish_many = finish_many
changes = {"price__input": None, "price__output": None} if price == "none" else {}
batching.annotate(base_url, pathlib.Path(workdir), int(units), console=batch.Console(True), **changes)
"""


def start(fake, workdir, units, ends=0, price="known") -> subprocess.Popen:
    """A process that annotates; with `ends`, it kills itself after writing so many pages of results.

    price: "none" for a config without prices.
    """
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, fake.base_url, str(workdir), str(units), str(ends), price],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_polled(fake, process, times):
    """Returns when the endpoint was asked so often how a batch is."""
    while fake.batches.events.count("poll") < times:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def kill_in_flight(fake, process):
    """Kills a process that has submitted its batches."""
    try:
        until_polled(fake, process, 2)
    finally:
        process.kill()
        process.communicate(timeout=30)
