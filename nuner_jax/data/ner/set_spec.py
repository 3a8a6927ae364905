"""What a config says about a data set, and which files it means by that."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nuner_jax.data.importers.hub import HUB_PREFIX, fetch
from nuner_jax.data.importers.tfds_rows import TFDS_PREFIX, TfdsSplit
from nuner_jax.data.ner.named_sets import ANY_FOLDER, NAMED
from nuner_jax.data.ner.tagged_files import TagLayout
from nuner_jax.errors import NunerError

SPLITS = ("train", "test", "dev")
SHARED = ("test", "dev")  # those that may be a share of train
FORMATS = ("conll", "tokens", "gliner", "spans")  # those that say where each mention stands
CHOICES = {
    "format": ("auto", *FORMATS),
    "words": ("auto", "space", "text"),
    "invalid_tags": ("repair", "refuse"),
    "malformed": ("refuse", "skip"),
}
_TEXTS = ("set", "path", "comment", "tag_key")
_Files = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SetSpec:
    """What stands under `config.sets.NAME`.

    name: what tables call the set. set: its name in named_sets.py; "": the same.
    train, test, dev: a file, `hf:org/data_set[@revision]:part[/split]`, `tfds:NAME_OR_FOLDER[:SPLIT]` (by default
      train, test and validation), or several of them. test and dev may be shares of the train file, told by the hash
      of each text; dev may be missing.
    path: a folder with the files of those splits that are not given.
    format: one of `FORMATS`; "auto": told from each file.
    word_column, tag_column, comment, tag_key: as in `TagLayout`. labels: the tags of the numbers 0, 1, …, or a JSON
      file (or its `hf:` name) with {tag: number}.
    words: "space" if texts are words joined by one space each, "text" for running text; "auto": by the format.
    invalid_tags: tags that may not stand where they do: "repair" and count them, or "refuse" the file.
    malformed: rows that cannot be read: "refuse" the file, or "skip" and count them.
    version: which version of the data it is, for the report.
    """

    name: str
    set: str = ""
    train: _Files = ""
    test: _Files | float = ""
    dev: _Files | float = ""
    path: str = ""
    format: str = "auto"
    word_column: int = 0
    tag_column: int = -1
    comment: str = ""
    tag_key: str = "ner_tags"
    labels: _Files = ()
    words: str = "auto"
    invalid_tags: str = "repair"
    malformed: str = "refuse"
    version: str = ""

    def key(self, name: str) -> str:
        """How the user writes a key of this set."""
        return f"config.sets.{self.name}.{name}"

    def shares(self) -> dict[str, float]:
        """The splits that are a share of the train file."""
        return {split: float(value) for split in SHARED if _is_share(value := getattr(self, split))}


def resolve(given: Mapping[str, Any]) -> SetSpec:
    """The spec of the given keys, completed from what is known about a set by name and from its folder.

    None counts as not given.

    Raises:
      NunerError: a key or a value is unknown; the set is neither given nor known; its folder lacks a file.
    """
    keys = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if value is not None
    }
    _check(keys)
    spec = SetSpec(**keys)
    known = NAMED.get(spec.set or spec.name)
    if spec.set and not known:
        raise NunerError(f"{spec.key('set')} = {spec.set!r}: {_unknown_name(spec.set)}")
    if spec.path:
        found = _in_folder(spec)
        if known and known.states_version and not spec.version:
            raise NunerError(f"{spec.key('version')} is not set; say which it is: {known.about}")
    elif spec.train:
        return spec
    elif not known:
        raise NunerError(f"{spec.key('train')} is not set, nor is its path, and {_unknown_name(spec.name)}")
    else:
        found = known.embedded or known.hub
        if not found:
            raise NunerError(
                f"{spec.key('path')} is not set: give a folder with its files; {known.about}. It is on the Hugging Face"
                " hub under no name that this project is sure of"
            )
    return SetSpec(**{**found, **keys})


def split_files(spec: SetSpec) -> dict[str, list[Path | TfdsSplit]]:
    """The sources of each split, fetched where they are on the hub; none for a split that is a share or missing.

    Raises:
      NunerError: a file is missing or cannot be fetched, or there is no test split of its own.
    """
    shares = spec.shares()
    if not spec.test:
        raise NunerError(
            f"{spec.key('test')} is not set: a set without a test split cannot be scored, and none is made up; name"
            ' its file, or a share of the train file, as in "test": 0.5'
        )
    if shares and not (min(shares.values()) > 0 and sum(shares.values()) < 1):
        raise NunerError(
            f"{spec.key('test')} = {spec.test!r}, dev = {spec.dev!r}: shares are above 0, and below 1 together"
        )
    files = {
        split: []
        if split in shares
        else [one for name in _names(getattr(spec, split)) for one in _open(spec, name, split)]
        for split in SPLITS
    }
    for split, other in (("test", "train"), ("dev", "train"), ("dev", "test")):
        if same := {*map(_identity, files[split])} & {*map(_identity, files[other])}:
            raise NunerError(
                f"{spec.key(split)}: {min(same)} is the {other} split too; name another file"
                + ("" if other == "test" else f', or a share of it, as in "{split}": 0.5')
            )
    return files


def tag_layout(spec: SetSpec) -> TagLayout:
    """Where words and tags stand; raises `NunerError` if the file of the labels cannot be read."""
    labels = spec.labels
    if isinstance(labels, str) and labels:
        (path,) = _fetch(spec, labels)
        try:
            numbers = json.loads(path.read_text(encoding="utf-8"))
            labels = tuple(sorted(numbers, key=numbers.__getitem__))
            if [numbers[label] for label in labels] != list(range(len(labels))):
                raise ValueError("its numbers are not 0, 1, 2, …")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise NunerError(f"{spec.key('labels')}: {path} is no JSON object {{tag: number}} ({error})") from error
    return TagLayout(spec.word_column, spec.tag_column, spec.comment, spec.tag_key, tuple(labels))


def _check(keys: Mapping[str, Any]) -> None:
    name = keys.get("name", "")
    if not name:
        raise NunerError("a data set needs a name")
    types = {field.name: field.default for field in dataclasses.fields(SetSpec)}
    for key, value in keys.items():
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(types)}"
            raise NunerError(f"config.sets.{name}.{key}: no such key; {hint}")
        if key in CHOICES and value not in CHOICES[key]:
            choices = ", ".join(map(repr, CHOICES[key]))
            raise NunerError(f"config.sets.{name}.{key} = {value!r}: choose one of {choices}")
        if key in _TEXTS and not isinstance(value, str):
            raise NunerError(f"config.sets.{name}.{key} = {value!r}: a text")
        if key in ("word_column", "tag_column") and not isinstance(value, int):
            raise NunerError(f"config.sets.{name}.{key} = {value!r}: a column is a whole number, from 0")
        if key in ("train", "test", "dev", "labels") and not (_is_names(value) or key in SHARED and _is_share(value)):
            what = (
                "tags, or a file of them"
                if key == "labels"
                else "a file, or several" + ", or a share" * (key in SHARED)
            )
            raise NunerError(f"config.sets.{name}.{key} = {value!r}: {what}")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, tuple) and all(isinstance(one, str) for one in value)


def _names(value: _Files) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value)


def _open(spec: SetSpec, name: str, split: str) -> list[Path] | list[TfdsSplit]:
    """The sources of one name."""
    if name.startswith(TFDS_PREFIX):
        return [TfdsSplit.parse(name, "validation" if split == "dev" else split)]
    return _fetch(spec, name)


def _identity(source: Path | TfdsSplit) -> str:
    return f"{TFDS_PREFIX}{source.name}:{source.split}" if isinstance(source, TfdsSplit) else str(source.resolve())


def _fetch(spec: SetSpec, name: str) -> list[Path]:
    """Local paths of one name. `hf:…:part/split` is the part, and of it the files of the split."""
    if not name.startswith(HUB_PREFIX):
        path = Path(name).expanduser()
        if not path.is_file():
            raise NunerError(f"{path}: no such file, named in config.sets.{spec.name}")
        return [path]
    source, _, part = name[len(HUB_PREFIX) :].partition(":")
    part, _, split = part.partition("/")
    paths = fetch(HUB_PREFIX + source + (f":{part}" if part else ""))
    if split:
        paths = [path for path in paths if path.parent.name == split or path.name.startswith(split)]
    if not paths:
        raise NunerError(f"{name}: {source} has no files of {split!r} under {part!r}")
    return paths


def _in_folder(spec: SetSpec) -> dict[str, Any]:
    """The keys of a set whose files lie in a folder, as it is distributed or named after their splits."""
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        raise NunerError(f"{spec.key('path')} = {spec.path}: no such folder")
    known = NAMED.get(spec.set or spec.name)
    for keys in known.folder if known else ():
        if (folder / keys["train"]).is_file():
            there = {split: str(folder / keys[split]) for split in SPLITS if split in keys}
            if "dev" in there and not Path(there["dev"]).is_file():
                del there["dev"]
            return {**keys, "dev": "", **there}
    found: dict[str, Any] = {}
    for split, stems in ANY_FOLDER.items():
        if getattr(spec, split):
            continue
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.name.split(".")[0] in stems)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise NunerError(
                f"{folder}: several files may be its {split} split ({names}); name one as {spec.key(split)}"
            )
        if files:
            found[split] = str(files[0])
    if not spec.train and "train" not in found:
        wanted = [*(keys["train"] for keys in (known.folder if known else ())), "train.txt or the like"]
        raise NunerError(f"{folder}: holds no train split; looked for {', '.join(wanted)}")
    return found


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, NAMED, n=1)
    return f"no set is known by the name {name!r}" + (
        f"; did you mean {close[0]}?" if close else f"; known are: {', '.join(NAMED)}"
    )
