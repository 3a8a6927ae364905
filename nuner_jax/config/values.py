"""The values of a config held to its schema: known keys, choices and bounds."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from nuner_jax.errors import NunerError


class Schema(Protocol):
    """A module that says what the values of its keys may be.

    AT_MOST: upper bounds of values that are at least 0. FREE_KEYS: beginnings of keys that the user makes up.
    """

    CHOICES: Mapping[str, Sequence[Any]]
    AT_LEAST: Mapping[str, float]
    AT_MOST: Mapping[str, float]
    FREE_KEYS: tuple[str, ...]


def check_values(config: ConfigDict, default: ConfigDict, schema: Schema, at: str = "config") -> None:
    """Refuses keys that the default has not, and values that no run could use.

    Args:
      config: what the user gave.
      default: with all the keys there are.
      schema: what they may be.
      at: where the user finds the keys.

    Raises:
      NunerError: naming the key, its value and what it may be.
    """
    flat, known = dict(leaves(config)), dict(leaves(default))
    if missing := [key for key in known if key not in flat and not key.startswith(schema.FREE_KEYS)]:
        raise NunerError(f"{at}.{missing[0]}: the key is missing; begin with the defaults, and change what differs")
    for key in flat:
        if key not in known and not key.startswith(schema.FREE_KEYS):
            raise NunerError(f"{at}.{key}: no such key{nearest(key, list(known))}")
    for key, allowed in schema.CHOICES.items():
        if flat[key] not in allowed:
            raise NunerError(f"{at}.{key} = {flat[key]!r}: choose one of {', '.join(map(repr, allowed))}")
    for key, least in schema.AT_LEAST.items():
        if flat[key] is not None and not flat[key] >= least:  # so that NaN is refused too
            raise NunerError(f"{at}.{key} = {flat[key]}: at least {least} is needed")
    for key, most in schema.AT_MOST.items():
        if not 0 <= flat[key] <= most:
            raise NunerError(f"{at}.{key} = {flat[key]}: between 0 and {most} is needed")


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name of every key that holds no further ones, and its value."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(key: str, known: Sequence[str]) -> str:
    """A hint, for the end of a message: the keys most like this one, by their last part or a word of it."""

    def likeness(name: str) -> float:
        last = name.rpartition(".")[2]
        words = [last, *last.split("_")]
        return max(difflib.SequenceMatcher(None, key.rpartition(".")[2], word).ratio() for word in words)

    close = sorted((name for name in known if likeness(name) > 0.7), key=likeness, reverse=True)[:3]
    return f"; did you mean {' or '.join(close)}?" if close else f"; the keys are {', '.join(known)}"
