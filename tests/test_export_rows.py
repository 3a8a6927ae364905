"""Rows of the published format: what is exported is what an import builds again."""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from nuner_jax.data import builder
from nuner_jax.data.export_rows import export_rows
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError


@pytest.fixture(scope="module")
def sample(rows_file, tmp_path_factory) -> Path:
    """400 records of the embedded sample: every mention is an occurrence of its annotation."""
    return builder.ensure_built(str(rows_file), tmp_path_factory.mktemp("cache"))


def records_of(folder: Path) -> list[Record]:
    return [record for split in builder.splits(folder) for record in builder.open_split(folder, split)]


def fingerprint_in_text_order(folder: Path, out: Path) -> str:
    """The fingerprint of the same records in an order that does not depend on where they were read."""
    builder.build(sorted(records_of(folder), key=lambda record: record.text), out)
    return builder.fingerprint(out)


def small(folder: Path, *records: Record) -> Path:
    builder.build(records, folder, validation_fraction=0)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_importing_what_was_exported_gives_the_same_records(sample, tmp_path, name):
    written = export_rows(sample, tmp_path / name)
    assert (written.rows, written.left_out) == (400, 0)
    options = builder.BuildOptions(format="nuner")
    builder.build_inputs([str(tmp_path / name)], tmp_path / "again", options)
    report = builder.read_report(tmp_path / "again")["report"]
    assert report["annotations_found"] == written.annotations
    assert report["annotations_not_in_text"] == 0
    assert fingerprint_in_text_order(tmp_path / "again", tmp_path / "a") == fingerprint_in_text_order(
        sample, tmp_path / "b"
    )
    assert [path.name for path in tmp_path.iterdir() if "building" in path.name] == []


def test_the_same_data_gives_the_same_bytes(sample, tmp_path):
    for name in ("rows.jsonl.gz", "rows.parquet"):
        for folder in ("a", "b"):
            export_rows(sample, tmp_path / folder / name)
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
    assert not any((tmp_path / "a" / "rows.jsonl.gz").read_bytes()[4:8])  # no time of writing


def test_an_annotation_stands_once_in_order_of_first_appearance(tmp_path):
    text = "Rome, Paris, Rome"
    entities = (Entity(0, 4, "city", "a 'big' one"), Entity(6, 11, "city"), Entity(13, 17, "city", "a 'big' one"))
    data = small(tmp_path / "d", Record(text, (*entities, Entity(13, 17, "name"))))
    export_rows(data, tmp_path / "full.jsonl.gz")
    (row,) = rows_of(tmp_path / "full.jsonl.gz")
    assert row["input"] == text
    assert ast.literal_eval(row["output"]) == ["Rome <> city <> a 'big' one", "Paris <> city", "Rome <> name"]
    export_rows(data, tmp_path / "entity.jsonl.gz", form="entity")
    (row,) = rows_of(tmp_path / "entity.jsonl.gz")
    assert ast.literal_eval(row["output"]) == ["Rome <> city", "Paris <> city", "Rome <> name"]


def test_what_holds_the_delimiter_is_left_out_and_counted(tmp_path):
    entities = (Entity(0, 6, "operator"), Entity(0, 1, "x", "less <> more"), Entity(0, 1, "a<>b"), Entity(5, 6, "x"))
    data = small(tmp_path / "d", Record("a <> b", entities))
    written = export_rows(data, tmp_path / "full.jsonl.gz")
    assert (written.annotations, written.left_out) == (1, 3)
    assert rows_of(tmp_path / "full.jsonl.gz")[0]["output"] == "['b <> x']"
    written = export_rows(data, tmp_path / "entity.jsonl.gz", form="entity")
    assert (written.annotations, written.left_out) == (2, 2)


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path):
    data = small(tmp_path / "d", Record("Rome", (Entity(0, 4, "city"),)))
    out = tmp_path / "rows.jsonl"
    out.write_text("precious")
    with pytest.raises(NunerError, match=r"rows\.jsonl is there already; .*--overwrite"):
        export_rows(data, out)
    assert out.read_text() == "precious"
    export_rows(data, out, overwrite=True)
    assert json.loads(out.read_text()) == {"input": "Rome", "output": "['Rome <> city']"}


def test_a_text_without_entities_is_a_row_too(tmp_path):
    data = small(tmp_path / "d", Record("nothing here"))
    export_rows(data, tmp_path / "rows.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist() == [
        {"input": "nothing here", "output": "[]"}
    ]


def test_the_command_tells_what_it_wrote_and_what_is_wrong(tmp_path, root):
    small(tmp_path / "d", Record("a <> b", (Entity(0, 6, "operator"), Entity(0, 1, "letter"))))

    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "nuner_jax.data.export_rows", *flags]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run("--data=d", "--out=out/rows.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "out/rows.jsonl: 1 rows with 1 annotations",
        "left out: 1 annotations with '<>' inside, which no reader could take apart",
        "rows hold no places: importing them finds every occurrence of a surface in its text again",
    ]
    for flags, message in [
        (["--out=rows.jsonl"], "--data=DIR and --out=FILE are needed"),
        (["--data=d", "--out=rows.csv"], "must end with .jsonl, .jsonl.gz, .parquet"),
        (["--data=no", "--out=rows.jsonl"], "no: holds no data set"),
        (["d", "--out=rows.jsonl"], "unexpected argument 'd'"),
    ]:
        done = run(*flags)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ") and message in done.stderr
