"""The stage `align`: every unit, every line and every annotation ends in exactly one place."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuner_jax.annotate.alignment import (
    OUTCOMES,
    Counts,
    UnitOptions,
    align_journal,
    align_unit,
    concept_names,
    read_records,
    read_rows,
    summary_lines,
)
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.units import Completed, Outcome, Unit, Usage
from nuner_jax.annotate.workdir import ALIGNED_FILE, COUNTS_FILE, REJECTED_FILE
from nuner_jax.config import annotate
from nuner_jax.data.align import AlignOptions
from nuner_jax.data.importers import SAMPLE, Report, import_records, resolve_inputs
from nuner_jax.data.importers.rows import read_rows as read_input
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError

DROPPING = UnitOptions(drop_concept="concept")


def done(text: str, completion: str, finish: str = "stop") -> Completed:
    return Completed(0, "u", text, "f:1", "done", completion, finish, "")


def make_journal(workdir: Path, answers: Sequence[tuple[str, Outcome | None]]) -> Path:
    """A journal over texts with the outcome of each, whose unit is filled in here; None: not asked yet."""
    path = workdir / "journal.sqlite"
    units = [Unit.of(text, f"made.txt:{n}") for n, (text, _) in enumerate(answers, start=1)]

    async def record(pending) -> None:
        outcome = answers[pending.position][1]
        if outcome:
            request = await journal.begin([pending], 5)
            await journal.finish(request, [dataclasses.replace(outcome, unit=pending.id)], usage=Usage(9, 3), cost=4)

    async def record_all() -> None:
        await asyncio.gather(*map(record, journal.pending(-1, len(units))))

    with Journal.open(path, {"prompt": "of the tests"}) as journal:
        journal.set_units(units, "made here")
        asyncio.run(record_all())
    return path


def answered(completion: str, finish: str = "stop") -> Outcome:
    return Outcome("", "done", completion, finish=finish)


def run(workdir: Path, **changes) -> dict:
    """The counts of the stage over the journal in `workdir`, with keys of config.align and config.build changed."""
    config = annotate()
    for key, value in changes.items():
        config[key.partition("_")[0]][key.partition("_")[2]] = value
    with Journal.open(workdir / "journal.sqlite", read_only=True) as journal:
        return align_journal(config, journal, workdir, lambda line: None)


MIXED = [
    (
        "Rome fell in May.",
        answered("Rome <> city <> a large town\nMay <> month\nParis <> city\nno annotation here\n\n"),
    ),
    ("Anna met Bob and Anna left.", answered("ANNA <> person\nAnna <> person\nBob <> Concept")),
    ("Nothing is found here.", answered("Atlantis <> myth")),
    ("It was refused.", Outcome("", "failed", error="refusal: I would rather not")),
    ("It was refused as well.", Outcome("", "failed", error="refusal")),
    ("It timed out too often.", Outcome("", "failed", error="timeout: 120 s")),
    ("Carla paid Dora in cash.", answered("Carla <> person\nDora <> per", finish="length")),
    ("Nobody asked for this one.", None),
]


def check_identities(counts: dict) -> None:
    units, lines, annotations = counts["units"], counts["lines"], counts["annotations"]
    assert units["all"] == sum(units[outcome] for outcome in OUTCOMES)
    assert units["failed"] == sum(units["failed_by_reason"].values())
    assert lines["all"] == lines["annotations"] + sum(lines["rejected"].values()) + sum(lines["ignored"].values())
    assert lines["annotations"] == annotations["found"] + sum(annotations["unplaced"].values())
    per_unit = counts["annotations_per_unit"]
    assert annotations["found"] == sum(int(number) * units for number, units in per_unit.items())
    assert units["all"] - units["failed"] - units["pending"] == sum(per_unit.values())
    assert counts["records"]["records"] == units["kept"]


def test_every_unit_line_and_annotation_is_accounted_for(tmp_path):
    make_journal(tmp_path, MIXED)
    counts = run(tmp_path)
    check_identities(counts)
    assert counts["units"] == {
        "all": 8,
        "kept": 2,
        "dropped_concept": 1,
        "unlabelled_left_out": 1,
        "failed": 3,
        "pending": 1,
        "failed_by_reason": {"refusal": 2, "timeout": 1},
    }
    completions = [outcome.completion for _, outcome in MIXED if outcome and outcome.state == "done"]
    assert counts["lines"]["all"] == sum(len(completion.split("\n")) for completion in completions)
    assert counts == json.loads((tmp_path / COUNTS_FILE).read_text())
    rejected = list(read_rows(tmp_path / REJECTED_FILE))
    assert len(rejected) == sum(counts["lines"]["rejected"].values()) + sum(counts["annotations"]["unplaced"].values())
    unit = Unit.of(MIXED[0][0], "").id
    assert {"unit": unit, "line": "Paris <> city", "reason": "not_in_text"} in rejected
    assert {"unit": unit, "line": "no annotation here", "reason": "no_delimiter"} in rejected


def test_records_are_written_in_the_order_of_the_selection_with_the_raw_concepts(tmp_path):
    make_journal(tmp_path, MIXED)
    run(tmp_path)
    rome, carla = read_rows(tmp_path / ALIGNED_FILE)
    assert rome == {
        "unit": Unit.of(MIXED[0][0], "").id,
        "text": "Rome fell in May.",
        "entities": [
            {"start": 0, "end": 4, "concept": "city", "description": "a large town"},
            {"start": 13, "end": 16, "concept": "month", "description": ""},
        ],
        "raw_concepts": ["city", "month"],
    }
    # What an answer was cut in is no annotation: "per" may have been going to be anything.
    assert carla["entities"] == [{"start": 0, "end": 5, "concept": "person", "description": ""}]


def test_the_records_are_what_an_import_of_the_file_gives(tmp_path):
    make_journal(tmp_path, MIXED)
    run(tmp_path)
    records = list(read_records(tmp_path / ALIGNED_FILE))
    assert [record.text for record in records] == [MIXED[0][0], MIXED[6][0]]
    assert records == list(import_records([tmp_path / ALIGNED_FILE], Report()))


def test_no_aligned_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(NunerError, match=ALIGNED_FILE):
        list(read_records(tmp_path / ALIGNED_FILE))


def test_unlabelled_texts_and_the_dropped_concept_are_kept_on_demand(tmp_path):
    make_journal(tmp_path, MIXED)
    counts = run(tmp_path, build_keep_unlabelled=True, build_drop_concept="")
    check_identities(counts)
    assert (counts["units"]["kept"], counts["units"]["dropped_concept"], counts["records"]["unlabelled"]) == (4, 0, 1)
    assert Record("Nothing is found here.") in list(read_records(tmp_path / ALIGNED_FILE))


def test_the_same_journal_gives_the_same_bytes(tmp_path):
    make_journal(tmp_path, MIXED)
    first = run(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in (ALIGNED_FILE, REJECTED_FILE, COUNTS_FILE)}
    assert run(tmp_path) == first
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    assert run(tmp_path, align_occurrences="first", align_max_chars=3)["sha256"] != first["sha256"]


def test_what_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path):
    make_journal(tmp_path, MIXED)
    (tmp_path / ALIGNED_FILE).mkdir()
    with pytest.raises(NunerError, match="cannot be written"):
        run(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert not (tmp_path / COUNTS_FILE).exists()


def test_case_and_plurals_are_evened_out_over_all_units_and_the_raw_form_is_kept(tmp_path):
    completions = ["Rome <> Cities <> old\nMay <> month", "Bern <> city <> small", "Oslo <> CITY <> cold"]
    texts = ["Rome fell in May.", "Bern is calm.", "Oslo is far."]
    make_journal(tmp_path, [(text, answered(one)) for text, one in zip(texts, completions, strict=True)])

    def concepts(*normalise: str) -> list[str]:
        counts = run(tmp_path, align_normalise=normalise)
        check_identities(counts)
        rows = list(read_rows(tmp_path / ALIGNED_FILE))
        assert [raw for row in rows for raw in row["raw_concepts"]] == ["Cities", "month", "city", "CITY"]
        assert counts["records"]["concepts"] == len({one["concept"] for row in rows for one in row["entities"]})
        return [entity["concept"] for row in rows for entity in row["entities"]]

    assert concepts() == ["Cities", "month", "city", "CITY"]
    assert concepts("case") == ["cities", "month", "city", "CITY"]
    assert concepts("case", "plural") == ["city", "month", "city", "CITY"]


def test_an_entity_has_the_description_and_raw_concept_of_its_own_annotation():
    completion = "met <> Event <> one\nAnna met Bob <> event <> two\nAnna <> person <> three\nleft <> EVENTS <> four"
    options = UnitOptions(singulars={"Event": "event", "EVENTS": "event"})
    unit = align_unit(done("Anna met Bob and left.", completion), options)
    assert unit.record.entities == (
        Entity(0, 12, "event", "two"),  # of one concept the longer wins
        Entity(0, 4, "person", "three"),
        Entity(17, 21, "event", "four"),
    )
    assert unit.raw_concepts == ("event", "person", "EVENTS")
    assert (unit.found, unit.unplaced) == (4, ())


def test_half_characters_are_rejected_with_the_reason_and_can_be_written():
    for half in ('{"entities": [{"entity": "Rome", "concept": "city \\ud83d"}]}', "Rome <> city \ud83d"):
        unit = align_unit(done("Rome fell.", half), UnitOptions())
        assert (unit.outcome, [one.reason for one in unit.rejected]) == ("unlabelled_left_out", ["lone_surrogate"])
        [row] = unit.rejected_rows()
        assert "\\ud83d" in row["line"]
        json.dumps(row, ensure_ascii=False).encode()


def test_the_dropped_concept_is_looked_for_after_normalisation_and_in_what_has_no_place():
    for completion in ("Rome <> CONCEPT", "Paris <> concept", "Rome <> city\nRome <> concept"):
        unit = align_unit(done("Rome fell.", completion), DROPPING)
        assert (unit.outcome, unit.record, unit.raw_concepts) == ("dropped_concept", None, ())
    plural = dataclasses.replace(DROPPING, singulars={"concepts": "concept"})
    assert align_unit(done("Rome fell.", "Rome <> concepts"), plural).outcome == "dropped_concept"
    assert align_unit(done("Rome fell.", "Rome <> concepts"), DROPPING).outcome == "kept"


WORDS = st.sampled_from(["Rome", "Anna", "the river", "May", "ROME", "Atlantis", "río", "", "a <> b", '"Rome"', "é"])
LINES = st.one_of(
    st.lists(WORDS, min_size=1, max_size=4).map(" <> ".join),
    st.sampled_from(
        ["```", "", "- Rome <> city", "1. Anna <> person", "---", "<>", "**May** <> month", "Here you are:"]
    ),
    st.text(max_size=20).filter(lambda line: not set(line) & set("\n[{")),  # neither lines nor JSON
)
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=12).map(" ".join).filter(str.strip)


@given(
    text=TEXTS.filter(lambda text: text.isprintable()),
    lines=st.lists(LINES, max_size=8),
    cut=st.booleans(),
    options=st.builds(
        UnitOptions,
        align=st.builds(
            AlignOptions,
            st.sampled_from(["every", "first"]),
            st.sampled_from(["tolerant", "exact"]),
            st.integers(1, 3),
            st.sampled_from([3, 200]),
        ),
        lower=st.booleans(),
        singulars=st.just({"the river": "May"}),
        drop_concept=st.sampled_from(["", "rome"]),
        keep_unlabelled=st.booleans(),
    ),
)
def test_whatever_a_completion_holds_its_lines_are_accounted_for(text, lines, cut, options):
    completed = done(text, "\n".join(lines), "length" if cut else "stop")
    unit = align_unit(completed, options)
    assert pickle.loads(pickle.dumps((unit, options))) == (unit, options)
    counts = Counts()
    counts.add(unit)
    check_identities(counts.as_dict())
    places = [*unit.rejected, *unit.unplaced, *unit.ignored]
    assert unit.found + len(places) == len(completed.completion.split("\n"))
    assert all(one.reason for one in places)
    assert unit.inexact <= unit.found and unit.ambiguous <= unit.found
    names = concept_names(completed, options)
    assert len(names) == unit.found + len(unit.unplaced)
    if unit.record:
        assert unit.outcome == "kept" and unit.record.text == text
        assert {entity.concept for entity in unit.record.entities} <= set(names)
        assert [options.concept(raw) for raw in unit.raw_concepts] == [one.concept for one in unit.record.entities]
        assert options.drop_concept not in [name.lower() for name in names]
        assert unit.record.entities or options.keep_unlabelled
        assert Record.from_dict({key: unit.row()[key] for key in ("text", "entities")}) == unit.record


def test_the_counts_of_parts_add_up_to_those_of_the_whole(tmp_path):
    path = make_journal(tmp_path, MIXED)
    with Journal.open(path, read_only=True) as journal:
        units = [align_unit(completed, DROPPING) for completed in journal.completions()]
    whole, parts = Counts(), [Counts(), Counts(), Counts()]
    for n, unit in enumerate(units):
        whole.add(unit)
        parts[n % 3].add(unit)
    total = Counts()
    for part in parts:
        total.update(part)
    assert total == whole
    assert total.as_dict()["units"]["all"] == len(units) == len(MIXED)


def test_the_summary_says_each_count_in_a_line(tmp_path):
    make_journal(tmp_path, MIXED)
    lines = summary_lines(run(tmp_path))
    assert [line.split() for line in lines[:5]] == [
        ["units", "8"],
        ["kept", "2", "25.00%"],
        ["dropped", "by", "concept", "1", "12.50%"],
        ["nothing", "found,", "left", "out", "1", "12.50%"],
        ["failed", "3", "37.50%"],
    ]
    assert "      refusal 2" in lines


def test_of_the_embedded_sample_nearly_every_line_becomes_an_annotation_with_its_place(tmp_path):
    rows = [row for _, row in read_input(resolve_inputs([SAMPLE])[0])]
    make_journal(tmp_path, [(row["text"], answered(row["completion"])) for row in rows])
    counts = run(tmp_path)
    check_identities(counts)
    assert counts["units"]["all"] == 6000 and counts["lines"]["all"] == 34_657
    assert counts["annotations"]["found"] >= 0.995 * counts["lines"]["annotations"]
    assert len(gzip.decompress((tmp_path / ALIGNED_FILE).read_bytes()).splitlines()) == counts["units"]["kept"]
