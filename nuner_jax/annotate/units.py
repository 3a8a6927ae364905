"""What the stages of annotation hand to each other: units of text, answers, and what became of both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of text that is annotated by itself: a sentence, a passage or a row.

    id: 20 hexadecimal digits of the text's hash: equal texts are one unit, on every machine.
    source: where it was read first, as "file:line".
    """

    id: str
    text: str
    source: str

    @classmethod
    def of(cls, text: str, source: str) -> Unit:
        """The unit of a text."""
        return cls(hashlib.blake2b(text.encode(), digest_size=10).hexdigest(), text, source)


@dataclass(frozen=True, slots=True)
class Pending:
    """A unit that has no answer yet: its place in the selection, and how many attempts were made before."""

    position: int
    id: str
    text: str
    attempts: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that an endpoint counted for a request; `cached` is the part of `prompt` served from its cache."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of an endpoint.

    id: the endpoint's own name of it. text: the completion; "" if there is none. finish: "stop", "length" (cut at
    max_tokens), "content_filter", or whatever else the endpoint says. refusal: why the model declined, if it did.
    """

    id: str
    text: str
    finish: str
    refusal: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt made of one unit.

    state: "done" (`completion` is its answer), "retry" (may be asked for again) or "failed" (not to be asked again).
    error: the reason in a word or two for counting, then ": " and details if there are any; "" when done.
    finish: as in `Answer`.
    """

    unit: str
    state: str
    completion: str = ""
    error: str = ""
    finish: str = ""


@dataclass(frozen=True, slots=True)
class Completed:
    """A unit of the selection with what the journal holds for it, for alignment.

    state: "done", "failed" or "pending". `completion` and `finish` are those of the done attempt, `error` is that of
    the last attempt of a failed one.
    """

    position: int
    id: str
    text: str
    source: str
    state: str
    completion: str
    finish: str
    error: str
