"""Few-shot results: what is averaged, compared, told as missing, and shown."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from ml_collections import ConfigDict

from nuner_jax.data.ner.datasets import load
from nuner_jax.errors import NunerError
from nuner_jax.fewshot.figures import draw_curves
from nuner_jax.fewshot.page import examine, read_detail, write_detail, write_page
from nuner_jax.fewshot.results import (
    FURTHER,
    METRICS,
    Grid,
    Results,
    append_rows,
    interval,
    read_rows,
    summarise,
)
from nuner_jax.fewshot.starts import Starts
from nuner_jax.fewshot.tables import (
    as_markdown,
    as_text,
    explanations,
    make_manifest,
    score_table,
    type_table,
    write_tables,
)
from nuner_jax.metrics import Spans, confusion, io_spans

GRID = Grid(("desk", "lab"), ("plain", "tuned"), ("mlp",), (4, 16), (0, 1, 2, 3, 4), "k~2k", "plain")
SCORES = {"plain": [0.10, 0.20, 0.30, 0.40, 0.50], "tuned": [0.15, 0.26, 0.35, 0.46, 0.55]}  # by seed


def rows(grid=GRID):
    """A row for every run: `SCORES`, on lab 0.2 higher, at k = 16 0.3 higher."""
    made = []
    for name, encoder, head, k, rule, seed in grid.runs():
        score = SCORES[encoder][seed % 5] + 0.2 * (name == "lab") + 0.3 * (k == 16)
        run = {"set": name, "encoder": encoder, "head": head, "k": k, "rule": rule, "seed": seed}
        of_type = {"precision": score, "recall": score, "f1": score, "support": 1234}
        scores = {"token_macro_f1": score, "entity_f1": score / 2, "string_f1": score / 4} | dict.fromkeys(
            FURTHER, score
        )
        per_type = {metric: {"a|<b>": of_type} for metric in METRICS}
        sample = {"sample_hash": f"{name}{k}{seed}", "short_types": ["a|<b>"] if (name, k) == ("lab", 16) else []}
        made.append(run | scores | sample | {"per_type": per_type})
    return made


def cell(cells, **wanted):
    wanted = {"metric": "token_macro_f1", "minus": None} | wanted
    (found,) = [one for one in cells if all(getattr(one, name) == value for name, value in wanted.items())]
    return found


def test_a_cell_is_the_mean_and_the_sample_deviation_over_seeds():
    found = cell(summarise(Results(rows(), GRID)), set="desk", encoder="plain", k=4)
    assert (found.n, found.expected) == (5, 5)
    assert found.mean == pytest.approx(0.3)
    assert found.deviation == pytest.approx(np.sqrt(0.1 / 4))
    assert 0.1 <= found.interval[0] < found.mean < found.interval[1] <= 0.5


def test_a_difference_is_paired_by_seed():
    found = cell(summarise(Results(rows(), GRID)), set="lab", encoder="tuned", minus="plain", k=16)
    assert found.mean == pytest.approx(0.054)
    assert found.deviation == pytest.approx(np.std([0.05, 0.06, 0.05, 0.06, 0.05], ddof=1))
    assert 0.0499 < found.interval[0] < found.interval[1] < 0.0601  # far narrower than either score's


def test_the_baseline_is_not_compared_with_itself():
    assert {one.encoder for one in summarise(Results(rows(), GRID)) if one.minus} == {"tuned"}


def test_the_mean_over_sets_varies_with_the_seeds_alone():
    cells = summarise(Results(rows(), GRID))
    found, single = (cell(cells, set=name, encoder="plain", k=4) for name in (None, "desk"))
    assert found.mean == pytest.approx(0.4)
    assert found.deviation == pytest.approx(single.deviation)  # the sets differ by a constant
    assert found.interval_over_sets is None  # of two sets


def test_enough_sets_give_an_interval_over_sets():
    grid = Grid(("a", "b", "c", "d", "lab"), *(getattr(GRID, name) for name in GRID.__slots__[1:]))
    found = cell(summarise(Results(rows(grid), grid)), set=None, encoder="plain", k=4)
    assert 0.3 <= found.interval_over_sets[0] < 0.34 < found.interval_over_sets[1] <= 0.5
    assert "… interval over sets" in as_text(score_table(summarise(Results(rows(grid), grid)), grid, "token_macro_f1"))


@pytest.mark.parametrize(("n", "least"), [(5, 0.90), (10, 0.93)])
def test_an_interval_holds_the_mean_of_its_distribution_as_often_as_it_says(n, least):
    rng = np.random.default_rng(0)
    bounds = [interval(values) for values in rng.normal(size=(1000, n))]
    assert least <= np.mean([low <= 0 <= high for low, high in bounds]) <= 0.98


def test_an_interval_is_the_same_each_time_and_needs_five_values():
    values = np.random.default_rng(0).normal(size=7)
    assert interval(values) == interval(values)
    assert interval(values[:4]) is None


def test_missing_rows_are_told_and_spoil_the_mean_over_sets():
    gone = [row for row in rows() if (row["set"], row["encoder"], row["k"]) != ("lab", "tuned", 4)]
    gone.remove(next(row for row in gone if row["set"] == "desk" and row["encoder"] == "plain" and row["k"] == 16))
    results = Results(gone, GRID)
    cells = summarise(results)
    table = {(set_name, system): scores for set_name, system, _, *scores in score_table(cells, GRID, "token_macro_f1")}
    assert table["desk", "plain"][1].endswith("(4/5 seeds)")
    assert table["", "… minus plain"] == ["incomplete", "incomplete (4/5 seeds)"]  # the last block: the mean of sets
    assert cell(cells, set="lab", encoder="tuned", k=4).mean is None
    assert cell(cells, set=None, encoder="tuned", k=4).mean is None
    lines = explanations(results)
    assert "INCOMPLETE: 6 of 40 results are missing." in lines
    assert "missing: lab, tuned, k = 4: 5 of 5 seeds" in lines
    cells = [f"{score} ({score} / {score})" for score in ("50.0", "80.0", "85.4")]
    assert type_table(results, "lab", "entity_f1") == [
        ("type", "mentions", "plain, k = 4", "plain, k = 16", "tuned, k = 4", "tuned, k = 16"),
        ("a|<b>", "1,234", cells[0], cells[1], "–", cells[2]),
    ]


def test_nothing_at_all_is_still_a_table():
    results = Results([], GRID)
    assert score_table(summarise(results), GRID, "entity_f1")[1] == ("desk", "plain", "5", "missing", "missing")
    assert len(results.missing) == 40


def test_rows_outside_the_grid_are_left_aside():
    other = [row | {"rule": "kw", "token_macro_f1": 1.0} for row in rows()]
    assert summarise(Results(rows() + other, GRID)) == summarise(Results(rows(), GRID))


def test_encoders_that_saw_other_samples_are_not_compared():
    made = rows()
    made[-1]["sample_hash"] = "another"
    with pytest.raises(NunerError, match="set lab, encoder tuned, head mlp, k 16, .*seed 4 has the sample another"):
        Results(made, GRID)


def test_two_rows_for_one_run_are_refused():
    with pytest.raises(NunerError, match=r"results.jsonl has two rows for set desk, encoder plain"):
        Results([*rows(), rows()[0]], GRID)


def test_seeds_that_drew_the_same_sample_are_told():
    made = [row | {"sample_hash": "all"} if row["set"] == "lab" and row["k"] == 16 else row for row in rows()]
    (line,) = [line for line in explanations(Results(made, GRID)) if "the pool is small" in line]
    assert line.startswith("lab, k = 16: 5 seeds drew only 1 different sample, as the pool is small for this k;")


def test_what_a_killed_process_left_of_a_line_is_dropped_and_nothing_else(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == []
    append_rows(path, rows()[:2])
    with path.open("ab") as file:
        file.write('{"set": "dé'.encode()[:-1])  # torn within a letter
    assert read_rows(path) == rows()[:2]
    append_rows(path, rows()[2:])
    assert read_rows(path) == rows()


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, [rows()[0], {"set": "desk"}])
    with pytest.raises(NunerError, match=r"results.jsonl:2: the row has no encoder, head"):
        read_rows(path)
    path.write_text("{]\n")
    with pytest.raises(NunerError, match=r"results.jsonl:1: not a row"):
        read_rows(path)


def test_text_is_aligned_and_markdown_is_escaped():
    text = as_text(score_table(summarise(Results(rows(), GRID)), GRID, "token_macro_f1")).splitlines()
    assert text[2].startswith("desk            plain          5      30.0 ± 15.8 [")
    assert text[4].startswith("                … minus plain  5      +5.4 ± 0.5 [+5.")
    markdown = as_markdown(type_table(Results(rows(), GRID), "desk", "token_macro_f1")).splitlines()
    assert markdown[1] == "|---|---|---|---|---|---|"
    assert markdown[2].startswith("| a\\|<b> | 1,234 | 30.0 (30.0 / 30.0) |")


def test_a_score_that_was_learnt_from_fewer_than_k_is_marked_and_explained():
    results = Results(rows(), GRID)
    table = {row[:2]: row[3:] for row in score_table(summarise(results), GRID, "token_macro_f1")}
    assert table["lab", "plain"][1].startswith("80.0† ±") and table["mean of 2 sets", "plain"][1].startswith("70.0† ±")
    assert "†" not in "".join([*table["desk", "plain"], table["lab", "plain"][0], *table["", "… minus plain"]])
    assert "†: of some types, samples have fewer than k mentions; see below." in explanations(results)
    whole = Results([row | {"short_types": []} for row in rows()], GRID)
    assert not [line for line in explanations(whole) if "†" in line]


def test_a_table_names_heads_where_there_are_several():
    grid = Grid(GRID.sets, GRID.encoders, ("linear", "mlp"), GRID.k, GRID.seeds, GRID.rule, None)
    table = score_table(summarise(Results(rows(grid), grid)), grid, "token_macro_f1")
    assert [row[1] for row in table[1:5]] == ["plain, linear", "tuned, linear", "plain, mlp", "tuned, mlp"]


@pytest.fixture(scope="module")
def reports():
    """Of two data sets; the first one has a sentence twice."""
    desk = load({"name": "travel_desk"}).report
    again = desk["duplicate_sentences"] | {"within train": 1}
    return {"desk": desk | {"duplicate_sentences": again}, "lab": load({"name": "lab_notes"}).report}


@pytest.fixture
def manifest(tmp_path, reports):
    """Makes the manifest of results, at a second start."""
    config = ConfigDict({"seed": 0, "k": (4, 16)})
    (tmp_path / "starts.json").write_text('[{"command": "first", "seconds": 12.5}]')
    return lambda results: make_manifest(config, results, reports, {"plain": "p1", "tuned": "t1"}, Starts(tmp_path))


def test_files_hold_all_that_is_needed_to_get_the_numbers_again(tmp_path, manifest, reports):
    results = Results(rows(), GRID)
    cells = summarise(results)
    write_tables(results, cells, manifest(results), tmp_path, notes=["lab: the pool is small"])
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["manifest"]["sample_hashes"]["lab"]["16"]["3"] == "lab163"
    assert whole["manifest"]["config"] == {"seed": 0, "k": [4, 16]}
    assert whole["manifest"]["encoder_fingerprints"] == {"plain": "p1", "tuned": "t1"}
    assert whole["manifest"]["data_fingerprints"]["lab"] == reports["lab"]["fingerprint"]
    assert [start["seconds"] for start in whole["manifest"]["starts"]] == [12.5, 0.0]
    assert whole["manifest"]["command"] == whole["manifest"]["starts"][1]["command"] != "first"
    assert whole["manifest"]["seconds"] == 12.5
    assert {"jax", "numpy", "python", "nuner_jax"} <= whole["manifest"]["versions"].keys()
    assert len(whole["cells"]) == len(cells)
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    (line,) = [
        line
        for line in lines
        if (line["metric"], line["set"], line["minus"], line["k"]) == ("entity_f1", "lab", "plain", "4")
    ]
    assert float(line["mean"]) == pytest.approx(0.027)
    assert (line["n"], line["expected"]) == ("5", "5")
    with open(tmp_path / "types.csv", newline="") as file:
        of_types = [line for line in csv.DictReader(file) if (line["set"], line["metric"]) == ("lab", "string_f1")]
    assert [(line["encoder"], line["k"], line["n"], line["support"]) for line in of_types] == [
        (encoder, k, "5", "1234") for encoder in ("plain", "tuned") for k in ("4", "16")
    ]
    assert float(of_types[0]["recall"]) == pytest.approx(0.5)
    markdown = (tmp_path / "results.md").read_text()
    assert all(f"## {title[:1].upper()}{title[1:]}" in markdown for title in METRICS.values())
    assert "duplicate sentences within train: 1" in markdown
    assert "- lab: the pool is small" in markdown


TEXTS = ["Visit <Oslo> & Bergen", "Bergen is wet", "Ada saw Bergen"]
WORDS = np.array([[0, 5], [6, 12], [13, 14], [15, 21], [0, 6], [7, 9], [10, 13], [0, 3], [4, 7], [8, 14]])
OFFSETS = np.array([0, 4, 7, 10])
RIGHT = np.array([0, 1, 0, 1, 1, 0, 0, 2, 0, 1])
FOUND = np.array([[0, 0, 0, 1, 2, 0, 0, 2, 2, 1], [0, 0, 0, 0, 2, 0, 0, 2, 0, 1]])  # by two heads


def detail():
    gold = io_spans(RIGHT, OFFSETS).in_characters(WORDS, OFFSETS)
    found = io_spans(FOUND, OFFSETS).in_characters(WORDS, OFFSETS)
    return examine("tuned, k = 16", ("place", "person"), TEXTS, gold, found, confusion(RIGHT, FOUND, 2))


def test_the_worst_errors_are_those_of_most_heads_with_what_was_found_instead():
    place, person = detail().types
    assert (place.type, place.support, place.missed, place.wrong) == ("place", 4, 2.5, 0)
    assert [(one.heads, one.text[one.start : one.end], one.instead) for one in place.worst_missed] == [
        (2, "<Oslo>", ""),
        (2, "Bergen", "“Bergen” as person (2 of 2)"),
    ]
    assert (person.missed, person.wrong) == (0.5, 1.5)
    assert [(one.heads, one.text[one.start : one.end], one.instead) for one in person.worst_wrong] == [
        (2, "Bergen", "“Bergen” as place"),
        (1, "Ada saw", "“Ada” as person"),
    ]
    assert detail().confusion[1] == [1.5, 1.5, 1.0]


def test_a_detail_survives_its_file(tmp_path):
    write_detail(detail(), tmp_path / "lab.json")
    assert read_detail(tmp_path / "lab.json") == detail()


class Reader(HTMLParser):
    """Checks that every tag is closed, and keeps what a browser would fetch, run or read."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_whole_escaped_and_fetches_nothing(tmp_path, manifest):
    results = Results(rows()[:-1], GRID)
    cells = summarise(results)
    figures = [draw_curves(cells, GRID, "token_macro_f1", tmp_path / "curves.png")]
    out = write_page(results, cells, manifest(results), {"lab": detail()}, figures, tmp_path / "index.html")
    reader = Reader()
    reader.feed(out.read_text())
    assert not reader.open
    assert not reader.tags & {"script", "link", "iframe", "oslo", "b"}
    sources = [value for name, value in reader.attributes if name in ("src", "href", "srcset", "data")]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    assert not re.search(r"https?://", out.read_text())
    text = " ".join("".join(reader.words).split())
    assert "INCOMPLETE: 1 of 40 results are missing." in text
    assert "Visit <Oslo> & Bergen" in text
    assert "place: of 4 mentions 2.5 missed, and 0.0 wrong, per seed" in text
    assert "missed by 2 of 2" in text and "duplicate sentences within train: 1" in text
    assert "“Bergen” as person (2 of 2)" in text


@pytest.mark.parametrize("sets", [("desk",), ("desk", "lab", "a", "b")])
def test_curves_are_drawn_whatever_is_there(tmp_path, sets):
    grid = Grid(sets, GRID.encoders, ("linear", "mlp"), GRID.k, GRID.seeds, GRID.rule, "plain")
    for made in (rows(grid), rows(grid)[:7], []):
        path = draw_curves(summarise(Results(made, grid)), grid, "string_f1", tmp_path / "curves.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


def test_a_repeated_gold_mention_is_one_error():
    gold = Spans.of([(0, 0, 5, 1), (0, 0, 5, 1)])
    (only,) = examine("t", ("place",), TEXTS, gold, Spans.of([]), np.zeros((1, 2, 2), int)).types
    assert (only.support, only.missed) == (1, 1)
