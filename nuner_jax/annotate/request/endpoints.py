"""Who is asked: an OpenAI-compatible server, or a file of recorded completions."""

from __future__ import annotations

import asyncio
import difflib
import itertools
import json
import os
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from nuner_jax.annotate.request.answers import (
    EndpointFault,
    EndpointStop,
    MalformedAnswer,
    error_within,
    json_or_text,
    message_of,
    read_answer,
    status_error,
)
from nuner_jax.annotate.units import Answer, Usage
from nuner_jax.data.importers import resolve_inputs
from nuner_jax.data.importers.rows import MalformedRow, read_rows
from nuner_jax.errors import NunerError

CHECK_TIMEOUT = 30.0  # seconds for the list of models, at most
NO_KEY = "no-key"  # sent to servers without keys: the client insists on one
# Shorter than the 5 seconds after which common servers close an idle connection, maybe just as it is used again.
_KEEPALIVE = 4.0
# A client looks at each of its idle connections before each request; with many, that takes longer than all else.
CLIENT_SHARE = 8  # requests in flight per client
_MODELS_SHOWN = 8


class Endpoint(Protocol):
    """Whoever answers requests."""

    name: str

    async def check(self) -> None:
        """Looks, before any work, whether requests can be answered; `NunerError` if not."""

    async def ask(self, body: Mapping[str, Any], texts: Sequence[str]) -> tuple[Answer, Mapping[str, str]]:
        """The answer to the request `body` about `texts`, and its HTTP headers.

        Raises:
          EndpointFault: no answer this time.
          EndpointStop: no answer to whatever is asked.
        """

    async def close(self) -> None:
        """Lets go of connections."""


def api_key(endpoint: ConfigDict) -> str:
    """The key in the environment variable that `config.endpoint` names; `NO_KEY` if it names none.

    Raises:
      NunerError: the variable is not set, or holds what cannot be a key.
    """
    if not endpoint.key_variable:
        return NO_KEY
    key = os.environ.get(endpoint.key_variable, "").strip()
    if not key:
        raise NunerError(
            f"the environment variable {endpoint.key_variable} is not set; put the key of {endpoint.base_url} there "
            f'(export {endpoint.key_variable}=…), or set config.endpoint.key_variable to "" for a server without keys'
        )
    if not (key.isascii() and key.isprintable()):
        raise NunerError(
            f"the environment variable {endpoint.key_variable} holds line breaks or characters that no key has"
        )
    return key


def without_key(text: str, key: str) -> str:
    """The text with the key blotted out, because servers like to quote it in their errors.

    Of the whole text: when it has been shortened, a part of the key may be left that nothing finds.
    """
    if key == NO_KEY:
        return text
    return text.replace(key, "[key]").replace(key.replace("/", "\\/"), "[key]")  # the second as some write JSON


def client_options(config: ConfigDict) -> dict[str, Any]:
    """How the package's clients are made for `config.endpoint`: with our address and key, whatever the environment has.

    Raises:
      NunerError: the address is none, or holds what is secret; there is no key.
    """
    base_url = _checked_url(config.endpoint.base_url)
    key = api_key(config.endpoint)
    return {
        "base_url": base_url,
        "api_key": key,
        "default_headers": {"Authorization": f"Bearer {key}"},  # also before one in OPENAI_CUSTOM_HEADERS
        "max_retries": 0,  # the driver retries: it counts and pays for every attempt
        "timeout": config.request.timeout,
    }


class LiveEndpoint:
    """An OpenAI-compatible server, asked one request at a time each; `check` comes first."""

    def __init__(self, config: ConfigDict):
        """A server that is not looked for yet."""
        self.name = f"{config.endpoint.model} at {config.endpoint.base_url}"
        self._config = config
        self._timeout = config.request.timeout
        self._key = NO_KEY
        self._clients: list[Any] = []
        self._turns: Iterator[Any] = iter(())

    async def check(self) -> None:
        """The server answers, takes the key, and knows the model if it lists its models.

        Raises:
          NunerError: one of these is not so; or there is no key, or no package openai.
        """
        self._connect()
        import openai

        model, base_url = self._config.endpoint.model, self._config.endpoint.base_url
        try:
            async with asyncio.timeout(min(self._timeout, CHECK_TIMEOUT)):
                response = await self._clients[0].models.with_raw_response.list()
        except openai.APIStatusError as error:
            if error.status_code == 401:
                raise self._status_error(error) from None
            return  # no such list here, or not for this key, or not now: the first requests will tell
        except (openai.APIConnectionError, TimeoutError) as error:
            raise NunerError(
                f"{base_url} cannot be reached ({_cause(error)}): correct config.endpoint.base_url, or start the "
                f"server there, for instance with `vllm serve {model}`, `ollama serve` or `llama-server -m FILE.gguf`"
            ) from None
        models = _model_names(response.content)
        if models and not any(_is_model(model, name) for name in models):
            nearest = difflib.get_close_matches(model, models, n=_MODELS_SHOWN, cutoff=0.0)
            more = f" and {len(models) - len(nearest)} more" if len(models) > len(nearest) else ""
            raise NunerError(
                f"{base_url} has no model {model!r} (config.endpoint.model); it has {', '.join(nearest)}{more}"
            )

    async def ask(self, body: Mapping[str, Any], texts: Sequence[str]) -> tuple[Answer, Mapping[str, str]]:
        """See `Endpoint`."""
        import httpx2
        import openai

        try:
            # The client's own timeout is one of each read: a server that trickles would never reach it.
            async with asyncio.timeout(self._timeout):
                # Not `chat.completions.create`, which takes as long to look through the body as to send it.
                response = await next(self._turns).post("/chat/completions", cast_to=httpx2.Response, body=body)
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except (openai.APIConnectionError, TimeoutError) as error:
            raise _connection_fault(error) from None
        content = response.content
        try:
            payload = json.loads(without_key(content.decode(json.detect_encoding(content)), self._key))
        except (ValueError, RecursionError):
            start = message_of(without_key(response.text, self._key)[:80])
            raise EndpointFault("truncated_json", f"{start!r}…", retry=True, billed="unknown") from None
        if error := error_within(payload, self._config.endpoint):
            raise error
        try:
            return read_answer(payload), response.headers
        except MalformedAnswer as error:
            raise EndpointFault("malformed_answer", str(error), retry=True, billed="unknown") from None

    async def close(self) -> None:
        """Closes all connections."""
        for client in self._clients:
            await client.close()

    def _connect(self) -> None:
        try:
            import httpx2
            import openai
        except ImportError as error:
            raise NunerError(
                f"the package {error.name} is missing; install the extra: pip install 'nuner_jax[annotate]'"
            ) from error
        options = client_options(self._config)
        self._key = options["api_key"]
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEPALIVE)
        try:
            ssl_context = httpx2.create_ssl_context()  # takes longer than all else, so there is one
            self._clients = [
                openai.AsyncOpenAI(
                    **options,
                    http_client=openai.DefaultAsyncHttpxClient(
                        timeout=self._timeout, limits=limits, verify=ssl_context
                    ),
                )
                for _ in range(-(-self._config.request.max_concurrency // CLIENT_SHARE))
            ]
        except (ValueError, OSError) as error:
            raise NunerError(
                f"the environment's settings of connections are wrong ({error}); correct HTTP_PROXY, HTTPS_PROXY, "
                "ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR, whichever is set"
            ) from None
        self._turns = itertools.cycle(self._clients)

    def _status_error(self, error: Any) -> EndpointFault | EndpointStop:
        body = json_or_text(without_key(error.response.text, self._key))
        return status_error(error.status_code, body, error.response.headers, self._config.endpoint)


class ReplayEndpoint:
    """Recorded completions, found by their text; they cost nothing."""

    def __init__(self, replay: str):
        """Recordings that are not read yet.

        Args:
          replay: a file of rows with `text` and `completion` (JSONL, JSON, CSV or parquet, plain or gzip), "sample"
            for the embedded ones, or hf:org/data_set.
        """
        self.name = f"the recorded completions of {replay}"
        self._replay = replay
        self._completions: dict[str, str] = {}

    async def check(self) -> None:
        """Reads the recordings; the first of several of one text counts.

        Raises:
          NunerError: a file is missing or unreadable, or a row is no recording.
        """
        for path in resolve_inputs([self._replay]):
            for number, row in read_rows(path):
                match row:
                    case {"text": str(text), "completion": str(completion)}:
                        self._completions.setdefault(_one_line(text), completion)
                    case MalformedRow():
                        raise NunerError(f"{path}:{number}: not a recorded completion ({row.kind})")
                    case _:
                        raise NunerError(
                            f"{path}:{number}: a recorded completion has the strings text and completion; this row "
                            f"has the keys {', '.join(map(str, row))} (config.endpoint.replay)"
                        )

    async def ask(self, body: Mapping[str, Any], texts: Sequence[str]) -> tuple[Answer, Mapping[str, str]]:
        """The recorded completion of the one text."""
        completion = self._completions.get(_one_line(texts[0]))
        if completion is None:
            raise EndpointFault("not_recorded", retry=False)
        return Answer("", completion, "stop", "", Usage()), {}

    async def close(self) -> None:
        """Nothing is open."""


def _checked_url(base_url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(base_url)
        secret = "@" in parts.netloc or bool(parts.query or parts.fragment)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets, or a port beyond 65535
        sound, secret = False, "@" in base_url
    if secret:
        raise NunerError(
            "config.endpoint.base_url holds a user, a password, or something behind a ? or #, which would be seen in "
            "messages and files; put the key into the environment variable that config.endpoint.key_variable names"
        )
    if not sound:
        raise NunerError(
            f"config.endpoint.base_url = {base_url!r}: not an address; it begins with http:// or https:// and usually "
            "ends with /v1"
        )
    return base_url


def _connection_fault(error: Exception) -> EndpointFault:
    """The fault of a request that met no whole response; it may have been billed unless it was never sent."""
    import httpx2

    if isinstance(error, TimeoutError) or isinstance(error.__cause__, httpx2.ReadTimeout | httpx2.WriteTimeout):
        return EndpointFault("timeout", retry=True, billed="unknown")
    unsent = isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    return EndpointFault(
        "unreachable" if unsent else "connection", _cause(error), retry=True, billed="no" if unsent else "unknown"
    )


def _cause(error: Exception) -> str:
    """What lies under the client's own error, in a few words."""
    cause = error.__cause__ or error
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return message_of(str(cause)) or type(cause).__name__


def _model_names(content: bytes) -> list[str]:
    """The names in a list of models; none if it is something else."""
    try:
        rows = json.loads(content)["data"]
        return [row["id"] for row in rows if isinstance(row["id"], str)]
    except (ValueError, RecursionError, TypeError, KeyError):
        return []


def _is_model(wanted: str, listed: str) -> bool:
    """Whether servers that list `listed` take the name `wanted` for it, as some leave out a folder, or a variant."""
    return listed in (wanted, f"{wanted}:latest", wanted.rpartition(":")[0]) or listed.endswith(f"/{wanted}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
