"""The schema of a language model that is asked in context: how annotation's client asks it, and what it is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ml_collections import ConfigDict

from nuner_jax.config import annotate_schema
from nuner_jax.errors import NunerError

_Bound = TypeVar("_Bound")


def _of_client(bounds: Mapping[str, _Bound]) -> dict[str, _Bound]:
    """Those of the keys that annotation's client has."""
    sections = tuple(f"{section}." for section in annotate_schema.asking())
    return {key: bound for key, bound in bounds.items() if key.startswith(sections)}


CHOICES = _of_client(annotate_schema.CHOICES) | {"endpoint.kind": ("live", "batch")}
AT_LEAST = _of_client(annotate_schema.AT_LEAST) | {"examples": 0}
AT_MOST = _of_client(annotate_schema.AT_MOST)
FREE_KEYS = ()

_NAME = re.compile(r"\w[\w.-]*")  # it is a folder's too


def llm() -> ConfigDict:
    """A language model; goes into `config.llms` under the name that tables give it."""
    return ConfigDict(
        {
            **annotate_schema.asking(),
            "examples": 64,  # sentences of a sample that are shown at most: its first ones, in the order of the pool
        }
    ).lock()


def check(config: ConfigDict, name: str) -> None:
    """What no bound on a single key can say.

    Args:
      config: an entry of `config.llms`, its values within their bounds.
      name: its name.

    Raises:
      NunerError: naming the key and what it needs.
    """
    at = f"config.llms.{name}"
    if not _NAME.fullmatch(name):
        raise NunerError(f"{at}: the name is that of a folder too: letters, digits, and - _ . behind the first")
    annotate_schema.check_asking(config, at)
