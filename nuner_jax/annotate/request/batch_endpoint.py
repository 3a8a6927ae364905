"""The Batch API of an OpenAI-compatible server: files go up and down, batches are created and looked at."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from nuner_jax.annotate.request.answers import EndpointFault, EndpointStop, json_or_text, message_of, status_error
from nuner_jax.annotate.request.endpoints import client_options, without_key

PATH = "/v1/chat/completions"
"""Where each line of a file goes, as the Batch API wants it written, whatever the server's own base_url is."""
MARK = "nuner_jax_batch"
"""The key in a batch's metadata under which its mark stands, by which it is found again."""
ENDED = ("completed", "expired", "cancelled", "failed")
LONGEST_BACKOFF = 60.0  # seconds

_CHUNK = 1 << 20  # bytes
_PAGE = 100  # batches in one list, at most

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BatchLook:
    """A batch as the server shows it.

    files: the ids of its output and error files, as far as there are any. done, total: requests. errors: why it
    failed as a whole, as (the server's code, its message with the line).
    """

    id: str
    status: str
    files: tuple[str, ...]
    done: int
    total: int
    errors: tuple[tuple[str, str], ...]


class BatchEndpoint:
    """Calls of the Batch API, each tried again while the endpoint's trouble is one that passes.

    All methods raise:
      EndpointFault: still no answer after config.request.max_attempts, or the server does not want this call.
      EndpointStop: no call would succeed (wrong key, no credit).
    """

    def __init__(self, config: ConfigDict, wait: Callable[[float], bool]):
        """A client that is not connected yet.

        Args:
          config: see `nuner_jax.config.annotate`.
          wait: waits some seconds between attempts; True if there is to be no further one.

        Raises:
          NunerError: there is no key. (`LiveEndpoint.check` looks for the rest.)
        """
        import openai

        self._config = config
        options = client_options(config)
        self._key = options["api_key"]
        self._wait = wait
        self._client = openai.OpenAI(**options)

    def close(self) -> None:
        """Closes all connections."""
        self._client.close()

    def upload(self, path: Path) -> str:
        """Puts a file of requests there; returns its id."""

        def call() -> str:
            with path.open("rb") as lines:
                return self._id(self._client.files.with_raw_response.create(file=(path.name, lines), purpose="batch"))

        return self._patiently(call)

    def create(self, file: str, mark: str) -> str:
        """The id of the new batch of an uploaded file.

        A creation whose answer is lost has perhaps happened, so the mark is looked for before each further attempt.
        """
        tried = False

        def call() -> str:
            nonlocal tried
            if tried and (there := self._marked(mark)):
                return there
            tried = True
            created = self._client.batches.with_raw_response.create(
                input_file_id=file, endpoint=PATH, completion_window="24h", metadata={MARK: mark}
            )
            return self._id(created)

        return self._patiently(call)

    def find(self, mark: str) -> str | None:
        """The id of the batch that has the mark; None if there is none but such as were refused."""
        return self._patiently(lambda: self._marked(mark))

    def look(self, batch: str) -> BatchLook:
        """The batch as it is now; tried once, because there will be another look."""
        return self._once(lambda: _batch_look(self._object(self._client.batches.with_raw_response.retrieve(batch))))

    def download(self, file: str, path: Path) -> None:
        """Streams a file of results to disk; `OSError` if the disk does not take it."""

        def call() -> None:
            with path.open("wb") as out, self._client.files.with_streaming_response.content(file) as response:
                for chunk in response.iter_bytes(_CHUNK):
                    out.write(chunk)

        self._patiently(call)

    def _marked(self, mark: str) -> str | None:
        after: dict[str, str] = {}
        while True:
            page = self._object(self._client.batches.with_raw_response.list(limit=_PAGE, **after))
            batches = page.get("data") or []
            for batch in batches:
                if (batch.get("metadata") or {}).get(MARK) == mark and not _was_refused(batch):
                    return batch["id"]
            if not page.get("has_more") or not batches:
                return None
            after = {"after": batches[-1]["id"]}

    def _patiently(self, call: Callable[[], Result]) -> Result:
        """The result of a call, tried until the fault is none that passes, or attempts are used up."""
        request = self._config.request
        attempt = 1
        while True:
            try:
                return self._once(call)
            except EndpointFault as fault:
                if not fault.retry or attempt >= request.max_attempts:
                    raise
                wait = random.uniform(0.5, 1.0) * min(LONGEST_BACKOFF, request.backoff * 2 ** (attempt - 1))
                if self._wait(max(wait, fault.retry_after or 0.0)):
                    raise
                attempt += 1

    def _once(self, call: Callable[[], Result]) -> Result:
        import httpx2
        import openai

        try:
            return call()
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except (openai.APIConnectionError, httpx2.RequestError) as error:
            # The client lets pass what its HTTP library raises while a body is streamed.
            cause = str(error.__cause__ or error) or type(error).__name__
            raise EndpointFault("connection", message_of(cause), retry=True) from None

    def _object(self, response: Any) -> dict[str, Any]:
        """The JSON object that a response holds."""
        text = without_key(response.text, self._key)
        payload = json_or_text(text)
        if not isinstance(payload, dict):
            raise EndpointFault("malformed_answer", f"no JSON object but {message_of(text[:80])!r}", retry=True)
        return payload

    def _id(self, response: Any) -> str:
        payload = self._object(response)
        if not isinstance(payload.get("id"), str):
            raise EndpointFault("malformed_answer", f"no id in {message_of(str(payload))!r}", retry=True)
        return payload["id"]

    def _status_error(self, error: Any) -> EndpointFault | EndpointStop:
        body = json_or_text(without_key(error.response.text, self._key))
        if error.status_code in (404, 405):  # no such file or batch, or no Batch API; nothing about the model
            return EndpointFault("not_found", message_of(body) or f"HTTP {error.status_code}", retry=False)
        return status_error(error.status_code, body, error.response.headers, self._config.endpoint)


def _was_refused(batch: dict[str, Any]) -> bool:
    """Whether nothing of the batch was executed, because it failed its validation."""
    return batch.get("status") == "failed" and not batch.get("output_file_id")


def _batch_look(batch: dict[str, Any]) -> BatchLook:
    counts = batch.get("request_counts") or {}
    errors = (batch.get("errors") or {}).get("data") or []
    return BatchLook(
        id=str(batch.get("id")),
        status=str(batch.get("status")),
        files=tuple(file for key in ("output_file_id", "error_file_id") if (file := batch.get(key))),
        done=(counts.get("completed") or 0) + (counts.get("failed") or 0),
        total=counts.get("total") or 0,
        errors=tuple((str(error.get("code") or ""), _place(error) + message_of(error)) for error in errors),
    )


def _place(error: dict[str, Any]) -> str:
    return f"line {error['line']}: " if error.get("line") is not None else ""
