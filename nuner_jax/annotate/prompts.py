"""What the model is asked: the paper's prompt word for word, its structured variant, or a user's own file.

A template holds the placeholder `[INPUT SENTENCE]` once; a text takes its place as it is, so whatever a text contains
(the delimiter, braces, headings, instructions) stays data between the two fixed halves of the template. Several
sentences in one request become a numbered list in the same place, each on one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.data.completions import has_delimiter, read_array
from nuner_jax.errors import NunerError

PLACEHOLDER = "[INPUT SENTENCE]"
_FOLDER = Path(__file__).parent / "templates"

# A heading of a part of an answer, without the bold around it: "### 1", "1.", "[1]", "Sentence 1:", and behind it what
# a model may repeat of the sentence. No two runs of white space meet in it, which would backtrack.
_HEADING = re.compile(
    r"(?P<mark>#{0,6})[\s*_]*"
    r"(?P<word>(?:sentence|input|text|answer|output|item|number|no\.?)\b)?[ #]{0,3}"
    r"(?P<open>[\[(]?)(?P<number>\d{1,9})(?P<end>[\])]?[*_]{0,3}[.:)]?)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: `single` asks for one text, `many` for a numbered list of them; both hold the placeholder once.

    structured: answers are JSON, held to a schema by the endpoint.
    units_per_request: how many texts a request holds at most; one with a single text uses `single`.
    """

    single: str
    many: str
    structured: bool
    units_per_request: int

    @classmethod
    def make(cls, config: ConfigDict) -> Prompt:
        """The prompt of `config.prompt`.

        template: "paper", "structured", or a file (UTF-8) with the placeholder. For several sentences per request the
        paper's prompt and a file are followed by one more paragraph, which says how to number the answer: without it
        no answer could be divided.

        Raises:
          NunerError: for a file that cannot be read, or that does not hold the placeholder exactly once.
        """
        name = config.template
        if name == "structured":
            single, many = _embedded("structured"), _embedded("structured_many")
        else:
            single = _embedded("paper") if name == "paper" else _own(name)
            many = f"{single}\n\n{_embedded('many')}"
        return cls(single, many, name == "structured", config.units_per_request)

    @classmethod
    def verbatim(cls) -> Prompt:
        """The prompt that adds nothing: each text is a whole message, made by whoever asks."""
        return cls(PLACEHOLDER, PLACEHOLDER, structured=False, units_per_request=1)

    def identity(self) -> dict[str, Any]:
        """What decides the requests, as JSON data: an answer to another identity is no answer to this prompt."""
        return {
            "template": self.single if self.units_per_request == 1 else self.many,
            "format": "json_schema" if self.structured else "lines",
            "units_per_request": self.units_per_request,
        }

    def body(self, texts: Sequence[str]) -> dict[str, Any]:
        """The part of a request that the prompt decides: `messages`, and `response_format` if it is structured."""
        if len(texts) == 1:
            template, data = self.single, texts[0]
        else:
            template, data = self.many, _numbered(texts)
        before, _, behind = template.partition(PLACEHOLDER)
        body: dict[str, Any] = {"messages": [{"role": "user", "content": before + data + behind}]}
        if self.structured:
            body["response_format"] = _response_format(many=len(texts) > 1)
        return body

    def split(self, answer: str, count: int) -> list[str | None]:
        """The completion of each of the `count` texts of one request; `None` for one that is not in the answer.

        What stands under an unknown number, or under one that already has its part, is given to none of them.
        """
        if count == 1:
            return [answer]
        parts = _structured_parts(answer)
        if parts is None:
            parts = _numbered_parts(answer)
        return [parts.get(number) for number in range(1, count + 1)]


def request_body(endpoint: ConfigDict, prompt: Prompt, texts: Sequence[str]) -> dict[str, Any]:
    """The whole body of `POST /chat/completions` that asks for `texts`.

    endpoint: `config.endpoint`; its `extra` keys come last, and may replace any other.
    """
    body = {"model": endpoint.model, **prompt.body(texts)}
    for key in ("temperature", "top_p"):
        if endpoint[key] is not None:
            body[key] = endpoint[key]
    body[endpoint.max_tokens_key] = endpoint.max_tokens
    return body | json.loads(endpoint.extra)


def _embedded(name: str) -> str:
    return (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


def _own(name: str) -> str:
    path = Path(name).expanduser()
    try:
        template = path.read_text(encoding="utf-8-sig").rstrip("\n")
    except UnicodeDecodeError as error:
        raise NunerError(f"config.prompt.template: {path}: not UTF-8 (byte {error.start}); convert it") from error
    except OSError as error:
        raise NunerError(
            f"config.prompt.template: {path}: cannot be read ({error.strerror}); name a file, 'paper' or 'structured'"
        ) from error
    count = template.count(PLACEHOLDER)
    if count != 1:
        raise NunerError(
            f"config.prompt.template: {path}: holds {PLACEHOLDER} {count} times; put it once, where the text belongs"
        )
    return template


def _numbered(texts: Sequence[str]) -> str:
    """The texts as a list, below what introduces it; a line break within a text would end it, so it is a space."""
    return "".join(f"\n{number}. {' '.join(text.splitlines())}" for number, text in enumerate(texts, start=1))


def _response_format(many: bool) -> dict[str, Any]:
    """The schema as OpenAI's structured outputs take it: strict, so every key required and no other allowed."""
    entity = _object(entity={"type": "string"}, concept={"type": "string"}, description={"type": "string"})
    schema = _object(entities={"type": "array", "items": entity})
    if many:
        sentence = _object(number={"type": "integer"}, **schema["properties"])
        schema = _object(sentences={"type": "array", "items": sentence})
    return {"type": "json_schema", "json_schema": {"name": "annotations", "strict": True, "schema": schema}}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _structured_parts(answer: str) -> dict[int, str] | None:
    """The parts of a JSON answer by their number, each as a JSON answer of its own; `None` if it is none."""
    start = answer.find("{")
    array = read_array(answer[start:], "sentences") if start >= 0 else None
    if array is None:
        return None
    parts: dict[int, str] = {}
    for sentence, source in array.items:
        match sentence:
            case {"number": int(number), "entities": [*_]} if number not in parts:
                entities = read_array(source, "entities")
                parts[number] = '{"entities": [' + ", ".join(one for _, one in entities.items) + "]}"
    return parts


def _numbered_parts(answer: str) -> dict[int, str]:
    """The parts of an answer in lines by their number; of a repeated number the first.

    If every part before it is empty, a repeated number begins the answer anew: some models repeat the list first.
    """
    parts: dict[int, list[str]] = {}
    here: int | None = None  # whose part this is: nobody's
    answered = False
    for line in answer.split("\n"):
        number = _heading(line)
        if number is not None:
            if number in parts and not answered:
                parts.clear()
            here = None if number in parts else number
            parts.setdefault(number, [])
        elif here is not None:
            parts[here].append(line)
            answered = answered or bool(line.strip())
    return {number: "\n".join(lines).strip("\r\n") for number, lines in parts.items()}


def _heading(line: str) -> int | None:
    """The number of a heading, `None` for any other line."""
    match = _HEADING.match(line.strip(" \t\r*_"))
    if not match or has_delimiter(line):
        return None
    marked = match["mark"] or match["word"] or match["open"] or match["end"].strip("*_")
    alone = not match["rest"].strip("*_:. ")
    return int(match["number"]) if alone or (marked and match["rest"][0] in " \t:") else None
