"""Beam, on its runner in this process: what it makes is what one machine makes."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from apache_beam.io.filesystem import FileMetadata, MatchResult
from apache_beam.io.localfilesystem import LocalFileSystem
from ml_collections import ConfigDict

from nuner_jax.annotate import alignment
from nuner_jax.annotate.beam import align as beam_align
from nuner_jax.annotate.beam import files as beam_files
from nuner_jax.annotate.beam import select as beam_select
from nuner_jax.annotate.beam.runner import pipeline_options, runner, worker_errors
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.selection import select as one_machine
from nuner_jax.annotate.units import Outcome, Unit
from nuner_jax.config import annotate
from nuner_jax.data import builder
from nuner_jax.data.importers import SAMPLE, Report, import_records, resolve_inputs
from nuner_jax.data.importers.stream import SAMPLE_FILE
from nuner_jax.errors import NunerError

SHARED_WORDS = "a storm that nobody had foreseen broke over the quiet harbour and sank four boats at their moorings"


@pytest.fixture(scope="module")
def run() -> Callable:
    return runner(pipeline_options([]))


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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Files of three kinds, with texts that come again, malformed rows, and one empty file."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n".join(sentences(90, 1)))
    rows = [json.dumps({"text": text}) for text in (*sentences(60, 2), *sentences(30, 1), "short")]
    (folder / "b.jsonl").write_text("\n".join([*rows[:20], "{", *rows[20:], '{"other": 1}', '{"text": 5}']))
    (folder / "c-1.txt.gz").write_bytes(gzip.compress("\n".join(sentences(40, 3)).encode()))
    (folder / "c-2.txt.gz").write_bytes(gzip.compress(b"\n"))
    return folder


def corpus_config(corpus: Path, **source: Any) -> ConfigDict:
    paths = source.pop("paths", ("c-*.txt.gz", "a.txt", "b.jsonl"))
    return config_of([corpus / path for path in paths], **source)


def stored(folder: Path) -> tuple[bytes, dict]:
    content = json.loads((folder / one_machine.SELECTION_FILE).read_text())
    del content["seconds"]
    return (folder / one_machine.UNITS_FILE).read_bytes(), content


# --- select ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        {"duplicates": "near", "near_threshold": 0.6},
        {"duplicates": "near", "near_threshold": 0.6, "size": 60},
        {"duplicates": "exact", "size": 30, "shard": "1/3"},
    ],
)
def test_the_selection_is_that_of_one_machine(corpus, tmp_path, run, monkeypatch, source):
    monkeypatch.setattr(beam_files, "ROWS_PER_PART", 7)  # many parts, as of a large corpus
    config = corpus_config(corpus, **source)
    made = one_machine.select(config, tmp_path / "one" / "selection", lambda line: None)
    said = []
    beam_select.select(config, str(tmp_path / "beam"), run, said.append)
    assert stored(tmp_path / "beam" / "selection") == stored(tmp_path / "one" / "selection")
    assert said[-1].startswith("      malformed rows: ") and f"{made.counts['selected']} of" in said[0]
    assert made.counts["malformed"] == 3 and made.counts["duplicate"] + made.counts["beyond_sample"] >= 30
    assert bool(made.counts["near_duplicate"]) == (source["duplicates"] == "near")
    assert [path.name for path in (tmp_path / "beam").iterdir()] == ["selection"]  # nothing is left behind


def test_reading_is_repeated_if_near_duplicates_leave_too_few(tmp_path, run, monkeypatch):
    monkeypatch.setattr(one_machine, "SPARE_UNITS", 0)
    (tmp_path / "a.txt").write_text(
        "\n".join([*(f"In year {n} {SHARED_WORDS}." for n in range(90)), *sentences(40, 1)])
    )
    config = config_of([tmp_path / "a.txt"], size=20, near_threshold=0.6)
    one_machine.select(config, tmp_path / "one" / "selection", lambda line: None)
    said = []
    beam_select.select(config, str(tmp_path / "beam"), run, said.append)
    assert "reading again, and holding 48" in said[0]
    assert stored(tmp_path / "beam" / "selection") == stored(tmp_path / "one" / "selection")


def test_a_selection_is_divided_for_many_machines(corpus, tmp_path, run):
    config = corpus_config(corpus, duplicates="exact")
    said = []
    beam_select.select(config, str(tmp_path), run, said.append, shards=2)
    assert [line.partition(" ")[0] for line in said if "units in" in line] == ["shard-0-of-2", "shard-1-of-2"]
    for part in range(2):
        config.source.shard = f"{part}/2"
        again = one_machine.select(config, tmp_path / f"shard-{part}-of-2" / "selection", lambda line: None)
        assert again.reused  # one machine recognises it, and does not select again
        fresh = one_machine.select(config, tmp_path / f"{part}", lambda line: None)
        assert again.fingerprint == fresh.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        ({"paths": ("no.txt",)}, r"no\.txt: no such file"),
        ({"field": "words"}, r"b\.jsonl:1: has no 'words' \(config\.source\.field\); its keys are: 'text'$"),
        ({"min_chars": 900}, r"no unit is left \(too_short [\d,]+\)"),
        ({"paths": ("c-2.txt.gz", "a.txt")}, r"c-2\.txt\.gz: holds no text$"),
        ({"script": "Latn"}, r"config\.source\.script = 'Latn' is unknown"),
    ],
)
def test_bad_input_is_told_as_on_one_machine(corpus, tmp_path, run, change, message):
    config = corpus_config(corpus, **change)
    for select, place in [(one_machine.select, tmp_path), (beam_select.select, str(tmp_path))]:
        with pytest.raises(NunerError, match=message):
            select(config, place, *([run] if select is beam_select.select else []), lambda line: None)


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
    """A journal of 300 units of the sample in rank order, and the same as two, of a shard each."""
    folder = tmp_path_factory.mktemp("journals")
    completions = recorded(300)
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


@pytest.mark.parametrize("normalise", [(), ("case", "plural")])
def test_aligned_records_and_counts_are_those_of_one_machine(annotated, tmp_path, run, monkeypatch, normalise):
    monkeypatch.setattr(beam_files, "ROWS_PER_PART", 40)
    monkeypatch.setattr(beam_align, "_BATCH", 50)
    config = annotate()
    config.align.normalise = normalise
    counts = align_on_one_machine(config, annotated / "journal.sqlite", tmp_path / "one")
    said = []
    beam_align.align(config, [str(annotated / "journal.sqlite")], str(tmp_path / "beam"), run, said.append)
    for name in (alignment.ALIGNED_FILE, alignment.REJECTED_FILE):
        assert lines_of(tmp_path / "beam", name) == lines_of(tmp_path / "one", name)
        assert len(lines_of(tmp_path / "one", name)) > 200
    assert json.loads((tmp_path / "beam" / alignment.COUNTS_FILE).read_text()) == counts
    assert said[0].split() == ["units", "300"]
    assert counts["units"]["failed"] and counts["units"]["pending"] and counts["lines"]["rejected"]
    assert bool(counts["options"]["plurals"]) == bool(normalise)


def test_journals_of_many_machines_give_the_records_of_all_in_their_order(annotated, tmp_path, run):
    config = annotate()
    counts = align_on_one_machine(config, annotated / "journal.sqlite", tmp_path / "one")
    beam_align.align(config, [str(annotated / "shard-*" / "*.sqlite")], str(tmp_path / "beam"), run, lambda line: None)
    assert json.loads((tmp_path / "beam" / alignment.COUNTS_FILE).read_text()) == counts
    for name in (alignment.ALIGNED_FILE, alignment.REJECTED_FILE):
        assert lines_of(tmp_path / "beam", name) == lines_of(tmp_path / "one", name)


def test_a_unit_in_two_journals_is_refused_and_earlier_files_stay(annotated, tmp_path, run):
    (tmp_path / alignment.ALIGNED_FILE).write_bytes(b"earlier")
    journals = [str(annotated / "journal.sqlite"), str(annotated / "shard-1" / "journal.sqlite")]
    with pytest.raises(NunerError, match=r"journal\.sqlite.*: unit [0-9a-f]{20} stands in several"):
        beam_align.align(annotate(), journals, str(tmp_path), run, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == [alignment.ALIGNED_FILE]
    assert (tmp_path / alignment.ALIGNED_FILE).read_bytes() == b"earlier"


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
    assert json.loads((tmp_path / "b" / "out" / alignment.COUNTS_FILE).read_text()) == counts
    left = {path.name for path in (tmp_path / "b" / "out").iterdir()}
    assert left == {"selection", alignment.ALIGNED_FILE, alignment.REJECTED_FILE, alignment.COUNTS_FILE}


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
    "flags, message",
    [
        ([], "--config=FILE, --workdir=DIR and --stages=select,align,build (or some) are needed"),
        (["--stages=select,request"], "no stage 'request' in Beam; there are select, align, build"),
        (["--stages=build", "--workdir=gs://b/run"], "--workdir=gs://b/run: shards cannot be written to a bucket"),
        (["--stages=align"], "journal.sqlite: no such file"),
        (["--stages=select", "--", "--runner=DataflowRunner"], "Dataflow's workers do not see folders of this machine"),
        (["--stages=select", "--config.source.field=words"], "jsonl.gz:1: has no 'words' (config.source.field)"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(run_python, tmp_path, flags, message):
    config = tmp_path / "config.py"
    config.write_text(
        "from nuner_jax.config import annotate\n"
        "def get_config():\n"
        "    config = annotate()\n"
        f"    config.source.paths = ({str(SAMPLE_FILE)!r},)\n"
        "    config.endpoint.kind = 'replay'\n"
        "    return config\n"
    )
    given = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags]
    done = run_python("-m", "nuner_jax.annotate.beam", *given, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_the_command_runs_its_stages_in_worker_processes(run_python, root, tmp_path):
    given = [f"--config={root / 'configs' / 'annotate_sample.py'}", "--config.source.size=200"]
    one, beam = tmp_path / "one", tmp_path / "beam"
    run_python("-m", "nuner_jax.annotate", *given, f"--workdir={one}", "--stages=select,request,align,build")
    given += [f"--workdir={beam}", "--stages=select,align,build", f"--journals={one}/journal.sqlite"]
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    done = run_python("-m", "nuner_jax.annotate.beam", *given, "--", *workers)
    assert "200 of" in done.stdout and f"shards       {beam / 'shards'}: train" in done.stdout
    assert stored(beam / "selection") == stored(one / "selection")
    files = [path.relative_to(one) for path in (one / "shards").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (beam / file).read_bytes() == (one / file).read_bytes(), file
