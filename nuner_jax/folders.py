"""Folders: named by the user, and made wholly or not at all, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nuner_jax.errors import NunerError

_NO_MORE_FILES = {errno.EMFILE, errno.ENFILE}
_OF_WRITING = _NO_MORE_FILES | {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # not permitted
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG),  # not such a place
    *(errno.EIO, errno.ESTALE),  # broken
}


def local_path(path: str) -> Path:
    """The absolute path of a file or folder that the user names.

    Args:
      path: as it was written; `~` is the home folder.

    Raises:
      NunerError: it is the address of a bucket, of which `Path` would silently make a folder of this machine.
    """
    if "://" in path:
        raise NunerError(
            f"{path}: only folders of a file system can be used; mount the bucket (gs:// with gcsfuse, say) and give "
            "the folder where it is mounted, or take a folder that all machines share"
        )
    return Path(path).expanduser().absolute()


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
    """Turns a failing file system (full, read-only, not permitted) into an error with its path.

    Other errors of the operating system pass: a missing input or a broken connection is not for `out` to tell.
    """
    try:
        yield
    except OSError as error:
        # Libraries wrap what failed in an error without a number.
        if error.errno not in _OF_WRITING and not (error.errno is None and type(error) in (OSError, shutil.Error)):
            raise
        reason = error.strerror or str(error)
        place = f": {error.filename}" if error.filename and str(error.filename) != str(out) else ""
        advice = "free space there, or choose another folder"
        if error.errno in _NO_MORE_FILES:
            advice = "raise the limit of open files (ulimit -n)"
        raise NunerError(f"{out}: cannot be written ({reason}{place}); {advice}") from error


def check_free(folder: Path, needed: int, what: str, way_on: str, *, making_way: int = 0) -> None:
    """Compares the disk space that something will take with what is free.

    Args:
      folder: that it goes to, and is there.
      needed: bytes.
      what: they are needed for.
      way_on: what can be done beside freeing some space.
      making_way: bytes of files that will be deleted before.

    Raises:
      NunerError: it does not suffice.
    """
    free = shutil.disk_usage(folder).free + making_way
    if free < needed:
        raise NunerError(
            f"{folder}: {told_size(free)} are free, and {told_size(needed)} are needed for {what}; "
            f"free some space, {way_on}"
        )


def told_size(count: float) -> str:
    """A number of bytes for people: "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder that is there; the lock goes with this process, however that ends.

    Raises:
      NunerError: another process is in it; or it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise NunerError(
                f"{folder}: in use by another process; wait for it, stop it, or choose another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


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
