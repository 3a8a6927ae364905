"""What an endpoint says, judged: whole answers, faults that pass, and errors that stop the run."""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.units import Answer, Outcome, Pending, Usage
from nuner_jax.errors import NunerError

MESSAGE_CHARS = 300  # of a server's message that is kept

_OVERLOADED = (503, 529)
_PASSING = (408, 409, 425)
_OF_GATEWAYS = (408, 502, 504, *range(520, 528))  # who stands before the server does not know how far it came
_OUT_OF_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}


class MalformedAnswer(ValueError):
    """JSON that is no chat completion; the message says where it differs."""


class EndpointFault(Exception):
    """A request that brought no answer, while the endpoint may well answer the next one.

    reason: a word for counting: rate_limited, overloaded, server_error, timeout, unreachable, connection (cut),
      truncated_json, malformed_answer, bad_request, content_filter, not_recorded.
    detail: what the server said, shortened; "" if nothing.
    retry: whether the same request may succeed later.
    retry_after: seconds that the server asks to wait; None if it does not say.
    billed: "no", or "unknown" where the server may have done, and billed, the work.
    """

    def __init__(
        self, reason: str, detail: str = "", *, retry: bool, retry_after: float | None = None, billed: str = "no"
    ):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.retry_after = retry_after
        self.billed = billed


class EndpointStop(NunerError):
    """An error that every further request would meet too: the run stops at once.

    reason: a word for the journal: unauthorized, out_of_money, not_found.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


# --- Answers -----------------------------------------------------------------------------------


def read_answer(payload: Any) -> Answer:
    """The answer in a chat completion as JSON, of a request or of a line of a batch's results.

    An answer without choices is an empty one: its usage counts all the same. `Usage()`, all zeros, means that the
    endpoint did not count, or not in whole numbers.

    Raises:
      MalformedAnswer: it is JSON of another form.
    """
    match payload:
        case {"error": error} if error:  # some servers send errors with status 200
            raise MalformedAnswer(f"an error in place of an answer: {message_of(error)}")
        case {"choices": []}:
            choice: Any = {}
        case {"choices": [dict(choice), *_]}:
            pass
        case _:
            raise MalformedAnswer(f"no list of choices in {_shorten(str(payload), 80)!r}")
    message = choice.get("message") or {}
    if not isinstance(message, dict):
        raise MalformedAnswer("the message of the first choice is not an object")
    return Answer(
        id=_string(payload.get("id")),
        text=_content(message.get("content")),
        finish=_string(choice.get("finish_reason")),
        refusal=_string(message.get("refusal")),
        usage=_usage(payload.get("usage")),
    )


def judge(answer: Answer, prompt: Prompt, units: Sequence[Pending], max_attempts: int) -> list[Outcome]:
    """What a whole answer makes of each unit of its request, in their order.

    A refusal, or an answer that the content filter cut, is final for a unit asked alone; of several units each is to
    be asked again, alone. An answer cut at max_tokens is done: the unit in whose part it ends says so in `finish`.
    """
    final = None
    if answer.finish == "content_filter":
        final = "content_filter"
    elif answer.refusal:
        final = f"refusal: {_shorten(answer.refusal)}"
    elif not answer.text.strip() and answer.finish == "length":  # as models do that think first
        final = "no_room: max_tokens were used up before the first word; raise config.endpoint.max_tokens"
    if final:
        return [_not_done(unit, final, len(units) > 1, max_attempts, answer.finish) for unit in units]
    if not answer.text.strip():
        return [_not_done(unit, "empty_answer", True, max_attempts, answer.finish) for unit in units]
    parts = prompt.split(answer.text, len(units))
    cut = _place_of_cut(answer, parts)
    outcomes = []
    for at, (unit, part) in enumerate(zip(units, parts, strict=True)):
        if part is None or (at == cut and not part.strip()):  # cut right behind its heading
            outcomes.append(_not_done(unit, "missing_in_answer", True, max_attempts, answer.finish))
        else:
            finish = "stop" if answer.finish == "length" and at != cut else answer.finish
            outcomes.append(Outcome(unit.id, "done", part, finish=finish))
    return outcomes


def _place_of_cut(answer: Answer, parts: Sequence[str | None]) -> int | None:
    """Which part an answer that was cut ends in, in whatever order it has them; None: in none of them.

    Parts of a JSON answer are whole, and do not end it.
    """
    if answer.finish != "length":
        return None
    text = answer.text.rstrip()
    ends = [at for at, part in enumerate(parts) if part is not None and text.endswith(part.rstrip())]
    # Each text ends with an empty part; the others tell more.
    return max(ends, key=lambda at: (len(parts[at].strip()), at), default=None)


def fault_outcomes(units: Sequence[Pending], error: EndpointFault, max_attempts: int) -> list[Outcome]:
    """What a fault makes of each unit of its request; one that is final for several units is not yet so for each."""
    return [_not_done(unit, str(error), error.retry or len(units) > 1, max_attempts, "") for unit in units]


def _not_done(unit: Pending, error: str, retry: bool, max_attempts: int, finish: str) -> Outcome:
    again = retry and unit.attempts + 1 < max_attempts
    return Outcome(unit.id, "retry" if again else "failed", error=error, finish=finish)


def _content(content: Any) -> str:
    """The text of a message's content, which some servers send in parts."""
    if isinstance(content, list):
        return "".join(_string(part.get("text")) for part in content if isinstance(part, dict))
    if content is not None and not isinstance(content, str):
        raise MalformedAnswer("the content of the message is not text")
    return _storable(content or "")


def _usage(usage: Any) -> Usage:
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if any(type(count) is not int or count < 0 for count in counts):
        return Usage()
    return Usage(*counts, min(cached, counts[0]) if type(cached) is int and cached > 0 else 0)


def _string(value: Any) -> str:
    return _storable(value) if isinstance(value, str) else ""


def _storable(text: str) -> str:
    """The text without lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


# --- Errors ------------------------------------------------------------------------------------


def status_error(
    status: int, body: Any, headers: Mapping[str, str], endpoint: ConfigDict
) -> EndpointFault | EndpointStop:
    """The error that an HTTP status of 300 or more stands for.

    Args:
      status: of the response, or of the response inside a line of a batch.
      body: as JSON, or as text if it is none.
      headers: in lower case, or of any case in a mapping that does not care.
      endpoint: `config.endpoint`, for the message.
    """
    said = message_of(body)
    words = error_words(body)
    told = f" It said: {said}" if said else ""
    if status == 402 or words & _OUT_OF_MONEY:
        return EndpointStop(
            "out_of_money",
            f"{endpoint.base_url}: the account has no credit left (HTTP {status}); top it up and start again: "
            f"what was answered is kept.{told}",
        )
    if status in (401, 403):
        key = f"the environment variable {endpoint.key_variable}" if endpoint.key_variable else "no key"
        return EndpointStop(
            "unauthorized",
            f"{endpoint.base_url} refuses the key (HTTP {status}). It was sent {key}; check it, and that it may use "
            f"the model {endpoint.model} (config.endpoint.key_variable names another variable).{told}",
        )
    if status in (404, 405) or "model_not_found" in words:
        return EndpointStop(
            "not_found",
            f"{endpoint.base_url} knows no model {endpoint.model!r}, or no chat completions (HTTP {status}); check "
            f"config.endpoint.model and config.endpoint.base_url.{told}",
        )
    wait = retry_after(headers)
    billed = "unknown" if status in _OF_GATEWAYS else "no"
    detail = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if status == 429:
        return EndpointFault("rate_limited", detail, retry=True, retry_after=wait)
    if status in _OVERLOADED:
        return EndpointFault("overloaded", detail, retry=True, retry_after=wait)
    if status >= 500 or status in _PASSING:
        return EndpointFault("server_error", detail, retry=True, retry_after=wait, billed=billed)
    return EndpointFault("content_filter" if "content_filter" in words else "bad_request", detail, retry=False)


def error_within(payload: Any, endpoint: ConfigDict) -> EndpointFault | EndpointStop | None:
    """The error that a server sends with status 200, if it says which one it is; None for anything else.

    The work may have been done before it failed, and billed.
    """
    match payload:
        case {"error": {"code": int(status)}} if 400 <= status < 600:
            pass
        case {"error": dict(error)} if error_words(error) & _OUT_OF_MONEY:
            status = 402
        case _:
            return None
    error = status_error(status, payload, {}, endpoint)
    if isinstance(error, EndpointFault):
        error.billed = "unknown"
    return error


def json_or_text(text: str) -> Any:
    """What a server sent as JSON, or as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def message_of(body: Any) -> str:
    """What a server says in the body of an error, in any of the usual forms, as one short line."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail", "msg") if body.get(key)), "")
    if isinstance(body, list):  # a validation error of FastAPI's
        body = "; ".join(message_of(part) for part in body[:3])
    return _shorten(re.sub(r"<[^>]*>", " ", str(body or "")))


def error_words(body: Any) -> set[str]:
    """The server's own words for an error: its `code` and its `type`, if it has them."""
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    if not isinstance(body, dict):
        return set()
    return {value for key in ("code", "type") if isinstance(value := body.get(key), str)}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `retry-after-ms` or `retry-after` (seconds, or an HTTP date) ask to wait; None if they do not."""
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None or not value:
        return seconds
    then = _http_date(value)
    if then is None:
        return None
    # The server's own clock, if it tells, because ours may differ.
    return max(0.0, then - (_http_date(headers.get("date")) or time.time()))


def _http_date(value: str | None) -> float | None:
    try:
        date = email.utils.parsedate_to_datetime(value or "")
    except (TypeError, ValueError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def _number(value: str | None) -> float | None:
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _shorten(text: str, chars: int = MESSAGE_CHARS) -> str:
    line = " ".join(_storable(text).split())
    return line if len(line) <= chars else line[: chars - 1] + "…"
