"""What a language model is shown: the types with what they mean, the sentences of a sample, and one text."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nuner_jax.data.align import DELIMITER
from nuner_jax.data.ner.datasets import TaggedSet
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError

NOTHING = "none"
"""The whole answer about a text without entities: no answer at all would look like a fault of the endpoint."""

TASK = f"""The goal is to find the named entities in a text. These are the entity types, and there are no others:
[TYPES]

Output format (separate entities with new line):
`entity from the text {DELIMITER} entity type`
Copy each entity letter by letter from the text, and name its type exactly as it is written above. Keep to the order of the text; an entity that occurs several times has a line for each time. Write nothing else. If the text has no entity, write: {NOTHING}"""  # noqa: E501 (a paragraph is one line for the model)


def in_words(type_name: str) -> str:
    """A type's name as words: "travel_date" is "travel date"."""
    return " ".join(re.split(r"[\s_/-]+", type_name)).strip()


def read_definitions(given: Mapping[str, Any] | str | None, data: TaggedSet) -> dict[str, str]:
    """What each type of a set means, in the order of its types; their names in words where nothing is given.

    Args:
      given: `config.sets.NAME.definitions`: {type: what it means} or a JSON file with that.
      data: the set.

    Raises:
      NunerError: a file that cannot be read, a type that the set does not have, or a meaning that is no text.
    """
    key = f"config.sets.{data.name}.definitions"
    if isinstance(given, str):
        path = Path(given).expanduser()
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise NunerError(f"{key}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(given or {}, Mapping):
        raise NunerError(f"{key}: give {{type: what it means}}, or a JSON file with that")
    for name, meaning in (given or {}).items():
        if name not in data.types:
            close = difflib.get_close_matches(name, data.types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its types are {', '.join(data.types)}"
            raise NunerError(f"{key}: {data.name} has no type {name!r}; {hint}")
        if not isinstance(meaning, str) or not meaning.strip():
            raise NunerError(f"{key}: the meaning of {name!r} is {meaning!r}; give a text")
    return {name: " ".join((given or {}).get(name, in_words(name)).split()) for name in data.types}


def make_prompt(definitions: Mapping[str, str], examples: Sequence[Record], text: str) -> str:
    """The message that asks for the entities of a text.

    Args:
      definitions: of every type.
      examples: sentences with their entities, shown in the form that an answer has; none is zero-shot.
      text: stands at the end, as it is.
    """
    types = "\n".join(name if meaning == name else f"{name}: {meaning}" for name, meaning in definitions.items())
    before, _, behind = TASK.partition("[TYPES]")
    shown = [f"Input: {example.text}\nOutput:\n{answer_of(example)}" for example in examples]
    return "\n\n".join([before + types + behind, *shown, f"Input: {text}\nOutput:"])


def answer_of(record: Record) -> str:
    """The right answer about a text: its entities in their order, a line each."""
    lines = [f"{record.text[one.start : one.end]} {DELIMITER} {one.concept}" for one in record.entities]
    return "\n".join(lines) or NOTHING
