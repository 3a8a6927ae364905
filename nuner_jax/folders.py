"""Folders that appear wholly or not at all, whatever happens while they are made."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nuner_jax.errors import NunerError


@contextlib.contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, on the same file system so that a rename is atomic."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}.building-", dir=out.parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a failing file system (full, read-only, not permitted) into an error with its path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise NunerError(f"{out}: cannot be written ({reason}); free space there, or choose another folder") from error


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock file beside `target`, so that processes of one host build it once."""
    from filelock import FileLock

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
