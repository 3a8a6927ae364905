"""A small corpus of several kinds of files, and what a selection of it left, for the tests of Beam."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.workdir import SELECTION_FILE, UNITS_FILE
from nuner_jax.config import annotate

SHARED_WORDS = "a storm that nobody had foreseen broke over the quiet harbour and sank four boats at their moorings"


def config_of(paths: Sequence[object], **source: Any) -> ConfigDict:
    config = annotate()
    for key, value in {"paths": tuple(map(str, paths)), **source}.items():
        config.source[key] = value
    return config


def sentences(count: int, seed: int) -> list[str]:
    """Sentences with numbers of their own; every sixth one is much like the others of its kind."""
    drawn = random.Random(seed)
    return [
        f"In year {n} {SHARED_WORDS}."
        if n % 6 == 0
        else " ".join(["Report"] + [f"w{drawn.randrange(99)}"] * 2 + [f"n{n} of {drawn.random()}."])
        for n in range(count)
    ]


def write_corpus(folder: Path) -> Path:
    """Files of three kinds, with texts that come again, malformed rows, and one empty file."""
    (folder / "a.txt").write_text("\n".join(sentences(90, 1)))
    rows = [json.dumps({"text": text}) for text in (*sentences(60, 2), *sentences(30, 1), "short")]
    (folder / "b.jsonl").write_text("\n".join([*rows[:20], "{", *rows[20:], '{"other": 1}', '{"text": 5}']))
    (folder / "c-1.txt.gz").write_bytes(gzip.compress("\n".join(sentences(40, 3)).encode()))
    (folder / "c-2.txt.gz").write_bytes(gzip.compress(b"\n"))
    return folder


def stored(folder: Path) -> tuple[bytes, dict]:
    content = json.loads((folder / SELECTION_FILE).read_text())
    del content["seconds"]
    return (folder / UNITS_FILE).read_bytes(), content
