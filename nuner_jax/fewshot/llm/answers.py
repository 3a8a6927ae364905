"""From a language model's answer to the mentions in a text; what cannot be used of it is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nuner_jax.data.align import AlignOptions, Annotation, align, fold, in_order
from nuner_jax.data.completions import parse_completion
from nuner_jax.data.ner.words import flat
from nuner_jax.data.records import Entity, Record
from nuner_jax.fewshot.llm.prompt import NOTHING

_TOLERANT = AlignOptions(match="tolerant")


@dataclass(frozen=True, slots=True)
class Found:
    """What an answer says of a text.

    record: the text with the mentions that were found, none of which overlaps another.
    left_out: lines of the answer that gave no mention, by reason: those of `parse_completion` and of `align`, and
      "unknown_type" (no type of the set), "no_place_left" (the surface stands in the text less often), "overlapping"
      (wherever it stands, a longer one does).
    """

    record: Record
    left_out: Counter[str]


class TypeNames:
    """Finds the type that a model means by a name: in any case, with spaces, hyphens or underscores."""

    def __init__(self, types: Sequence[str]):
        """Those of a data set; of two that differ in nothing else, each has to be written exactly."""
        self._exact = frozenset(types)
        keys = Counter(map(_key, types))
        self._by_key = {_key(name): name for name in types if keys[_key(name)] == 1}

    def find(self, name: str) -> str | None:
        """The type, or None."""
        return name if name in self._exact else self._by_key.get(_key(name))


def read_answer(answer: str, text: str, types: TypeNames, *, cut: bool = False) -> Found:
    """Finds the mentions that an answer names.

    A surface that is named with one type is a mention at each of its places, as in the annotation for pre-training
    (and as spaCy reads the answers of language models): many a model names it once only. Of one that is named with
    several types, the lines take the places in order. Where surfaces overlap, the longest one stands.

    Args:
      answer: as the model wrote it.
      text: what it is about.
      types: of the data set.
      cut: it ended at its token limit.
    """
    if answer.strip(" \n\r\t.`*").lower() == NOTHING:
        return Found(Record(text), Counter())
    parsed = parse_completion(answer, text, cut=cut, repeats=True)
    left_out = Counter(one.reason for one in parsed.rejected)
    named: dict[str, list[str]] = {}
    for annotation in parsed.annotations:
        name = types.find(annotation.concept)
        if name is None:
            left_out["unknown_type"] += 1
        else:
            named.setdefault(annotation.surface, []).append(name)
    places = _places(text, named, left_out)
    entities = []
    for surface, names in named.items():
        mine = [place for place in places if place.concept == surface]
        several = len(set(names)) > 1
        entities += [
            Entity(place.start, place.end, name)
            for place, name in zip(mine, names if several else names[:1] * len(mine), strict=False)
        ]
        if several and mine:
            left_out["no_place_left"] += max(0, len(names) - len(mine))
    return Found(Record(text, in_order(entities)), +left_out)


def _places(text: str, named: Mapping[str, Sequence[str]], left_out: Counter[str]) -> list[Entity]:
    """Where each surface stands, itself in place of its type; counts the lines of those that stand nowhere."""
    every: list[Entity] = []
    for surface, names in named.items():
        aligned = align(text, [Annotation(surface, surface)], _TOLERANT)
        every += aligned.entities
        for _, reason in aligned.rejected:
            left_out[reason] += len(names)
    kept = flat(Record(text, tuple(every))).entities
    for surface in {place.concept for place in every} - {place.concept for place in kept}:
        left_out["overlapping"] += len(named[surface])
    return list(kept)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", fold(name)).strip()
