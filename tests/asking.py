"""What the tests of the stage `request` share: a config, units, a journal, and the stage itself."""

import contextlib
import threading
import time

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.money import Prices
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request import live as request
from nuner_jax.annotate.request.endpoints import LiveEndpoint
from nuner_jax.annotate.units import Unit, Usage
from nuner_jax.config import annotate_schema
from nuner_jax.writers import Console

KEY = "sk-test-0123456789-secret"


def make_config(server=None, **given):
    config = annotate_schema.annotate()
    config.endpoint.update(model="fake-model", key_variable="REQUEST_TEST_KEY", max_tokens=64)
    if server is not None:
        config.endpoint.base_url = server.base_url
    # Whole picodollars per token, so that sums of tokens and of costs are equal.
    config.price.update(input=1.0, cached=0.5, output=2.0)
    config.request.update(backoff=0.01, timeout=20.0, pilot=0)
    for key, value in given.items():
        section = "prompt" if key == "units_per_request" else "request"
        config[section][key] = value
    return config


def make_units(count, first=0):
    return [
        Unit.of(f"Anna Berg number {n} came to Lisbon by train, and wrote about harbours.", f"made:{n}")
        for n in range(first, first + count)
    ]


class Lines(Console):
    """A console that keeps what it is told."""

    def __init__(self):
        super().__init__(active=True)
        self.lines = []
        self.shown = []

    def say(self, line=""):
        self.lines.append(line)

    def progress(self, line, final):
        self.shown.append(line)


@contextlib.contextmanager
def opened(tmp_path, count):
    with Journal.open(tmp_path / "journal.sqlite", {}) as journal:
        journal.set_units(make_units(count), f"{count} units")
        yield journal


def ask(config, journal, endpoint=None, **more):
    return request.run(
        config,
        journal,
        Prompt.make(config.prompt),
        endpoint or LiveEndpoint(config),
        console=more.pop("console", Console(active=False)),
        **more,
    )


def cost_of(config, bill):
    return Prices.make(config).of(Usage(bill.prompt, bill.completion, bill.cached))


def once_each(server):
    return set(server.answered().values()) <= {1}


def after_requests(server, count, act, *arguments):
    """Calls `act` from another thread when the server has had so many requests."""

    def watch():
        while server.requests < count:
            time.sleep(0.002)
        act(*arguments)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
