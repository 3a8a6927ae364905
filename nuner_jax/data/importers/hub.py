"""Data files of a data set on the Hugging Face hub, fetched by name into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from nuner_jax.errors import NunerError

HUB_PREFIX = "hf:"
_NAME = re.compile(r"hf:(?://)?(?P<repo>[^/@:]+/[^/@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<part>.+))?")
_DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")
_SHARD_SUFFIX = re.compile(r"[-_.]\d{3,}(-of-\d+)?(-[0-9a-f]{8,})?$")
TIMEOUT_S = 10.0  # for the listing; a hub that does not answer by then counts as unreachable


def fetch(name: str) -> list[Path]:
    """Downloads the data files that `name` means, and returns their local paths in order.

    `name` is `hf:org/data_set[@revision][:part]`, where the part is a configuration or split, such
    as `hf:numind/NuNER:full`. A data set already in the hub's cache needs no network.

    Raises `NunerError` if the name is malformed, the hub cannot be reached, the data set does not
    exist, or its files do not tell which part is meant.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise NunerError(f"{name}: a hub data set is hf:org/name[@revision][:part]")
    repo, revision, part = match["repo"], match["revision"], match["part"]
    try:
        return _fetch_online(name, repo, revision, part)
    except NunerError:
        raise
    except Exception as error:  # the hub client's exceptions differ from release to release
        folder = _cached_folder(repo, revision)
        if folder is None:
            raise NunerError(
                f"{name}: cannot be fetched from the Hugging Face hub"
                f" ({type(error).__name__}: {str(error).strip().splitlines()[0]});"
                " check the name and the network, or download its files and give their paths"
            ) from error
        files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
        return [folder / file for file in choose_files(name, files, part)]


def choose_files(name: str, files: list[str], part: str | None) -> list[str]:
    """Of a data set's files, those that hold the data of `part` (all, if there is only one part).

    A part is told by a folder ("full/train.jsonl") or by the file's name without its shard numbers
    ("data/full-00000-of-00002.parquet"). Raises `NunerError` if no file, or no one part, is meant.
    """
    data = sorted(file for file in files if file.lower().endswith(_DATA_SUFFIXES))
    if not data:
        raise NunerError(f"{name}: holds no parquet, JSONL, JSON or CSV file")
    parts = {file: _part_names(file) for file in data}
    if part is None:
        stems = sorted({names[-1] for names in parts.values()})
        if len(stems) > 1:
            raise NunerError(
                f"{name}: holds several parts, choose one as {name}:{stems[0]}; there are: {', '.join(stems)}"
            )
        return data
    chosen = [file for file in data if part in parts[file]]
    if not chosen:
        known = sorted({one for names in parts.values() for one in names if one != "data"})
        raise NunerError(f"{name}: has no part {part!r}; there are: {', '.join(known)}")
    return chosen


def _fetch_online(name: str, repo: str, revision: str | None, part: str | None) -> list[Path]:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().dataset_info(repo, revision=revision, timeout=TIMEOUT_S)
    files = choose_files(name, [sibling.rfilename for sibling in info.siblings or ()], part)
    return [Path(hf_hub_download(repo, file, repo_type="dataset", revision=info.sha)) for file in files]


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
    except Exception:  # nothing usable in the cache: the caller reports why the hub failed
        return None
    return Path(folder)


def _part_names(file: str) -> list[str]:
    """The names by which a file's part may be called: its folders, then its stem."""
    path = PurePosixPath(file)
    stem = path.name.split(".")[0]
    return [*path.parts[:-1], _SHARD_SUFFIX.sub("", stem)]
