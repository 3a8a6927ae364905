"""The one record type: a text and its entities, as character spans with a concept each; and the hash of a text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT_HASHES = 2**64  # values of `text_hash`


@dataclass(frozen=True, slots=True)
class Entity:
    """A mention: `text[start:end]` instantiates `concept`.

    `start` and `end` (exclusive) count characters (Python code points), not bytes and not tokens.
    `description` is the annotator's gloss of the concept, often empty.

    Raises `ValueError` for an empty span, a negative start or an empty concept.
    """

    start: int
    end: int
    concept: str
    description: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"an entity needs 0 <= start < end, not [{self.start}, {self.end})")
        if not self.concept.strip():
            raise ValueError(f"the entity [{self.start}, {self.end}) has an empty concept")


@dataclass(frozen=True, slots=True)
class Record:
    """A text with its entities, which may overlap; `ValueError` if one ends beyond the text."""

    text: str
    entities: tuple[Entity, ...] = ()

    def __post_init__(self) -> None:
        for entity in self.entities:
            if entity.end > len(self.text):
                raise ValueError(
                    f"the entity [{entity.start}, {entity.end}) ends beyond its text"
                    f" of {len(self.text)} characters: {self.text[:60]!r}"
                )

    def as_dict(self) -> dict[str, Any]:
        """The record as plain data: a line of the `spans` format, and an example of the shards."""
        return {
            "text": self.text,
            "entities": [
                {
                    "start": entity.start,
                    "end": entity.end,
                    "concept": entity.concept,
                    "description": entity.description,
                }
                for entity in self.entities
            ],
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Record:
        """The inverse of `as_dict`; `KeyError` or `ValueError` for anything else."""
        return cls(row["text"], tuple(Entity(**entity) for entity in row["entities"]))


def text_hash(text: str) -> int:
    """64 bits of the text, which decide its split: among a million texts two agree with a chance of 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
