"""Beam, on its runner in this process: what it makes is what one machine makes."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from apache_beam.io.filesystem import FileMetadata, MatchResult
from apache_beam.io.localfilesystem import LocalFileSystem
from corpora import config_of, stored, write_corpus
from ml_collections import ConfigDict

from nuner_jax.annotate import alignment, pipeline
from nuner_jax.annotate.beam import __main__ as command
from nuner_jax.annotate.beam import align as beam_align
from nuner_jax.annotate.beam import files as beam_files
from nuner_jax.annotate.beam import select as beam_select
from nuner_jax.annotate.beam.runner import pipeline_options, runner, worker_errors
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.selection import select as one_machine
from nuner_jax.annotate.units import Outcome, Unit
from nuner_jax.annotate.workdir import ALIGNED_FILE, COUNTS_FILE, REJECTED_FILE
from nuner_jax.config import annotate, load_file
from nuner_jax.data import builder
from nuner_jax.data.importers import SAMPLE, Report, import_records, resolve_inputs
from nuner_jax.data.importers.stream import SAMPLE_FILE
from nuner_jax.errors import NunerError
from nuner_jax.writers import Console


@pytest.fixture(scope="module")
def run() -> Callable:
    return runner(pipeline_options([]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


# --- align and build ---------------------------------------------------------------------------


def recorded(count: int) -> dict[str, str]:
    """Recorded completions of the embedded sample, by text."""
    with gzip.open(SAMPLE_FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return {row["text"]: row["completion"] for row in rows}


def make_journal(path: Path, units: Sequence[Unit], completions: dict[str, str]) -> None:
    """Answers from `completions`; by the last digit of its id, a unit failed or has no answer yet."""

    async def answer(pending) -> None:
        if pending.id.endswith("0"):
            return
        more = f"\nno line of three parts\n{pending.text.split()[0]} <> {'Town' if pending.id < '8' else 'towns'}"
        outcome = Outcome(pending.id, "done", completions[pending.text] + more, finish="stop")
        if pending.id.endswith("1"):
            outcome = Outcome(pending.id, "failed", error="refusal: no")
        await journal.finish(await journal.begin([pending], 1), [outcome], cost=1)

    async def answer_all() -> None:
        await asyncio.gather(*map(answer, journal.pending(-1, len(units))))

    path.parent.mkdir(parents=True, exist_ok=True)
    with Journal.open(path, {"model": "recorded"}) as journal:
        journal.set_units(units, "of the test")
        asyncio.run(answer_all())


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """A journal of 150 units of the sample in rank order, and the same as two, of a shard each."""
    folder = tmp_path_factory.mktemp("journals")
    completions = recorded(150)
    config = annotate()
    ordered = sorted(completions, key=lambda text: beam_align.rank(config.seed, text.encode()))
    units = [Unit.of(text, "sample:1") for text in ordered]
    make_journal(folder / "journal.sqlite", units, completions)
    for part in range(2):
        own = [unit for unit in units if int(unit.id[:8], 16) % 2 == part]
        make_journal(folder / f"shard-{part}" / "journal.sqlite", own, completions)
    return folder


def lines_of(folder: Path, name: str) -> list[str]:
    with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
        return list(lines)


def align_on_one_machine(config: ConfigDict, journal: Path, folder: Path) -> dict:
    folder.mkdir()
    with Journal.open(journal, read_only=True) as opened:
        return alignment.align_journal(config, opened, folder, lambda line: None)


def test_aligned_records_and_counts_are_those_of_one_machine(annotated, tmp_path, run, monkeypatch):
    monkeypatch.setattr(beam_files, "ROWS_PER_PART", 20)
    monkeypatch.setattr(beam_align, "_BATCH", 25)
    config = annotate()
    config.align.normalise = ("case", "plural")
    counts = align_on_one_machine(config, annotated / "journal.sqlite", tmp_path / "one")
    said = []
    beam_align.align(config, [str(annotated / "journal.sqlite")], str(tmp_path / "beam"), run, said.append)
    for name in (ALIGNED_FILE, REJECTED_FILE):
        assert lines_of(tmp_path / "beam", name) == lines_of(tmp_path / "one", name)
        assert len(lines_of(tmp_path / "one", name)) > 100
    assert json.loads((tmp_path / "beam" / COUNTS_FILE).read_text()) == counts
    assert said[0].split() == ["units", "150"]
    assert counts["units"]["failed"] and counts["units"]["pending"] and counts["lines"]["rejected"]
    assert counts["options"]["plurals"]


def test_journals_of_many_machines_give_the_records_of_all_in_their_order(annotated, tmp_path, run):
    config = annotate()
    counts = align_on_one_machine(config, annotated / "journal.sqlite", tmp_path / "one")
    assert not counts["options"]["plurals"]
    beam_align.align(config, [str(annotated / "shard-*" / "*.sqlite")], str(tmp_path / "beam"), run, lambda line: None)
    assert json.loads((tmp_path / "beam" / COUNTS_FILE).read_text()) == counts
    for name in (ALIGNED_FILE, REJECTED_FILE):
        assert lines_of(tmp_path / "beam", name) == lines_of(tmp_path / "one", name)


def test_a_unit_in_two_journals_is_refused_and_earlier_files_stay(annotated, tmp_path, run):
    (tmp_path / ALIGNED_FILE).write_bytes(b"earlier")
    journals = [str(annotated / "journal.sqlite"), str(annotated / "shard-1" / "journal.sqlite")]
    with pytest.raises(NunerError, match=r"journal\.sqlite.*: unit [0-9a-f]{20} stands in several"):
        beam_align.align(annotate(), journals, str(tmp_path), run, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == [ALIGNED_FILE]
    assert (tmp_path / ALIGNED_FILE).read_bytes() == b"earlier"


def test_a_file_that_is_no_journal_is_named(tmp_path, run):
    (tmp_path / "journal.sqlite").write_text("something else, and long enough to be looked at" * 30)
    with pytest.raises(NunerError, match=r"journal\.sqlite: .*no journal"):
        beam_align.align(annotate(), [str(tmp_path / "journal.sqlite")], str(tmp_path), run, lambda line: None)


def test_shards_are_those_of_one_machine_to_the_byte(tmp_path):
    records = [
        record for record, _ in zip(import_records(resolve_inputs([SAMPLE]), Report()), range(400), strict=False)
    ]
    builder.build(records, tmp_path / "one", validation_fraction=0.1)
    options = pipeline_options([])
    assert builder.build(records, tmp_path / "beam", validation_fraction=0.1, beam_options=options)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "beam" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    for split in ("train", "validation"):
        ours, theirs = (list(builder.open_split(tmp_path / name, split)) for name in ("beam", "one"))
        assert ours == theirs
    assert not builder.build(records, tmp_path / "beam", validation_fraction=0.1, beam_options=options)


# --- A bucket ----------------------------------------------------------------------------------


class Bucket(LocalFileSystem):
    """bucket://NAME is a folder of this machine that only Beam's file systems can reach."""

    root: Path

    @classmethod
    def scheme(cls) -> str:
        return "bucket"

    def _real(self, path: str) -> str:
        return str(self.root / path.removeprefix("bucket://"))

    def match(self, patterns, limits=None):
        results = super().match(list(map(self._real, patterns)), limits)
        return [
            MatchResult(
                result.pattern,
                [
                    FileMetadata(f"bucket://{Path(one.path).relative_to(self.root)}", one.size_in_bytes)
                    for one in result.metadata_list
                ],
            )
            for result in results
        ]

    def create(self, path, *args, **kwargs):
        return super().create(self._real(path), *args, **kwargs)

    def open(self, path, *args, **kwargs):
        return super().open(self._real(path), *args, **kwargs)

    def exists(self, path):
        return super().exists(self._real(path))

    def rename(self, sources, targets):
        return super().rename(list(map(self._real, sources)), list(map(self._real, targets)))

    def delete(self, paths):
        for path in paths:
            shutil.rmtree(self._real(path))


def test_sources_journals_and_results_may_lie_in_a_bucket(corpus, annotated, tmp_path, run, monkeypatch):
    monkeypatch.setattr(Bucket, "root", tmp_path, raising=False)
    (tmp_path / "b").mkdir()
    for file in (*corpus.iterdir(), annotated / "journal.sqlite"):
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    config = config_of(["bucket://b/*.txt", "bucket://b/b.jsonl"], duplicates="exact")
    beam_select.select(config, "bucket://b/out", run, lambda line: None)
    local = config_of([corpus / "*.txt", corpus / "b.jsonl"], duplicates="exact")
    one_machine.select(local, tmp_path / "one", lambda line: None)
    ours, theirs = stored(tmp_path / "b" / "out" / "selection"), stored(tmp_path / "one")
    assert ours[0] == theirs[0] and ours[1]["inputs"] == theirs[1]["inputs"]
    beam_align.align(config, ["bucket://b/journal.sqlite"], "bucket://b/out", run, lambda line: None)
    counts = align_on_one_machine(config, annotated / "journal.sqlite", tmp_path / "aligned")
    assert json.loads((tmp_path / "b" / "out" / COUNTS_FILE).read_text()) == counts
    left = {path.name for path in (tmp_path / "b" / "out").iterdir()}
    assert left == {"selection", ALIGNED_FILE, REJECTED_FILE, COUNTS_FILE}


def test_a_journal_that_is_not_whole_is_not_taken_from_a_bucket(annotated, tmp_path, run, monkeypatch):
    monkeypatch.setattr(Bucket, "root", tmp_path, raising=False)
    (tmp_path / "journal.sqlite").write_bytes((annotated / "journal.sqlite").read_bytes())
    (tmp_path / "journal.sqlite-wal").write_bytes(b"more")
    with pytest.raises(NunerError, match=r"journal\.sqlite-wal: .*copy .* once no process has it open"):
        beam_align.align(annotate(), ["bucket://journal.sqlite"], str(tmp_path / "out"), run, lambda line: None)


# --- The command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--runer=FlinkRunner"], r"--runer=FlinkRunner: .*FnApiRunner knows no such flag"),
        (["--direct_num_workers=two"], r"direct_num_workers: invalid int value: 'two'"),
        (["direct"], r"unexpected argument 'direct': after -- come Beam's flags"),
    ],
)
def test_bad_flags_of_beam_are_named(flags, message):
    with pytest.raises(NunerError, match=message):
        pipeline_options(flags)


def test_an_error_of_a_worker_is_told_as_its_own():
    text = "Traceback …\nnuner_jax.errors.NunerError: a.txt: no such file [while running 'read-ptransform-12']\n…"
    with pytest.raises(NunerError, match=r"^a\.txt: no such file$"), worker_errors():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="something else"), worker_errors():
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    "given, beam_flags, message",
    [
        ({"stages": None}, [], r"--config=FILE, --workdir=DIR and --stages=select,align,build \(or some\) are needed"),
        ({"stages": ["select", "request"]}, [], "no stage 'request' in Beam; there are select, align, build"),
        ({"stages": ["build"], "workdir": "gs://b/run"}, [], "--workdir=gs://b/run: shards cannot be written to a bu"),
        ({"stages": ["align"]}, [], r"journal\.sqlite: no such file"),
        ({}, ["--runner=DataflowRunner"], "Dataflow's workers do not see folders of this machine"),
        ({"shards": 2}, [], r"--shards=2 divides what config\.source\.shard = 1/2 divides"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, given, beam_flags, message):
    config = config_of(["sample"], shard="1/2")
    config.endpoint.kind = "replay"
    flags = {"config": config, "workdir": str(tmp_path), "stages": ["select"], "shards": 1, "journals": None} | given
    monkeypatch.setattr(command.flags, "FLAGS", SimpleNamespace(**flags))
    with pytest.raises(NunerError, match=message):
        command.main(["beam", *beam_flags])


def test_an_error_of_a_worker_is_one_line_of_the_command(run_python, root, tmp_path):
    given = [f"--config={root / 'configs' / 'annotate_sample.py'}", f"--workdir={tmp_path}", "--stages=select"]
    rows = f"--config.source.paths=({str(SAMPLE_FILE)!r},)"  # by its own name, the sample is read without a field
    done = run_python("-m", "nuner_jax.annotate.beam", *given, rows, "--config.source.field=words", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "jsonl.gz:1: has no 'words' (config.source.field)" in done.stderr


def test_the_command_runs_its_stages_in_worker_processes(run_python, root, tmp_path):
    config_file = root / "configs" / "annotate_sample.py"
    given = [f"--config={config_file}", "--config.source.size=200"]
    one, beam = tmp_path / "one", tmp_path / "beam"
    config = load_file(str(config_file))
    config.source.size = 200
    pipeline.annotate(config, one, Console(active=False), stages=("select", "request", "align", "build"))
    given += [f"--workdir={beam}", "--stages=select,align,build", f"--journals={one}/journal.sqlite"]
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    done = run_python("-m", "nuner_jax.annotate.beam", *given, "--", *workers)
    assert "200 of" in done.stdout and f"shards       {beam / 'shards'}: train" in done.stdout
    assert stored(beam / "selection") == stored(one / "selection")
    files = [path.relative_to(one) for path in (one / "shards").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (beam / file).read_bytes() == (one / file).read_bytes(), file
