"""Every format gives the records it says, and every kind of bad input is named."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nuner_jax.data.importers import (
    FORMATS,
    ImportOptions,
    Report,
    import_records,
    report_table,
    resolve_inputs,
)
from nuner_jax.data.importers.conll import tag_spans
from nuner_jax.data.importers.hub import choose_files, fetch
from nuner_jax.data.importers.report import PLACES_KEPT
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError

ROME = Record("Rome fell.", (Entity(0, 4, "city", "a large town"),))
ANNA = Record("Anna met Bob.", (Entity(0, 4, "person"), Entity(9, 12, "person")))
NUNER_ROWS = [
    {"input": ROME.text, "output": "['Rome <> city <> a large town']"},
    {"input": ANNA.text, "output": "['Anna <> person', \"Bob <> person\"]"},
]


def read(path: Path | list[Path], **options) -> tuple[list[Record], Report]:
    report = Report()
    paths = path if isinstance(path, list) else [path]
    return list(import_records(paths, report, ImportOptions(**options))), report


def write_lines(path: Path, rows) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    plain = path.with_suffix("") if path.suffix == ".gz" else path
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_lines),
        ("a.jsonl.gz", write_lines),
        ("a", write_lines),
        ("a.csv", write_csv),
        ("a.csv.gz", write_csv),
        ("a.parquet", write_parquet),
        ("a.parquet.gz", write_parquet),
    ],
)
def test_nuner_rows_are_read_from_every_kind_of_file(tmp_path, name, write):
    records, report = read(write(tmp_path / name, NUNER_ROWS))
    assert records == [ROME, ANNA]
    assert (report.rows, report.found, report.records, report.entities) == (2, 3, 2, 3)


def test_a_list_in_a_parquet_column_needs_no_parsing(tmp_path):
    rows = [{"input": ROME.text, "output": ["Rome <> city <> a large town"]}]
    assert read(write_parquet(tmp_path / "a.parquet", rows))[0] == [ROME]


def test_a_csv_cell_may_span_lines_and_places_name_where_its_row_begins(tmp_path):
    rows = [
        {"input": "One\ntwo Rome.", "output": "['Rome <> city']"},
        {"input": "Rome", "output": "oops"},
    ]
    records, report = read(write_csv(tmp_path / "a.csv", rows), max_malformed=0.5)
    assert records == [Record("One\ntwo Rome.", (Entity(8, 12, "city"),))]
    assert report.malformed.places == {"output_not_a_literal": ["a.csv:4"]}


def test_the_output_literal_is_never_evaluated(tmp_path):
    trap = tmp_path / "trap"
    rows = [*NUNER_ROWS, {"input": "Rome", "output": f"[open({str(trap)!r}, 'w').name]"}]
    _, report = read(write_lines(tmp_path / "a.jsonl", rows), max_malformed=0.5)
    assert report.malformed.counts == {"output_not_a_literal": 1}
    assert not trap.exists()


def test_completions_are_read_line_by_line(tmp_path):
    completion = "Sure, here you are:\nRome <> city <> a large town\n\nVenice <> city"
    path = write_lines(tmp_path / "a.jsonl", [{"text": ROME.text, "completion": completion}])
    records, report = read(path)
    assert records == [ROME]
    assert report.bad_annotations.places == {"no_delimiter": ["a.jsonl:1"]}
    assert (report.found, report.not_in_text) == (1, 1)


@pytest.mark.parametrize("as_array", [True, False])
def test_gliner_spans_count_words_and_include_the_last(tmp_path, as_array):
    words = ["New", "York", "met", "Zoë", "."]
    rows = [{"tokenized_text": words, "ner": [[0, 1, "city"], [3, 3, "person"], [4, 5, "x"]]}]
    path = tmp_path / "a.json"
    if as_array:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        write_lines(path, rows)
    records, report = read(path)
    assert records == [Record("New York met Zoë .", (Entity(0, 8, "city"), Entity(13, 16, "person")))]
    assert report.bad_annotations.counts == {"bad_span": 1}


def test_our_own_record_is_a_format(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROME.as_dict(), ANNA.as_dict()])
    assert read(path)[0] == [ROME, ANNA]


def test_spans_outside_the_text_are_malformed(tmp_path):
    row = ROME.as_dict()
    row["entities"] += [{"start": 3, "end": 99, "concept": "x"}, {"start": "0"}, "Rome"]
    records, report = read(write_lines(tmp_path / "a.jsonl", [row]))
    assert records == [ROME]
    assert report.bad_annotations.counts == {"bad_span": 1, "bad_entity": 2}


def test_surfaces_in_order_of_appearance_are_found_one_after_the_other(tmp_path):
    row = {"text": "Bonn to Bonn", "entities": [["Bonn", "origin"], ["Bonn", "destination"]]}
    row["entities"].append(["Bonn", "third"])
    records, report = read(write_lines(tmp_path / "a.jsonl", [row]))
    assert records[0].entities == (Entity(0, 4, "origin"), Entity(8, 12, "destination"))
    assert report.bad_annotations.counts == {"not_in_text_in_order": 1}


def test_conll_columns_become_records(tmp_path):
    lines = ["-DOCSTART- -X- O", "", "New NNP B-geo_place", "York NNP I-geo_place", "won VBD O"]
    lines += ["", "", "Ok UH O", "", "AC\u00a0DC NNP B-Band"]
    records, report = read(write_lines(tmp_path / "a.conll", lines), keep_unlabelled=True)
    assert records == [
        Record("New York won", (Entity(0, 8, "geo place"),)),
        Record("Ok"),
        Record("AC\u00a0DC", (Entity(0, 5, "Band"),)),  # only spaces and tabs divide columns
    ]
    assert (report.rows, report.unlabelled, report.left_out) == (3, 1, 0)


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("IOB1", "I-a I-a B-a O I-b"),
        ("IOB2", "B-a I-a B-a O B-b"),
        ("BIOES", "B-a E-a S-a O S-b"),
        ("BILOU", "B-a L-a U-a O U-b"),
    ],
)
def test_every_tag_scheme_decodes_to_the_same_spans(scheme, tags):
    assert tag_spans(tags.split()) == [(0, 2, "a"), (2, 3, "a"), (4, 5, "b")], scheme


def test_tags_without_prefix_and_changes_of_label_decode():
    assert tag_spans(["art-film", "art-film", "O", "x", "y"]) == [
        (0, 2, "art-film"),
        (3, 4, "x"),
        (4, 5, "y"),
    ]
    assert tag_spans(["B-a", "I-b", "I-b"]) == [(0, 1, "a"), (1, 3, "b")]
    assert tag_spans([]) == []


def test_ragged_conll_lines_are_named(tmp_path):
    lines = ["a\tO", "", "Rome\tB-city", "", "b\tO", "c O", "", "\tO", "", "d\t"]
    _, report = read(write_lines(tmp_path / "a.txt", lines), max_malformed=0.9)
    assert report.malformed.places == {
        "ragged_line": ["a.txt:6"],
        "empty_word": ["a.txt:8"],
        "empty_tag": ["a.txt:10"],
    }


def test_conll_with_one_column_is_refused_at_its_line(tmp_path):
    path = write_lines(tmp_path / "a.txt", ["", "Rome", "fell"])
    with pytest.raises(NunerError, match=r"a\.txt:2: CoNLL needs a word and a tag"):
        read(path)


def test_every_row_ends_in_exactly_one_place(tmp_path):
    rows = [
        *NUNER_ROWS,
        NUNER_ROWS[0],  # the same text again
        {"input": "", "output": "['Rome <> city']"},
        {"input": None, "output": "[]"},
        {"input": "The idea.", "output": "['idea <> Concept', 'The <> word']"},
        {"input": "Nothing here.", "output": "['Rome <> city']"},
        {"input": 7, "output": "[]"},
        {"output": "[]"},
        "{not json",
        "[1]",
        {"input": "x", "output": "{'a': 1}"},
        {"input": "\ud800", "output": "[]"},  # half a character
    ]
    records, report = read(write_lines(tmp_path / "a.jsonl", rows), max_malformed=0.5)
    assert records == [ROME, ANNA]
    assert (report.duplicates, report.empty_text, report.dropped, report.left_out) == (1, 2, 1, 1)
    assert report.malformed.places == {
        "input_not_a_string": ["a.jsonl:8"],
        "missing_input": ["a.jsonl:9"],
        "invalid_json": ["a.jsonl:10"],
        "not_an_object": ["a.jsonl:11"],
        "output_not_a_list": ["a.jsonl:12"],
        "lone_surrogate": ["a.jsonl:13"],
    }
    ends = report.malformed.total() + report.empty_text + report.dropped + report.duplicates
    assert report.rows == len(rows) == ends + report.left_out + report.records


def test_concepts_are_counted_by_annotation_and_once_only_ones_are_singletons(tmp_path):
    rows = [
        {"input": "Rome and Rome and Oslo.", "output": "['Rome <> a', 'Oslo <> b', 'Oslo <> B']"},
        {"input": "Oslo.", "output": "['Oslo <> b', 'Rome <> c']"},  # Rome is not in it
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    report = read(path)[1]
    assert report.concept_counts == {"a": 1, "b": 2, "B": 1}
    assert (report.concepts, report.singletons, report.ambiguous) == (3, 2, 1)
    lowered = read(path, lower_concepts=True)[1]
    assert lowered.concept_counts == {"a": 1, "b": 3}


def test_the_dropped_concept_is_a_choice(tmp_path):
    rows = [*NUNER_ROWS, {"input": "The idea.", "output": "['idea <> concept']"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert len(read(path)[0]) == 2
    assert len(read(path, drop_concept="")[0]) == len(read(path, drop_concept=None)[0]) == 3
    assert read(path, drop_concept="person")[0][0] == ROME


def test_rows_without_entity_are_kept_on_request(tmp_path):
    rows = [*NUNER_ROWS, {"input": "Nothing here.", "output": "[]"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert read(path)[0] == [ROME, ANNA]
    assert read(path, keep_unlabelled=True)[0] == [ROME, ANNA, Record("Nothing here.")]


def test_malformed_rows_up_to_the_share_are_skipped_and_beyond_it_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*NUNER_ROWS, "{", *["[]"] * 5])
    assert read(path, max_malformed=0.75)[0] == [ROME, ANNA]
    with pytest.raises(NunerError) as error:
        read(path, max_malformed=0.74)
    assert "6 of 8 rows are malformed" in str(error.value)
    assert "invalid_json 1 (a.jsonl:3)" in str(error.value)
    assert "not_an_object 5 (a.jsonl:4, a.jsonl:5" in str(error.value)


def test_counts_stay_exact_when_places_are_no_longer_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [*NUNER_ROWS, *["{"] * 50])
    _, report = read(path, max_malformed=1.0)
    assert report.malformed.counts["invalid_json"] == 50
    assert len(report.malformed.places["invalid_json"]) == PLACES_KEPT
    assert "invalid_json 50 (a.jsonl:3, a.jsonl:4, a.jsonl:5, …)" in report_table(report.as_dict())


def test_a_text_in_two_files_is_kept_once(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", NUNER_ROWS)
    second = write_lines(tmp_path / "b.jsonl", [ANNA.as_dict(), {"text": "x", "entities": []}])
    records, report = read([first, second])
    assert records == [ROME, ANNA]
    assert (report.duplicates, report.rows) == (1, 4)


def test_unknown_formats_list_the_known_ones(tmp_path):
    with pytest.raises(NunerError, match="format 'spacy' is unknown; known are: auto, nuner"):
        ImportOptions(format="spacy")
    path = write_lines(tmp_path / "a.jsonl", [{"sentence": "x"}])
    with pytest.raises(NunerError) as error:
        read(path)
    assert "a.jsonl:1" in str(error.value) and "'sentence'" in str(error.value)
    assert all(name in str(error.value) for name in FORMATS)
    (tmp_path / "a.xml").write_text("<x/>")
    with pytest.raises(NunerError, match=r"a\.xml: its format is unknown.*known are: nuner"):
        read(tmp_path / "a.xml")


def test_a_forced_format_holds_for_a_file_of_another(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [ROME.as_dict()])
    with pytest.raises(NunerError, match="missing_input 1"):
        read(path, format="nuner")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: the data set is empty"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: the data set is empty"),
        ("a.csv", b"input,output\n", r"a\.csv: the data set is empty"),
        ("a.json", b"[]", r"a\.json: the data set is empty"),
        ("a.txt", b"", r"a\.txt: the data set is empty"),
        ("a.jsonl", b'{"input": "x", "output": "[]"}\n{"input": "\xe9"}', r"a\.jsonl:2: not UTF-8"),
        ("a.csv", b"input,output\nRome,[]\n\xe9,[]\n", r"a\.csv:\d: not UTF-8 \(byte 0xe9\)"),
        ("a.txt", b"Rome\tB-x\n\xff\tO\n", r"a\.txt:2: not UTF-8"),
        ("a.json", b'[\n{"tokenized_text": ["a"],\n', r"a\.json:\d: the JSON array is truncated"),
        ("a.jsonl", b'{"input": "Rome", "outp', r"1 of 1 rows are malformed.*a\.jsonl:1"),
        ("a.jsonl.gz", b'{"input"', r"a\.jsonl\.gz: named \.gz, but it is not a gzip file"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: corrupt parquet"),
        ("a.jsonl", b'{"input": "x", "output": "[]"}', r"none of the 1 rows .* with an entity"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NunerError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.parquet.gz"])
def test_a_truncated_gzip_is_named(tmp_path, name):
    rows = [{"input": f"Rome {n * n * 7919}", "output": "['Rome <> city']"} for n in range(2000)]
    write = {".jsonl": write_lines, ".csv": write_csv, ".parquet": write_parquet}
    path = write[Path(name).with_suffix("").suffix](tmp_path / name, rows)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(NunerError, match=r"corrupt"):
        read(path)


def test_missing_inputs_and_folders_are_named(tmp_path):
    with pytest.raises(NunerError, match=r"no\.jsonl: no such file"):
        resolve_inputs([str(tmp_path / "no.jsonl")])
    with pytest.raises(NunerError, match="is a folder, and no built data set"):
        resolve_inputs([str(tmp_path)])
    with pytest.raises(NunerError, match="no input given"):
        resolve_inputs([])


def fetch_offline(home: Path, name: str) -> str:
    """What a process without a network makes of a hub name: the paths, or the error."""
    code = (
        "import sys\nfrom nuner_jax.data.importers.hub import fetch\n"
        "from nuner_jax.errors import NunerError\n"
        "try: print(*fetch(sys.argv[1]))\nexcept NunerError as error: print('refused', error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30).stdout


def test_an_unreachable_hub_is_a_quick_and_clear_error(tmp_path):
    said = fetch_offline(tmp_path, "hf:no/such:full")
    assert said.startswith("refused hf:no/such:full: cannot be fetched from the Hugging Face hub")
    assert "download its files" in said


def test_a_data_set_in_the_hub_cache_needs_no_network(tmp_path):
    repo = tmp_path / "hub" / "datasets--some--set"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for part in ("full", "entity"):
        folder = repo / "snapshots" / ("0" * 40) / part
        folder.mkdir(parents=True)
        write_lines(folder / "train.jsonl", NUNER_ROWS)
    (fetched,) = fetch_offline(tmp_path, "hf:some/set:full").split()
    assert fetched.endswith("full/train.jsonl")
    assert read(Path(fetched))[0] == [ROME, ANNA]


def test_a_malformed_hub_name_is_refused():
    with pytest.raises(NunerError, match="hf:NuNER: a hub data set is hf:org/name"):
        fetch("hf:NuNER")


def test_the_part_of_a_hub_data_set_is_told_by_folder_or_file_name():
    shards = ["README.md", "data/entity-00000-of-00001.parquet", "data/full-00000-of-00002.parquet"]
    shards.append("data/full-00001-of-00002.parquet")
    assert choose_files("hf:a/b", shards, "full") == shards[2:]
    folders = ["full/train.jsonl.gz", "full/test.jsonl.gz", "entity/train.jsonl.gz"]
    assert choose_files("hf:a/b", folders, "full") == ["full/test.jsonl.gz", "full/train.jsonl.gz"]
    assert choose_files("hf:a/b", ["train.csv"], None) == ["train.csv"]
    with pytest.raises(NunerError, match=r"several parts.*entity, full"):
        choose_files("hf:a/b", shards, None)
    with pytest.raises(NunerError, match="no part 'ful'; there are: entity, full"):
        choose_files("hf:a/b", shards, "ful")
    with pytest.raises(NunerError, match="holds no parquet"):
        choose_files("hf:a/b", ["README.md"], None)
