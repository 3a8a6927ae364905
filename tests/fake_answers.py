"""What the fake endpoint answers: a pure function of the texts, with tokens counted by a fixed rule."""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

SAMPLE = pathlib.Path(__file__).parent.parent / "nuner_jax" / "data" / "sample" / "completions.jsonl.gz"
CONCEPTS = ("person", "location", "organisation", "date", "species", "instrument", "law", "feeling", "food", "event")
_WORD = re.compile(r"\w{3,}")
_MANY = re.compile(r"\n\nThe input is a numbered list of .*sentences.*\Z", re.DOTALL)
_ITEM = re.compile(r"^\d+\. (.*)$", re.MULTILINE)


@functools.cache
def recorded() -> dict[str, str]:
    """The completions of the embedded sample, by text."""
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        return {row["text"]: row["completion"] for row in rows}


def completion_of(text: str) -> str:
    """Lines in the paper's format: the recorded ones, or some made from the text's words."""
    if text in recorded():
        return recorded()[text]
    words = dict.fromkeys(_WORD.findall(text))
    chosen = [word for word in words if zlib.crc32(word.encode()) % 3 == 0][:6] or list(words)[:1]
    names = ((word, CONCEPTS[zlib.crc32(word.lower().encode()) % len(CONCEPTS)]) for word in chosen)
    return "\n".join(f"{word} <> {concept} <> a kind of {concept}" for word, concept in names)


def texts_of(body: dict[str, Any]) -> list[str]:
    """The texts that a request asks for: what follows the first "Input:" of its message, one or a numbered list."""
    given = body["messages"][-1]["content"].partition("\nInput:")[2].strip()
    if not _asks_for_many(body):
        return [given]
    return [match[1] for match in _ITEM.finditer(_MANY.sub("", given))]


def answer_to(body: dict[str, Any], texts: Sequence[str], completion: Callable[[str], str] = completion_of) -> str:
    """The content of the message that answers a request for texts, in the form that it asks for."""
    structured = "response_format" in body
    if not _asks_for_many(body):
        return json.dumps(_entities(completion(texts[0]))) if structured else completion(texts[0])
    if not structured:
        return "\n\n".join(f"### {number}\n{completion(text)}" for number, text in enumerate(texts, start=1))
    sentences = [{"number": number, **_entities(completion(text))} for number, text in enumerate(texts, start=1)]
    return json.dumps({"sentences": sentences})


def _asks_for_many(body: dict[str, Any]) -> bool:
    if "response_format" in body:
        return "sentences" in body["response_format"]["json_schema"]["schema"]["properties"]
    return _MANY.search(body["messages"][-1]["content"]) is not None


def _entities(completion: str) -> dict[str, Any]:
    rows = (line.split(" <> ") for line in completion.split("\n") if line.count(" <> ") == 2)
    return {"entities": [dict(zip(("entity", "concept", "description"), row, strict=True)) for row in rows]}


def tokens(text: str) -> int:
    """The fixed rule: four bytes are a token."""
    return -(-len(text.encode()) // 4)


def prompt_tokens(body: dict[str, Any]) -> int:
    """The tokens of all messages, three more for each, and those of the answer's schema."""
    schema = json.dumps(body["response_format"]) if "response_format" in body else ""
    return tokens(schema) + sum(tokens(message["content"]) + 3 for message in body["messages"])


def most_tokens(body: dict[str, Any]) -> int | None:
    """The length of an answer that the request allows, under either of its names."""
    return body.get("max_completion_tokens", body.get("max_tokens"))


def chat_completion(
    body: dict[str, Any], content: str, *, name: str, finish: str = "stop", refusal: str | None = None, cached: int = 0
) -> dict[str, Any]:
    """The answer to POST /chat/completions; cut at the tokens that the request allows."""
    most = most_tokens(body)
    if most is not None and tokens(content) > most:
        content = content.encode()[: 4 * most].decode(errors="ignore")
        finish = "length"
    prompt, completion = prompt_tokens(body), tokens(refusal or content)
    message = {"role": "assistant", "content": None if refusal else content, "refusal": refusal}
    return {
        "id": name,
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        },
    }


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
