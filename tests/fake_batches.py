"""The Batch API of the fake endpoint: files, batches, and all that goes wrong with them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aiohttp import BodyPartReader, web
from fake_answers import error_body

if TYPE_CHECKING:
    from fake_openai import Arrival, FakeOpenAI

LINE_FAULTS = {
    "empty": "output",
    "refusal": "output",
    "content_filter": "output",
    "left_out": "output",
    "line_duplicate": "output",  # the line stands twice
    "line_unknown": "output",  # beside it one with an id that nobody gave
    "line_broken": "output",  # billed, but half of its JSON
    "line_429": "error",
    "line_500": "error",
    "line_400": "error",
    "line_402": "error",
    "line_missing": "",  # in neither file, and not billed
}
"""What can go wrong with a line of a batch, and the file in which it ends."""
FINAL = ("completed", "failed", "expired", "cancelled")


@dataclasses.dataclass
class Batch:
    """A batch as the server sees it. `steps`: the states that polls will still see before the end."""

    id: str
    input_file_id: str
    metadata: dict[str, str]
    steps: list[str]
    lines: list[dict[str, Any]]
    size: int
    status: str = "validating"
    fate: str = "completed"
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    done: int = 0
    wrong: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The batch object of the API."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "created_at": 1_700_000_000,
            "input_file_id": self.input_file_id,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "request_counts": {"total": len(self.lines), "completed": self.done, "failed": self.wrong},
            "metadata": self.metadata,
        }


class Batches:
    """Files and batches of a server; a test sets the attributes before or while it runs.

    most_requests, most_bytes: of one file; more fails the batch in its validation.
    steps: the states that polls see before a batch ends.
    fates: by the ordinal of a batch (from 1, in order of creation): "expired", "cancelled" and "failed_late" (half of
      it done), "failed" (in validation), "token_limit_exceeded" (failed, as when too much is queued), "never" (no end).
    failing: by event ("upload", "create", "poll", "list", "download") and its ordinal: the status of an error,
      "lost" (done, but the connection is closed without an answer) or "cut" (closed in the middle of it).
    retry_after: seconds that an error of these asks to wait.
    """

    def __init__(self, server: FakeOpenAI):
        self.server = server
        self.most_requests, self.most_bytes = 50_000, 200_000_000
        self.steps = ["validating", "in_progress", "finalizing"]
        self.fates: dict[int, str] = {}
        self.failing: dict[str, dict[int, int | str]] = {}
        self.retry_after: float | None = None
        self.created: list[Batch] = []
        self.files: dict[str, bytes] = {}
        self.events: list[str] = []
        self.peak = 0
        self._numbers = itertools.count(1)

    async def handle(self, request: web.BaseRequest, parts: list[str]) -> web.StreamResponse | None:
        """Answers a request for "files" or "batches", as the parts of its path say; None if there is no such thing."""
        match (request.method, *parts):
            case ("POST", "files"):
                return await self._event(request, "upload", await _uploaded(request))
            case ("GET", "files", name, "content") if name in self.files:
                return await self._event(request, "download", name)
            case ("DELETE", "files", name) if name in self.files:
                del self.files[name]
                return web.json_response({"id": name, "object": "file", "deleted": True})
            case ("POST", "batches"):
                return await self._event(request, "create", json.loads(await request.read()))
            case ("GET", "batches"):
                return await self._event(request, "list", request.query)
            case ("GET", "batches", name) if batch := self._find(name):
                return await self._event(request, "poll", batch)
            case ("POST", "batches", name, "cancel") if batch := self._find(name):
                batch.steps, batch.fate, batch.status = ["cancelling"], "cancelled", "cancelling"
                return web.json_response(batch.as_dict())
        return None

    async def _event(self, request: web.BaseRequest, event: str, argument: Any) -> web.StreamResponse:
        """Does it, with the fault that the test wants at this occurrence.

        A test may hold who comes: at EVENT (nothing is done yet), EVENT.done, and EVENT.half (of the answer is sent).
        """
        self.events.append(event)
        fault = self.failing.get(event, {}).get(self.events.count(event))
        await self.server.reach(event)
        if isinstance(fault, int):
            headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
            body = error_body(f"The fake endpoint says {fault}.", "server_error")
            return web.json_response(body, status=fault, headers=headers)
        body = getattr(self, f"_{event}")(argument)
        await self.server.reach(f"{event}.done")
        if fault is None and f"{event}.half" not in self.server.holds:
            return web.Response(body=body, content_type="application/json")
        return await self._partly(request, f"{event}.half", b"" if fault == "lost" else body, whole=fault is None)

    async def _partly(self, request: web.BaseRequest, event: str, body: bytes, *, whole: bool) -> web.StreamResponse:
        """Sends half of the body, waits at `event`, and sends the rest or closes the connection."""
        response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
        if body:
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
        await self.server.reach(event)
        if whole:
            await response.write(body[len(body) // 2 :])
        elif request.transport is not None:
            request.transport.close()
            await asyncio.sleep(0)
        return response

    def _upload(self, content: bytes) -> bytes:
        name = self._store(content)
        return json.dumps(
            {
                "id": name,
                "object": "file",
                "bytes": len(content),
                "created_at": 1_700_000_000,
                "filename": "requests.jsonl",
                "purpose": "batch",
                "status": "processed",
            }
        ).encode()

    def _download(self, name: str) -> bytes:
        return self.files[name]

    def _create(self, wanted: dict[str, Any]) -> bytes:
        content = self.files[wanted["input_file_id"]]
        batch = Batch(
            id=f"batch_{len(self.created) + 1}",
            input_file_id=wanted["input_file_id"],
            metadata=wanted.get("metadata") or {},
            steps=list(self.steps),
            lines=[json.loads(line) for line in content.splitlines()],
            size=len(content),
        )
        self.created.append(batch)
        batch.fate = self.fates.get(len(self.created), "completed")
        batch.errors = list(self._invalid(batch))
        if batch.errors:
            batch.fate, batch.steps = "failed", ["validating"]
        self.peak = max(self.peak, sum(one.status not in FINAL for one in self.created))
        return json.dumps(batch.as_dict()).encode()

    def _list(self, query: Any) -> bytes:
        newest = self.created[::-1]
        start = next((place + 1 for place, one in enumerate(newest) if one.id == query.get("after")), 0)
        limit = int(query.get("limit", 20))
        page = [one.as_dict() for one in newest[start : start + limit]]
        more = len(newest) > start + limit
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return json.dumps({"object": "list", "data": page, "has_more": more, **ends}).encode()

    def _poll(self, batch: Batch) -> bytes:
        if batch.steps:
            batch.status = batch.steps.pop(0)
        elif batch.status not in FINAL and batch.fate != "never":
            self._finish(batch)
        return json.dumps(batch.as_dict()).encode()

    def _find(self, name: str) -> Batch | None:
        return next((batch for batch in self.created if batch.id == name), None)

    def _store(self, content: bytes) -> str:
        name = f"file-{next(self._numbers)}"
        self.files[name] = content
        return name

    def _invalid(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """The errors that a validation finds."""
        if batch.fate == "failed":
            yield {"code": "invalid_json_line", "message": "This line is not parseable as valid JSON.", "line": 1}
        if batch.fate == "token_limit_exceeded":
            yield {"code": batch.fate, "message": "Enqueued token limit reached for fake-model.", "line": None}
        if len(batch.lines) > self.most_requests or batch.size > self.most_bytes:
            yield {"code": "too_many_tasks", "message": "The file is too large.", "line": None}
        if len({line["custom_id"] for line in batch.lines}) < len(batch.lines):
            yield {"code": "duplicate_custom_id", "message": "The custom_id of a line is not unique.", "line": None}
        for number, line in enumerate(batch.lines, start=1):
            if line["url"] != "/v1/chat/completions" or line["method"] != "POST":
                yield {"code": "url_mismatch", "message": "The url is not the batch's endpoint.", "line": number}
            if line["body"]["model"] not in self.server.models:
                yield {"code": "model_not_found", "message": "The model does not exist.", "line": number}

    def _finish(self, batch: Batch) -> None:
        """Executes the lines, all or the half that a batch comes to, and writes its files, in no order."""
        batch.status = batch.fate if batch.fate in FINAL else "failed"
        if batch.errors:
            return
        executed = len(batch.lines) if batch.status == "completed" else len(batch.lines) // 2
        files: dict[str, list[str]] = {"output": [], "error": [], "": []}
        for line in batch.lines[:executed]:
            self._execute(batch, line, files)
        message = "This request could not be executed before the completion window expired."
        for line in batch.lines[executed:] if batch.status == "expired" else ():
            error = {"code": "batch_expired", "message": message}
            files["error"].append(_line(line["custom_id"], None, None, error))
        batch.wrong = len(files["error"])
        for content in files.values():
            random.Random(self.server.seed).shuffle(content)
        if files["output"]:
            batch.output_file_id = self._store("".join(files["output"]).encode())
        if files["error"]:
            batch.error_file_id = self._store("".join(files["error"]).encode())

    def _execute(self, batch: Batch, line: dict[str, Any], files: dict[str, list[str]]) -> None:
        server, name, body = self.server, line["custom_id"], line["body"]
        entry = server.arrive(tuple(server.find(body)), batch=batch.id, custom_id=name)
        entry.what = server.draw(LINE_FAULTS, entry)
        place = LINE_FAULTS.get(entry.what, "output")
        if place != "output":
            entry.status = int(entry.what[5:]) if place else 0
            server.counts[entry.what] += 1
            error = error_body("The fake endpoint could not do this line.", "server_error")
            files[place].append(_line(name, entry.status, error))
            return
        batch.done += 1
        payload = server.generate(body, entry)
        entry.delivered = entry.what != "line_broken"
        server.bill(entry, payload)
        files[place].extend(_output_lines(entry, _line(name, 200, payload)))


async def _uploaded(request: web.BaseRequest) -> bytes:
    """The file of a multipart upload; its purpose must be "batch"."""
    fields = {}
    async for part in await request.multipart():
        assert isinstance(part, BodyPartReader)
        content = bytearray()
        while chunk := await part.read_chunk(1 << 20):  # `read` has a limit
            content += chunk
        fields[part.name] = bytes(content)
    if fields.get("purpose") != b"batch":
        raise web.HTTPBadRequest(text="the purpose must be batch")
    return fields["file"]


def _line(name: str, status: int | None, body: Any, error: dict[str, Any] | None = None) -> str:
    """A line of an output or error file."""
    response = None if status is None else {"status_code": status, "request_id": f"req_{name}", "body": body}
    return json.dumps({"id": f"batch_req_{name}", "custom_id": name, "response": response, "error": error}) + "\n"


def _output_lines(entry: Arrival, line: str) -> list[str]:
    if entry.what == "line_duplicate":
        return [line, line]
    if entry.what == "line_unknown":
        return [line, line.replace(entry.custom_id, "nobody")]
    if entry.what == "line_broken":
        return [line[: len(line) // 2] + "\n"]
    return [line]
