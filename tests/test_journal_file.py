"""A file that is the wrong journal, a broken one or none is refused by name."""

import contextlib
import os
import pathlib
import sqlite3
import tempfile

import pytest
from journals import IDENTITY, new, start

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.units import Unit
from nuner_jax.errors import NunerError


def refused(path, identity=IDENTITY, **more) -> str:
    with pytest.raises(NunerError) as error:
        Journal.open(path, identity, **more)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("read_only", [False, True])
def test_another_prompt_or_model_is_refused_with_all_that_differs(tmp_path, read_only):
    path = tmp_path / "journal.sqlite"
    new(tmp_path).close()
    other = {"model": "other", "temperature": 0.0, "seed": 1, "prompt": {"template": "Label", "units": 1}}
    message = refused(path, other, read_only=read_only)
    assert message.splitlines()[1:-1] == [
        '  model: "gpt" -> "other"',
        '  prompt.template: "Label [INPUT SENTENCE]" -> "Label"',
        "  seed: (not set) -> 1",
    ]
    assert "--workdir" in message.splitlines()[-1]
    with Journal.open(path, IDENTITY, read_only=read_only) as journal:  # the lock was given back
        assert journal.identity == IDENTITY
    with Journal.open(path, read_only=True) as journal:
        assert journal.identity == IDENTITY


def test_a_long_template_is_shown_where_it_differs(tmp_path):
    path = tmp_path / "journal.sqlite"
    Journal.open(path, {"template": "a" * 1000 + " NEW " + "b" * 1000}).close()
    line = refused(path, {"template": "a" * 1000 + " OLD " + "b" * 1000}).splitlines()[1]
    assert "NEW" in line.partition(" -> ")[0] and "OLD" in line.partition(" -> ")[2]
    assert line.count("(2007 characters)") == 2 and len(line) < 300


def test_an_identity_is_compared_as_it_is_read_back(tmp_path):
    for _ in range(2):
        with Journal.open(tmp_path / "journal.sqlite", {"keys": ("a", "b"), "none": None, "number": 1.5}) as journal:
            assert journal.identity == {"keys": ["a", "b"], "none": None, "number": 1.5}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to have a head\n" * 100, b"\x00" * 5000, b"short"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path, content, read_only):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(content)
    assert "no journal" in refused(path, read_only=read_only)
    assert path.read_bytes() == content


@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_another_program_is_refused(tmp_path, read_only):
    path = tmp_path / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE meta (name TEXT)")
    assert "this is no journal" in refused(path, read_only=read_only)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("meta",)]


@pytest.mark.parametrize("read_only", [False, True])
def test_a_journal_of_a_later_program_is_refused(tmp_path, read_only):
    new(tmp_path).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as db:
        db.execute("PRAGMA user_version = 2")
    assert "later nuner_jax (tables of version 2" in refused(tmp_path / "journal.sqlite", read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_damaged_journal_is_refused_with_a_way_to_save_it(tmp_path, read_only):
    path = tmp_path / "journal.sqlite"
    new(tmp_path, [Unit.of(f"text {number} " * 50, "a") for number in range(300)]).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + os.urandom(len(whole) - 4096))
    with (
        pytest.raises(NunerError, match=rf"{path}: .*; the file is damaged: restore a copy"),
        Journal.open(path, IDENTITY, read_only=read_only) as journal,
    ):
        journal.totals()
        list(journal.completions())


def test_there_must_be_a_journal_to_read(tmp_path):
    message = refused(tmp_path / "none" / "journal.sqlite", read_only=True)
    assert "there is no journal yet" in message
    assert not (tmp_path / "none").exists()
    (tmp_path / "journal.sqlite").touch()  # its maker was killed just then
    assert "there is no journal yet" in refused(tmp_path / "journal.sqlite", read_only=True)
    new(tmp_path).close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(NunerError, match=f"{tmp_path}/file/journal.sqlite: cannot be written"):
        Journal.open(tmp_path / "file" / "journal.sqlite", {})
    (tmp_path / "journal.sqlite").mkdir()
    assert "unable to open database file; make the file" in refused(tmp_path / "journal.sqlite")


def test_a_read_only_folder_can_be_read_and_not_written():
    """Root writes everywhere, so as root this is tried by another user's process."""
    script = """
        import os, sys
        from pathlib import Path
        from nuner_jax.annotate.journal.journal import Journal
        from nuner_jax.errors import NunerError
        path = Path(sys.argv[1]) / "journal.sqlite"
        if os.geteuid() == 0:
            os.setuid(65534)
        with Journal.open(path, read_only=True) as journal:
            print(len(list(journal.completions())))
        try:
            Journal.open(path)
        except NunerError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, whose parents are closed to other users
        folder = pathlib.Path(name)
        new(folder).close()
        (folder / ".journal.sqlite.lock").unlink()
        (folder / "journal.sqlite").chmod(0o444)
        folder.chmod(0o555)
        units, message = start(script, folder).communicate(timeout=30)[0].splitlines()
        folder.chmod(0o755)
    assert units == "10"
    assert message.startswith(f"{folder}/journal.sqlite: cannot be written (Permission denied")
