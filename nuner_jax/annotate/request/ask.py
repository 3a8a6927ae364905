"""Asking for all that a journal has no answer to, of whichever endpoint the config names, in either way."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request import batch, live
from nuner_jax.annotate.request.endpoints import Endpoint, LiveEndpoint, ReplayEndpoint
from nuner_jax.annotate.request.work import Summary
from nuner_jax.data.importers import resolve_inputs
from nuner_jax.writers import Console


def ask(config: ConfigDict, journal: Journal, prompt: Prompt, console: Console, *, pilot_only: bool = False) -> Summary:
    """Asks live or in batches, as config.endpoint.kind says; see `live.run` and `batch.run`."""
    if config.endpoint.kind == "batch":
        return batch.run(config, journal, prompt, console=console, pilot_only=pilot_only)
    return live.run(config, journal, prompt, make_endpoint(config), console=console, pilot_only=pilot_only)


def make_endpoint(config: ConfigDict) -> Endpoint:
    """The endpoint of a config, not yet connected."""
    return ReplayEndpoint(config.endpoint.replay) if config.endpoint.kind == "replay" else LiveEndpoint(config)


def check_endpoint(config: ConfigDict) -> None:
    """Looks whether it can be used; raises as `Endpoint.check`."""

    async def check() -> None:
        endpoint = make_endpoint(config)
        try:
            await endpoint.check()
        finally:
            await endpoint.close()

    asyncio.run(check())


def identity(config: ConfigDict, prompt: Prompt) -> dict[str, Any]:
    """All that an answer depends on besides its text: a journal holds answers of one identity only."""
    if config.endpoint.kind == "replay":
        digest = hashlib.sha256()
        for path in resolve_inputs([config.endpoint.replay]):
            digest.update(path.read_bytes())
        return {"replay": digest.hexdigest()}
    keys = ("model", "temperature", "top_p", "max_tokens", "extra")
    return {**{key: config.endpoint[key] for key in keys}, **prompt.identity()}
