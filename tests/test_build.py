"""Data sets on disk: what is built is what is read, wholly or not at all, without TensorFlow."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nuner_jax.data import builder
from nuner_jax.data.importers import ImportOptions, Report, import_records, resolve_inputs
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError

SAMPLE_FOLDER = Path(builder.__file__).parent / "sample"


def make_records(count: int) -> list[Record]:
    return [
        Record(f"Größe {n} of Rome", (Entity(0, 5, "quantity"), Entity(11 - (n < 10), 15, f"c{n}")))
        for n in range(count)
    ]


def write_rows(path: Path, records: list[Record], *extra: str) -> Path:
    lines = [json.dumps(record.as_dict()) for record in records]
    path.write_text("\n".join([*lines, *extra]) + "\n")
    return path


def run_build(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    root = Path(builder.__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "nuner_jax.data.build", *flags],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The embedded sample, built once for the tests that only read it."""
    return builder.ensure_built("sample", tmp_path_factory.mktemp("cache"))


def test_what_is_built_is_what_is_read(tmp_path):
    records = [*make_records(60), Record("no entity")]
    assert builder.build(records, tmp_path / "d", validation_fraction=0.2)
    train = builder.open_split(tmp_path / "d", "train")
    validation = builder.open_split(tmp_path / "d", "validation")
    assert {*train, *validation} == set(records)
    assert len(train) + len(validation) == 61
    assert list(train) == [train[at] for at in range(len(train))]
    assert train[-1] == train[len(train) - 1] == train[-1:][0]
    assert train.__getitems__([3, 1]) == [train[3], train[1]]
    with pytest.raises(IndexError):
        train[len(train)]


def test_a_split_can_be_sent_to_a_worker_process(tmp_path):
    builder.build(make_records(5), tmp_path / "d")
    train = builder.open_split(tmp_path / "d", "train")
    assert list(pickle.loads(pickle.dumps(train))) == list(train)


def test_the_split_depends_on_the_text_alone(tmp_path):
    records = make_records(200)
    builder.build(records, tmp_path / "all", validation_fraction=0.3)
    builder.build(records[:120][::-1], tmp_path / "part", validation_fraction=0.3)
    texts = {
        (name, split): {record.text for record in builder.open_split(tmp_path / name, split)}
        for name in ("all", "part")
        for split in ("train", "validation")
    }
    assert not texts["all", "train"] & texts["all", "validation"]
    assert texts["part", "train"] < texts["all", "train"]
    assert texts["part", "validation"] < texts["all", "validation"]
    assert 40 <= len(texts["all", "validation"]) <= 80  # 30% of 200, give or take 3 deviations


@pytest.mark.parametrize("fraction", [1e-6, 0.999999])
def test_a_tiny_set_has_a_text_in_either_split(tmp_path, fraction):
    builder.build(make_records(2), tmp_path / "d", validation_fraction=fraction)
    assert len(builder.open_split(tmp_path / "d", "train")) == 1
    assert len(builder.open_split(tmp_path / "d", "validation")) == 1


def test_without_validation_there_is_one_split(tmp_path):
    builder.build(make_records(1), tmp_path / "d", validation_fraction=0)
    assert len(builder.open_split(tmp_path / "d", "train")) == 1
    with pytest.raises(NunerError, match="no split 'validation'; it has: train"):
        builder.open_split(tmp_path / "d", "validation")
    with pytest.raises(NunerError, match="1 records are too few"):
        builder.build(make_records(1), tmp_path / "e")


def test_the_same_text_twice_is_refused(tmp_path):
    with pytest.raises(NunerError, match="record 3: this text comes twice"):
        builder.build([*make_records(2), make_records(1)[0]], tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_names_the_content(tmp_path):
    records = make_records(3)

    def built(name: str, records: list[Record], **options) -> str:
        builder.build(records, tmp_path / name, **options)
        return builder.fingerprint(tmp_path / name)

    first = built("a", records)
    # A literal, so that another machine or Python version that hashes otherwise is noticed.
    assert first == "30b306adbf85b39369e319ed3b5d6e248ef989ef1f329a8c49097c090caf594d"
    assert built("b", records) == first
    described = Entity(0, 5, "quantity", "how much")
    assert built("c", [*records[:2], Record(records[2].text, (described,))]) != first
    assert built("d", records, validation_fraction=0.5) != first


def test_the_same_data_again_is_left_alone_and_other_data_refused(tmp_path):
    out = tmp_path / "d"
    assert builder.build(make_records(3), out)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not builder.build(make_records(3), out)
    old = builder.fingerprint(out)
    with pytest.raises(NunerError, match=rf"holds another data set \(fingerprint {old[:12]}, the"):
        builder.build(make_records(4), out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written
    assert builder.build(make_records(4), out, overwrite=True)
    assert builder.fingerprint(out) != old
    assert sum(len(builder.open_split(out, split)) for split in ("train", "validation")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_is_no_data_set_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(NunerError, match="is no data set of this program"):
            builder.build(make_records(3), out, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert builder.build(make_records(3), tmp_path / "empty")


@pytest.mark.parametrize("there_before", [False, True])
def test_a_build_that_fails_leaves_what_was_there(tmp_path, there_before):
    out = tmp_path / "d"
    if there_before:
        builder.build(make_records(3), out)

    def broken():
        yield from make_records(10)
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        builder.build(broken(), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["d"] if there_before else [])
    assert builder.is_built(out) == there_before


def test_too_many_malformed_rows_stop_before_anything_is_written(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_records(9), "{")
    with pytest.raises(NunerError, match=r"1 of 10 rows are malformed .*a\.jsonl:10"):
        builder.build_inputs([str(path)], tmp_path / "out" / "d")
    assert not list((tmp_path / "out").iterdir())
    options = builder.BuildOptions(max_malformed=0.1)
    assert builder.build_inputs([str(path)], tmp_path / "out" / "d", options)
    stored = builder.read_report(tmp_path / "out" / "d")
    assert stored["report"]["malformed_rows"] == {"invalid_json": {"count": 1, "first": ["a.jsonl:10"]}}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NunerError, match=r"file/d: cannot be written"):
        builder.build(make_records(3), tmp_path / "file" / "d")


@pytest.mark.parametrize("while_writing", ["spool", "shards"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, while_writing):
    # A limit on the size of a file stands for the disk; it is set before the stage that shall fail.
    # Random letters, because a shard is compressed.
    code = f"""
import random, resource, signal, string
from nuner_jax.data import builder
from nuner_jax.data.records import Entity, Record

def limit(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

letters = string.ascii_letters + string.digits
texts = ["".join(random.Random(n).choices(letters, k=3000)) for n in range(100)]
records = [Record(text, (Entity(0, 5, "x"),)) for text in texts]
if {while_writing!r} == "spool":
    limit(100_000)
else:
    from nuner_jax.data import tfds_records
    write = tfds_records.write_shards
    def write_when_full(*arguments):
        limit(100_000)
        return write(*arguments)
    tfds_records.write_shards = write_when_full
builder.build(records, {str(tmp_path / "d")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"NunerError: {tmp_path / 'd'}: cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())


def test_damaged_data_sets_are_named(tmp_path):
    out = tmp_path / "d"
    with pytest.raises(NunerError, match=r"d: holds no data set; make one with"):
        builder.open_split(out, "train")
    builder.build(make_records(20), out)
    (shard,) = out.rglob("*train.array_record*")
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(NunerError, match=r"train.*: has 40 of its [\d,]+ bytes; copy or build"):
        builder.open_split(out, "train")
    shard.unlink()
    with pytest.raises(NunerError, match=r"train.*: is missing; copy or build"):
        builder.open_split(out, "train")
    (out / builder.REPORT_FILE).write_text("{")
    with pytest.raises(NunerError, match=r"report\.json: cannot be read"):
        builder.fingerprint(out)


def test_tfds_never_sorts_through_tensorflow_however_large_the_split(tmp_path, monkeypatch):
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1)
    builder.build(make_records(20), tmp_path / "d")
    assert len(builder.open_split(tmp_path / "d", "train")) > 0


def test_building_and_reading_loads_no_tensorflow(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_records(9))
    code = f"""
import sys
from nuner_jax.data import builder
folder = builder.ensure_built({str(path)!r}, {str(tmp_path)!r})
assert len(list(builder.open_split(folder, "train"))) > 0
import tensorflow_datasets as tfds
source = tfds.data_source("nuner_records", data_dir=str(folder), split="validation")
assert source[0]["text"].decode().endswith("of Rome")
print([name for name in ("tensorflow", "torch", "jax", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_importing_the_package_is_light():
    code = (
        "import sys, nuner_jax.data.builder, nuner_jax.data.importers\n"
        "print([n for n in ('tensorflow_datasets', 'pyarrow', 'huggingface_hub', 'jax')"
        " if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_ensure_built_builds_once_per_content_and_options(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_records(9))
    cache = tmp_path / "cache"
    first = builder.ensure_built(str(path), cache)
    written = (first / builder.REPORT_FILE).stat().st_mtime_ns
    assert builder.ensure_built([str(path)], cache) == first
    assert (first / builder.REPORT_FILE).stat().st_mtime_ns == written
    assert builder.ensure_built(str(first), cache) == first  # a built data set, as it is
    assert builder.ensure_built(str(path), cache, validation_fraction=0.5) != first
    write_rows(path, make_records(10))
    assert builder.ensure_built(str(path), cache) != first
    with pytest.raises(NunerError, match="unknown data option 'drop'; known are: format"):
        builder.ensure_built(str(path), cache, drop="x")


def _ensure(path: str, cache: str) -> str:
    return str(builder.ensure_built(path, cache))


def test_processes_that_race_get_the_same_data_set(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_records(300))
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = pool.starmap(_ensure, [(str(path), str(tmp_path / "cache"))] * 3)
    assert len(set(folders)) == 1
    assert builder.is_built(folders[0])
    assert [one.name for one in (tmp_path / "cache").iterdir() if "building" in one.name] == []


def test_a_builder_that_comes_second_without_a_lock_discards_its_work(tmp_path):
    out = tmp_path / "d"

    def slow():  # another process finishes the same data set meanwhile
        yield from make_records(3)
        builder.build(make_records(3), out)

    assert not builder.build(slow(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_options_out_of_range_are_refused():
    for fraction in (-0.1, 1.0):
        with pytest.raises(NunerError, match="validation_fraction is a share"):
            builder.BuildOptions(validation_fraction=fraction)
    with pytest.raises(NunerError, match="max_malformed is a share between 0 and 1, not 5"):
        builder.BuildOptions(max_malformed=5)


def test_the_command_prints_the_report_and_the_next_command(tmp_path):
    write_rows(tmp_path / "a.jsonl", make_records(30), "{")
    first = run_build("--input=a.jsonl", "--input=sample", "--out=out/d", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert re.search(r"rows read +6,031\n", first.stdout)
    assert re.search(r"invalid_json 1 \(a\.jsonl:31\)", first.stdout)
    assert "built in" in first.stdout
    assert "python -m nuner_jax.train" in first.stdout and "path=out/d" in first.stdout
    again = run_build("--input=a.jsonl", "--input=sample", "--out=out/d", cwd=tmp_path)
    assert again.returncode == 0 and "up to date, nothing was written" in again.stdout
    assert again.stderr == ""


def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    for flags, message in [
        (["--out=d"], "--input=FILE and --out=DIR are needed"),
        (["--input=no.jsonl", "--out=d"], "no.jsonl: no such file"),
        (["--input=sample", "--format=xml", "--out=d"], "format 'xml' is unknown; known are"),
        (["sample", "--out=d"], "unexpected argument 'sample'"),
    ]:
        done = run_build(*flags, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and message in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_sample_is_aligned_and_built(sample):
    report = builder.read_report(sample)["report"]
    annotations = report["annotations_found"] + report["annotations_not_in_text"]
    assert report["annotations_found"] >= 0.995 * annotations
    assert report["rows"] == report["records"] == 6000
    train, validation = (builder.open_split(sample, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 6000
    assert 80 <= len(validation) <= 160  # 2% of 6,000
    assert all(record.entities for record in train)


def test_the_data_card_gives_the_figures_of_the_import():
    card = (SAMPLE_FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+\.jsonl(?:\.gz)?) \|([\d,| ]+)\|$", card, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in SAMPLE_FOLDER.iterdir() if ".jsonl" in path.name}
    for name, cells in rows:
        report = Report()
        paths = resolve_inputs([str(SAMPLE_FOLDER / name)])
        options = dataclasses.replace(ImportOptions(), keep_unlabelled=True)
        for _ in import_records(paths, report, options):
            pass
        assert [int(cell.replace(",", "")) for cell in cells.split("|")] == [
            report.rows,
            report.found + report.not_in_text,
            report.found,
            report.entities,
            report.concepts,
            report.singletons,
            report.unlabelled,
        ], name
