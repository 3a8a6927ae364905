"""An OpenAI-compatible server over real HTTP on loopback, with scripted faults, that bills what it answers.

In a test:  with FakeOpenAI(faults={"error_500": 0.1}) as server: ...  # server.base_url, key "test-key"
A process:  python tests/fake_openai.py --port=0 [--seed=0 --delay=0 --fault=error_500=0.1 ...]  prints its URL;
            GET /stats gives the counts as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiohttp import web
from fake_answers import answer_to, chat_completion, completion_of, error_body, texts_of
from fake_batches import Batches

LIVE_FAULTS = {
    "rate_limit_retry_after": 429,
    "rate_limit_plain": 429,
    "insufficient_quota": 429,
    "bad_request": 400,
    "error_500": 500,
    "error_503": 503,
    "timeout": 0,  # never answered, and not billed
    "cut": 200,  # billed; the connection is closed in the middle of the body
    "truncated_json": 200,  # billed; a whole body, but half of its JSON
    "empty": 200,  # billed, without content
    "refusal": 200,  # billed, with `message.refusal`
    "content_filter": 200,  # billed, empty, with that finish reason
    "left_out": 200,  # the last of the texts is not in the answer
    "slow": 200,  # answered after `slow` seconds; billed even if the client has gone
}
"""What can go wrong with a live request, and its status; what has another one than 200 is not billed."""
UNBILLED = {fault for fault, status in LIVE_FAULTS.items() if status != 200}


@dataclasses.dataclass(slots=True)
class Bill:
    """Requests that cost, and their tokens."""

    requests: int = 0
    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def add(self, usage: Mapping[str, Any]) -> None:
        self.requests += 1
        self.prompt += usage["prompt_tokens"]
        self.completion += usage["completion_tokens"]
        self.cached += usage["prompt_tokens_details"]["cached_tokens"]


@dataclasses.dataclass(slots=True)
class Arrival:
    """What became of a request, or of a line of a batch: `what` is "ok", a fault or a status in words.

    `attempts` counts from 1, per text. `delivered`: its answer, with its usage, left the server whole.
    """

    order: int
    texts: tuple[str, ...]
    attempts: tuple[int, ...]
    what: str
    status: int
    billed: bool = False
    delivered: bool = False
    batch: str = ""
    custom_id: str = ""


class FakeOpenAI:
    """The server, in a thread of its own while used as a context manager."""

    def __init__(
        self,
        *,
        key: str | None = "test-key",
        models: Sequence[str] = ("fake-model",),
        faults: Mapping[str, float] | None = None,
        seed: int = 0,
        delay: float = 0.0,
        slow: float = 0.3,
        retry_after: float = 0.05,
        cached: int = 0,
        completion: Callable[[str], str] = completion_of,
        find: Callable[[dict], list[str]] = texts_of,
        script: Callable[[tuple[str, ...], int], str | None] | None = None,
        max_in_flight: int | None = None,
        rate: tuple[int, float] | None = None,
        keep_log: bool = True,
        port: int = 0,
    ):
        """A server that is not running yet.

        Args:
          faults: share of requests by name of the fault, drawn from a hash of (seed, text, attempt of that text).
          delay, slow: seconds before an answer; before one with the fault "slow".
          cached: prompt tokens of each request that are told to come from a cache.
          script: (texts, attempt) -> a fault's name, or None; asked before `faults`.
          max_in_flight: requests at a time; the others get 429 with retry-after.
          rate: (requests, seconds) of a window; the others get 429; headers tell what remains.
          keep_log: False keeps memory flat: no log, no attempts per text.
        """
        self.key, self.models, self.seed, self.delay, self.slow = key, tuple(models), seed, delay, slow
        self.faults, self.retry_after, self.cached = dict(faults or {}), retry_after, cached
        self.completion, self.find, self.script = completion, find, script
        self.max_in_flight, self.rate, self.keep_log, self.port = max_in_flight, rate, keep_log, port
        self.log: list[Arrival] = []
        self.delivered, self.undelivered = Bill(), Bill()
        self.counts: Counter[str] = Counter()
        self.in_flight = self.peak = self.requests = 0
        self._attempts: Counter[str] = Counter()
        self.holds: dict[str, threading.Event] = {}
        self._failing: tuple[int, int] | None = None
        self._window = (0.0, 0)
        self.batches = Batches(self)
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def billed(self) -> Bill:
        """All that costs: `delivered` wholly, and `undelivered` (cut, truncated, client gone)."""
        pairs = zip(dataclasses.astuple(self.delivered), dataclasses.astuple(self.undelivered), strict=True)
        return Bill(*(sum(pair) for pair in pairs))

    def answered(self) -> Counter[str]:
        """How often each text got a good and whole answer."""
        good = (entry for entry in self.log if entry.what in ("ok", "slow") and entry.delivered)
        return Counter(text for entry in good for text in entry.texts)

    def attempts(self) -> Counter[str]:
        """How often each text was asked for."""
        return Counter(self._attempts)

    def stats(self) -> dict[str, Any]:
        """The counts, as GET /stats gives them."""
        bills = {name: dataclasses.asdict(getattr(self, name)) for name in ("billed", "delivered", "undelivered")}
        return {"requests": self.requests, "peak_in_flight": self.peak, "what": dict(self.counts), **bills}

    # What a test switches while the server runs.

    def fail_with(self, status: int | None, after: int = 0) -> None:
        """Every chat request gets this status once `after` more have come; None ends it."""
        self._failing = None if status is None else (status, self.requests + after)

    def hold(self, event: str) -> threading.Event:
        """Stops whoever gets to `event` there until `release`; the result is set when someone does."""
        return self.holds.setdefault(event, threading.Event())

    def release(self, event: str) -> None:
        """Lets those held at `event` go on."""
        self.holds.pop(event, None)

    def pause(self) -> threading.Event:
        """No chat request is answered until `resume`."""
        return self.hold("chat")

    def resume(self) -> None:
        self.release("chat")

    async def reach(self, event: str) -> None:
        """Where `hold` stops whoever comes."""
        while (reached := self.holds.get(event)) is not None:
            reached.set()
            await asyncio.sleep(0.005)

    # The server's life.

    def __enter__(self) -> FakeOpenAI:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves from a thread, on the same port as before if there was one."""
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise RuntimeError("the fake endpoint does not start")

    def stop(self) -> None:
        """Closes all connections and the port."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = None

    async def _serve(self, started: threading.Event | None = None) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = runner.addresses[0][1]
        if started is None:
            print(self.base_url, flush=True)
        else:
            started.set()
        await self._stopping.wait()
        await runner.cleanup()

    # Requests.

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path == "/stats":
            return _json(200, self.stats())
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _json(401, error_body("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"))
        if path == "/v1/chat/completions" and request.method == "POST":
            return await self._count_in_flight(request)
        if path == "/v1/models":
            models = [{"id": model, "object": "model", "created": 0, "owned_by": "fake"} for model in self.models]
            return _json(200, {"object": "list", "data": models})
        if path.startswith(("/v1/files", "/v1/batches")):
            response = await self.batches.handle(request, path.split("/")[2:])
            if response is not None:
                return response
        return _json(404, error_body(f"Unknown request URL: {request.method} {path}", "invalid_request_error"))

    async def _count_in_flight(self, request: web.BaseRequest) -> web.StreamResponse:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            return await self._chat(request)
        finally:
            self.in_flight -= 1

    async def _chat(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests += 1
        if body["model"] not in self.models:
            message = f"The model `{body['model']}` does not exist or you do not have access to it."
            return _json(404, error_body(message, "invalid_request_error", "model_not_found"))
        texts = tuple(self.find(body))
        entry = self.arrive(texts)
        await self.reach("chat")
        limited = self._limited()
        if self._failing and self.requests > self._failing[1]:
            return self._refuse(entry, self._failing[0], "fail_with")
        if limited:
            return self._refuse(entry, 429, limited, self.retry_after)
        entry.what = self.draw(LIVE_FAULTS, entry)
        entry.status = LIVE_FAULTS.get(entry.what, 200)
        if entry.what in UNBILLED:
            return await self._unbilled(entry)
        payload = self.generate(body, entry)
        try:
            if seconds := self.slow if entry.what == "slow" else self.delay:
                await asyncio.sleep(seconds)
            entry.delivered = entry.what not in ("cut", "truncated_json")
        finally:  # what was generated is billed, even if the client has gone meanwhile
            self.bill(entry, payload)
        return await self._deliver(request, entry, payload)

    def arrive(self, texts: tuple[str, ...], batch: str = "", custom_id: str = "") -> Arrival:
        """A new line of the log."""
        attempts: tuple[int, ...] = (1,) * len(texts)
        if self.keep_log:
            self._attempts.update(texts)
            attempts = tuple(self._attempts[text] for text in texts)
        entry = Arrival(self.requests, texts, attempts, "ok", 200, batch=batch, custom_id=custom_id)
        if self.keep_log:
            self.log.append(entry)
        return entry

    def draw(self, kinds: Mapping[str, Any], entry: Arrival) -> str:
        """The fault of a request, of those that are possible; "ok" for none."""
        if self.script and (scripted := self.script(entry.texts, entry.attempts[0])):
            return scripted
        at = self.chance(entry.texts[0], entry.attempts[0])
        for kind, share in self.faults.items():
            if kind in kinds:
                if at < share:
                    return kind
                at -= share
        return "ok"

    def chance(self, *things: object) -> float:
        """A number in [0, 1) that is a pure function of the seed and things."""
        digest = hashlib.blake2b("\0".join(map(str, (self.seed, *things))).encode(), digest_size=7).digest()
        return int.from_bytes(digest) / 256**7

    def generate(self, body: dict[str, Any], entry: Arrival) -> dict[str, Any]:
        """The answer to a request, as its fault wants it."""
        name = f"chatcmpl-{self.requests}"
        if entry.what == "refusal":
            return chat_completion(body, "", name=name, refusal="I cannot help with that.", cached=self.cached)
        if entry.what in ("empty", "content_filter"):
            finish = "stop" if entry.what == "empty" else "content_filter"
            return chat_completion(body, "", name=name, finish=finish, cached=self.cached)
        texts = entry.texts[: -1 if entry.what == "left_out" else None] or entry.texts
        return chat_completion(body, answer_to(body, texts, self.completion), name=name, cached=self.cached)

    def bill(self, entry: Arrival, payload: Mapping[str, Any]) -> None:
        """Counts an answer that was generated."""
        entry.billed = True
        (self.delivered if entry.delivered else self.undelivered).add(payload["usage"])
        self.counts[entry.what] += 1

    async def _deliver(self, request: web.BaseRequest, entry: Arrival, payload: dict[str, Any]) -> web.StreamResponse:
        if entry.what == "cut":
            return await _cut(request, json.dumps(payload).encode())
        if entry.what == "truncated_json":
            half = json.dumps(payload).encode()
            return web.Response(body=half[: len(half) // 2], content_type="application/json")
        return _json(200, payload, self._rate_headers())

    # Requests that cost nothing.

    async def _unbilled(self, entry: Arrival) -> web.StreamResponse:
        if entry.what == "timeout":
            self.counts["timeout"] += 1
            await asyncio.Event().wait()  # until the client has gone: the handler is cancelled then
        wait = self.retry_after if entry.what == "rate_limit_retry_after" else None
        return self._refuse(entry, entry.status, entry.what, wait)

    def _refuse(self, entry: Arrival, status: int, what: str, retry_after: float | None = None) -> web.Response:
        entry.what, entry.status = what, status
        self.counts[what] += 1
        code = "insufficient_quota" if what == "insufficient_quota" else "rate_limit_exceeded"
        kind = {400: "invalid_request_error", 401: "invalid_request_error", 429: "requests"}.get(status, "server_error")
        headers = self._rate_headers()
        if retry_after is not None:
            headers["retry-after"] = str(retry_after)
        body = error_body(f"The fake endpoint says {status}: {what}.", kind, code if status == 429 else None)
        return _json(status, body, headers)

    def _limited(self) -> str:
        """Why a request comes too early: a reason for 429, or ""."""
        if self.max_in_flight is not None and self.in_flight > self.max_in_flight:
            return "too_many"
        if self.rate is None:
            return ""
        began, used = self._window
        if time.monotonic() - began >= self.rate[1]:
            began, used = time.monotonic(), 0
        self._window = (began, used + 1)
        return "too_fast" if used >= self.rate[0] else ""

    def _rate_headers(self) -> dict[str, str]:
        if self.rate is None:
            return {}
        began, used = self._window
        reset = max(0.0, began + self.rate[1] - time.monotonic())
        return {
            "x-ratelimit-limit-requests": str(self.rate[0]),
            "x-ratelimit-remaining-requests": str(max(0, self.rate[0] - used)),
            "x-ratelimit-reset-requests": f"{reset * 1000:.0f}ms",
        }


def _json(status: int, payload: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=json.dumps(payload).encode(), content_type="application/json", headers=headers
    )


async def _cut(request: web.BaseRequest, body: bytes) -> web.StreamResponse:
    """Promises the whole body, sends half of it, and closes the connection."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME=SHARE")
    parser.add_argument("--log", action="store_true", help="keep attempts per text: memory grows")
    options = parser.parse_args()
    faults = {name: float(share) for name, share in (fault.split("=") for fault in options.fault)}
    server = FakeOpenAI(
        port=options.port, seed=options.seed, delay=options.delay, faults=faults, keep_log=options.log or bool(faults)
    )
    asyncio.run(server._serve())


if __name__ == "__main__":
    main()
