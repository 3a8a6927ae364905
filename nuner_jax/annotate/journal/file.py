"""The file under a journal: its tables, its lock, and the errors by which a wrong one is refused."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from nuner_jax.errors import NunerError
from nuner_jax.folders import writing

VERSION = 1
"""Of the tables; a program refuses the journals of a later one."""
_APPLICATION = 0x4E754E52  # "NuNR" in the head of the file

_TABLES = (
    """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- One row per unit ever selected. position: in the current selection, NULL if not in it. attempts: all of them,
-- also the number of the last one. excused: how many of them do not count against the limit (lost ones, and those
-- before a retry of failed units). last: serial of the last attempt, which is the done one of a done unit.
CREATE TABLE units (
  id TEXT NOT NULL PRIMARY KEY,
  position INTEGER,
  text TEXT NOT NULL,
  source TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'asked', 'done', 'failed')),
  attempts INTEGER NOT NULL DEFAULT 0,
  excused INTEGER NOT NULL DEFAULT 0,
  last INTEGER
);
CREATE UNIQUE INDEX units_in_order ON units (position);
CREATE INDEX units_pending ON units (position) WHERE state = 'pending' AND position IS NOT NULL;

-- One row per unit and attempt. request: serial of its first row; that row holds the money (picodollars), the
-- tokens and the answer's id of the whole request, and each row the completion of its own unit. cost: NULL while no
-- price is known.
CREATE TABLE attempts (
  serial INTEGER PRIMARY KEY,
  request INTEGER NOT NULL,
  batch INTEGER,
  unit TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  state TEXT NOT NULL DEFAULT 'asked' CHECK (state IN ('asked', 'done', 'retry', 'failed', 'lost')),
  reserved INTEGER NOT NULL DEFAULT 0,
  cost INTEGER DEFAULT 0,
  unsure INTEGER NOT NULL DEFAULT 0,
  prompt_tokens INTEGER NOT NULL DEFAULT 0,
  completion_tokens INTEGER NOT NULL DEFAULT 0,
  cached_tokens INTEGER NOT NULL DEFAULT 0,
  began REAL NOT NULL,
  ended REAL,
  answer_id TEXT NOT NULL DEFAULT '',
  finish TEXT NOT NULL DEFAULT '',
  error TEXT NOT NULL DEFAULT '',
  completion TEXT NOT NULL DEFAULT '',
  UNIQUE (unit, attempt)
);
CREATE INDEX attempts_asked ON attempts (request) WHERE state = 'asked';

CREATE TABLE batches (
  key INTEGER PRIMARY KEY,
  file TEXT NOT NULL DEFAULT '',
  id TEXT NOT NULL DEFAULT '',
  state TEXT NOT NULL DEFAULT 'prepared' CHECK (state IN ('prepared', 'submitted', 'collected', 'failed')),
  requests INTEGER NOT NULL
);
""".strip()
    .removesuffix(";")
    .split(";\n")
)

_NONE_YET = "{}: there is no journal yet; the stage `request` makes it"
_ADVICE = {
    sqlite3.SQLITE_FULL: "free space there and start again: everything recorded so far is kept",
    sqlite3.SQLITE_IOERR: "free space there, or look at the disk, and start again: everything recorded so far is kept",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable, or choose another folder",
    sqlite3.SQLITE_CANTOPEN: "make the file and its folder readable and writable, or choose another folder",
    sqlite3.SQLITE_PERM: "make the file and its folder writable, or choose another folder",
    sqlite3.SQLITE_BUSY: "another program holds it open for writing: close that one",
    sqlite3.SQLITE_NOTADB: "this is no journal: choose another folder, or move the file away",
    sqlite3.SQLITE_CORRUPT: "the file is damaged: restore a copy, or save what is readable with "
    "`sqlite3 journal.sqlite .recover | sqlite3 saved.sqlite` and put saved.sqlite in its place",
}


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns what SQLite says of a full disk, a damaged file and the like into a `NunerError` with the path."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        advice = _ADVICE.get(error.sqlite_errorcode & 0xFF) if hasattr(error, "sqlite_errorcode") else None
        if advice is None:  # of this program, not of the file
            raise
        raise NunerError(f"{path}: {error}; {advice}") from error


def hold(path: Path) -> filelock.FileLock:
    """Takes the lock beside a journal.

    It is one of the operating system (flock), so it goes with its process, however that ends.

    Raises:
      NunerError: another process has it; or the folder cannot be written.
    """
    # thread_local=False: whoever closes the journal may be another thread than the one that opened it.
    lock = filelock.FileLock(path.parent / f".{path.name}.lock", thread_local=False)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise NunerError(
                f"{path}: in use by {_holder(path)}; one process at a time writes a journal: wait for it, stop it, "
                "or give each process its own folder (config.source.shard makes disjoint parts)"
            ) from None
    return lock


class Reserve:
    """Space on the disk for answers that are paid for but not yet recorded, should the disk fill up meanwhile.

    It is a file beside the journal, given back when the answers need the space.
    """

    SIZE = 16 << 20
    """Bytes. 256 answers of 1,024 tokens, twice (in the WAL and in the file), with their pages of the indexes."""

    def __init__(self, path: Path):
        self._journal = path
        self._file = path.parent / f".{path.name}.reserve"
        self._held = False

    def take(self) -> None:
        """Occupies the space, if that is not done yet.

        Raises:
          NunerError: there is not as much.
        """
        if self._held:
            return
        with writing(self._journal):
            try:
                with self._file.open("wb") as file:
                    _allocate(file, self.SIZE)
            except OSError:
                self._file.unlink(missing_ok=True)
                raise
        self._held = True

    def give(self) -> bool:
        """Frees the space; whether there was any to free."""
        held, self._held = self._held, False
        self._file.unlink(missing_ok=True)
        return held


def connect(path: Path, *, write: bool) -> sqlite3.Connection:
    """Opens the file, for one writer or for a reader beside it.

    Raises:
      NunerError: it cannot be opened; or its file system has no shared memory, which a journal needs.
    """
    with named(path):
        if not write:
            return _reader(path)
        db = _plain(path, "rwc")
        try:
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                raise NunerError(f"{path}: the file system cannot hold a SQLite WAL journal; choose a local disk")
            db.execute("PRAGMA synchronous = FULL")  # COMMIT returns when the disk has it
            return db
        except BaseException:
            db.close()
            raise


def prepare(path: Path, db: sqlite3.Connection, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """Makes the tables of a new journal, or checks those of an old one; notes that this process holds it.

    Returns and raises as `check`.
    """
    with named(path):
        if _is_empty(db):
            # Within one transaction: a journal is there wholly or not at all.
            db.executescript(
                f"BEGIN IMMEDIATE; PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION};"
            )
            for statement in _TABLES:
                db.execute(statement)
            db.execute("INSERT INTO meta VALUES ('identity', ?)", (json.dumps(identity or {}),))
            db.execute("COMMIT")
        identity = check(path, db, identity)
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
        db.execute("INSERT OR REPLACE INTO meta VALUES ('holder', ?)", (holder,))
    return identity


def check(path: Path, db: sqlite3.Connection, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """The identity that a journal holds.

    Args:
      path: of the file.
      db: a connection to it.
      identity: what it should be; None: anything.

    Raises:
      NunerError: no journal, one of a later program, or one of another identity (each difference is listed).
    """
    with named(path):
        if _is_empty(db):  # another process is about to make it, or was killed just then
            raise NunerError(_NONE_YET.format(path))
        application, version = _mark(db)
        if application != _APPLICATION:
            raise NunerError(f"{path}: this is no journal of annotations; choose another folder, or move the file away")
        if version > VERSION:
            raise NunerError(
                f"{path}: written by a later nuner_jax (tables of version {version}; this one knows {VERSION}); "
                "update nuner_jax, or choose another folder"
            )
        (stored,) = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
    there = json.loads(stored)
    here = there if identity is None else json.loads(json.dumps(identity))  # as it would be read back
    if there != here:
        lines = "\n".join(f"  {line}" for line in differences(there, here))
        raise NunerError(
            f"{path}: made with another prompt or model, and one journal holds the answers to one question:\n{lines}\n"
            "give the new one its own --workdir, or go back to the old configuration"
        )
    return there


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Lines `key: there -> here` of what differs between two identities; long values are shown where they do."""
    old, new = _flat(there), _flat(here)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key, "(not set)"), new.get(key, "(not set)")
        if a != b:
            at = len(os.path.commonprefix([a, b]))
            lines.append(f"{key}: {_excerpt(a, at)} -> {_excerpt(b, at)}")
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value, ensure_ascii=False)
    return flat


def _excerpt(value: str, at: int, length: int = 80) -> str:
    """At most `length` characters of a value around place `at`, with its whole length if it was cut."""
    if len(value) <= length:
        return value
    start = max(0, min(at - length // 4, len(value) - length))
    head, tail = "…" * (start > 0), "…" * (start + length < len(value))
    return f"{head}{value[start : start + length]}{tail} ({len(value)} characters)"


def _allocate(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:  # macOS
        file.write(bytes(size))


def _mark(db: sqlite3.Connection) -> tuple[int, int]:
    """What the head of the file says: which program it belongs to, and the version of its tables."""
    return db.execute("PRAGMA application_id").fetchone()[0], db.execute("PRAGMA user_version").fetchone()[0]


def _is_empty(db: sqlite3.Connection) -> bool:
    return _mark(db) == (0, 0) and not db.execute("SELECT 1 FROM sqlite_master").fetchone()


def _plain(path: Path, mode: str, more: str = "") -> sqlite3.Connection:
    # Of its threads only one uses a connection at a time; SQLite's own mutex guards it besides.
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}{more}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=30,
    )


def _reader(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise NunerError(_NONE_YET.format(path))
    # Where it may, the connection opens for writing, although it never does: so its end tidies the WAL away.
    db = _plain(path, "rw" if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK) else "ro")
    try:
        db.execute("PRAGMA query_only = ON")
        db.execute("SELECT 1 FROM sqlite_master").fetchone()
        return db
    except sqlite3.OperationalError:
        db.close()
        # A reader wants a file of shared memory beside the journal. Where none can be made, nobody writes either.
        if os.access(path.parent, os.W_OK) or path.with_name(f"{path.name}-wal").exists():
            raise
        return _plain(path, "ro", "&immutable=1")


def _holder(path: Path) -> str:
    """Who has the lock, as far as the journal tells."""
    try:
        with contextlib.closing(connect(path, write=False)) as db:
            holder = json.loads(db.execute("SELECT value FROM meta WHERE key = 'holder'").fetchone()[0])
        return f"process {holder['pid']} on {holder['host']}"
    except (NunerError, sqlite3.Error, TypeError):
        return "another process"
