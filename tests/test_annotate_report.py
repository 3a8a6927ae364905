"""The report: one page that is readable offline, a data card, a table of concepts, and figures of what they say."""

from __future__ import annotations

import asyncio
import base64
import csv
import dataclasses
import html.parser
import json
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

from nuner_jax.annotate.alignment import align_journal, read_rows, share
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.report import figures
from nuner_jax.annotate.report.accounts import line_rows, meaning, selection_rows, words
from nuner_jax.annotate.report.card import size_category, without_credentials
from nuner_jax.annotate.report.page import Concepts, concept_examples, write_report
from nuner_jax.annotate.selection.select import LEFT_OUT, no_counts, provenance
from nuner_jax.annotate.units import Outcome, Unit, Usage
from nuner_jax.annotate.workdir import ALIGNED_FILE, COUNTS_FILE
from nuner_jax.config import annotate
from nuner_jax.data.align import Alignment
from nuner_jax.data.completions import Completion
from nuner_jax.errors import NunerError

SCRIPT = "<script>alert('Rome')</script> & \"Anna\" met | Bob `at` noon."
ANSWERS = [
    (
        "Rome fell in May.",
        Outcome("", "done", "Rome <> Cities <> a large town\nMay <> month\nParis <> city\nOops <b>\n"),
    ),
    (SCRIPT, Outcome("", "done", "Anna <> <i>person</i>\nBob <> a|b <> `x`\nat <> city\nalert <> </td><script>")),
    ("Nothing is found here.", Outcome("", "done", "Atlantis <> myth")),
    ("It was refused.", Outcome("", "failed", error="refusal: <script>no</script>")),
    ("Nobody asked for this one.", None),
]
SECRETS = ("hunter2", "sk-very-secret")


def make_run(workdir: Path, answers, **changes) -> Path:
    """A run of all stages before the report, whose outcomes are given; then its report. Gives the page."""
    config = annotate()
    config.endpoint.model = "some-model"
    config.endpoint.base_url = "https://me:hunter2@example.org/v1?key=sk-very-secret"
    config.price.input, config.price.output = 0.5, 1.5
    for key, value in changes.items():
        section, _, name = key.partition("_")
        config[section][name] = value
    units = [Unit.of(text, f"made.txt:{n}") for n, (text, _) in enumerate(answers, start=1)]

    async def record(journal) -> None:
        for pending in journal.pending(-1, len(units)):
            if outcome := answers[pending.position][1]:
                request = await journal.begin([pending], 7)
                end = dataclasses.replace(outcome, unit=pending.id)
                await journal.finish(request, [end], usage=Usage(100, 20, 10), cost=80_000_000)

    identity = {key: config.endpoint[key] for key in ("model", "temperature", "top_p", "max_tokens", "extra")}
    identity |= Prompt.make(config.prompt).identity()
    if config.endpoint.kind == "replay":
        identity = {"replay": "0123456789abcdef"}
    with Journal.open(workdir / "journal.sqlite", identity) as journal:
        journal.set_units(units, "made here")
        asyncio.run(record(journal))
        align_journal(config, journal, workdir, lambda line: None)
    (workdir / "selection").mkdir()
    read = {"texts": 9, "malformed": 1, "units": len(units) + 4, "too_short": 3, "duplicate": 1, "selected": len(units)}
    selection = {
        "fingerprint": "made here",
        "counts": no_counts() | read,
        "malformed": {"invalid_json": {"count": 1, "first": ["made.txt:77"]}},
        **provenance(config, []),
    }
    (workdir / "selection" / "selection.json").write_text(json.dumps(selection))
    return write_report(config, workdir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, ANSWERS, align_normalise=("case", "plural"))
    return folder


class Page(html.parser.HTMLParser):
    """A page taken apart; a tag that is not closed, or closed twice, is an error."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.seen, self.attributes, self.text = [], Counter(), [], []
        self.rows: dict[str, list[list[str]]] = {}  # of tables, by the last heading
        self.marks: list[str] = []
        self._heading = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen[tag] += 1
        self.attributes += attributes
        if tag in ("h2", "h3"):
            self._heading = ""
        if tag == "tr":
            self.rows.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.rows[self._heading][-1].append("")
        if tag == "mark":
            self.marks.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h2", "h3"):
            self._heading += data
        if "td" in self.open or "th" in self.open:
            self.rows[self._heading][-1][-1] += data
        if "mark" in self.open:
            self.marks[-1] += data


@pytest.fixture(scope="module")
def page(workdir) -> Page:
    return Page(workdir / "report" / "index.html")


def counts_of(workdir: Path) -> dict:
    return json.loads((workdir / COUNTS_FILE).read_text())


def test_the_page_is_one_well_formed_file_without_scripts_and_without_anything_from_elsewhere(page):
    assert not page.seen["script"] and not page.seen["link"] and not page.seen["iframe"]
    assert page.seen["html"] == page.seen["body"] == page.seen["title"] == 1
    assert ("lang", "en") in page.attributes and ("charset", "utf-8") in page.attributes
    assert any(name == "name" and value == "viewport" for name, value in page.attributes)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [value for name, value in page.attributes if "http" in value and name != "http-equiv"]
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 3
    for source in sources:
        kind, _, data = source.partition("base64,")
        assert kind == "data:image/png;" and base64.b64decode(data).startswith(b"\x89PNG")


def test_what_a_text_or_a_model_says_stays_text(page):
    text = "".join(page.text)
    assert "<script>alert('Rome')</script> & \"" in text
    assert "<i>person</i>" in text and "</td><script>" in text and "Oops <b>" in text
    assert not page.seen["i"] and not page.seen["b"]


def test_the_prompt_is_there_word_for_word(page, workdir):
    template = Prompt.make(annotate().prompt).identity()["template"]
    assert template in "".join(page.text)
    assert template in (workdir / "report" / "DATA_CARD.md").read_text()


def test_the_page_accounts_for_every_unit_and_every_line(page, workdir):
    counts = counts_of(workdir)
    units = {name: int(number) for name, number, *_ in page.rows["Outcome"][1:]}
    assert units.pop("all") == sum(units.values()) == len(ANSWERS)
    assert list(units.values()) == [2, 0, 1, 1, 1]
    assert ["nothing found, left out", "1", "20.00%"] in [row[:3] for row in page.rows["Outcome"]]
    lines = {name: int(number) for name, number, *_ in page.rows["Lines of the completions"][1:]}
    assert lines.pop("all") == sum(lines.values()) == counts["lines"]["all"] == 10
    assert lines["without a place: not in text"] == 2 and lines["rejected: no delimiter"] == 1
    examples = {name: shown for name, *_, shown in page.rows["Lines of the completions"][1:]}
    assert examples["rejected: no delimiter"] == "Oops <b>"
    assert "Paris <> city" in examples["without a place: not in text"]
    assert page.rows["Failed units, by reason"][1:] == [["refusal", "1"]]
    selection = {row[0]: row[1:] for row in page.rows["Selection"][1:]}
    assert selection["too short"] == ["3", "33.33%", "fewer characters than source.min_chars"]
    left_out = sum(int(selection[words(reason)][0]) for reason in LEFT_OUT)
    assert int(selection["units"][0]) == left_out + int(selection["selected"][0]) == 9
    assert "invalid_json 1 (made.txt:77)" in page.text
    assert all(row[3] for heading in ("Selection", "Outcome", "Lines of the completions") for row in page.rows[heading])


def test_every_reason_that_there_is_has_its_meaning():
    reasons = re.findall(r'"(\w+)"', Completion.__doc__ + Alignment.__doc__)
    assert len(reasons) == 21 and all(meaning(reason) for reason in reasons)
    counts = no_counts()
    assert [row.key for row in selection_rows(counts)] == list(counts)


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [(0, 9, "0.00%"), (1, 34_657, "<0.01%"), (34_656, 34_657, ">99.99%"), (9, 9, "100.00%"), (1, 3, "33.33%")],
)
def test_a_share_is_nothing_or_all_only_if_it_is(part, whole, said):
    assert share(part, whole) == said


def test_the_page_shows_the_money(page):
    money = dict(page.rows["What it cost"])
    assert money["spent"].startswith("$0.0003")  # four requests of 80,000,000 picodollars
    assert (money["prompt tokens"], money["completion tokens"]) == ("400", "80")
    assert "$0.5" in money["prices"] and "$1.5" in money["prices"]


def test_concepts_come_with_their_mentions_and_examples_in_context(page, workdir):
    rows = {name: (int(count), shown) for name, count, _, shown in page.rows["Most frequent concepts"][1:]}
    assert sum(count for count, _ in rows.values()) == counts_of(workdir)["records"]["entities"] == 6
    assert page.rows["Most frequent concepts"][1][:3] == ["city", "2", "Cities (1), city (1)"]
    count, shown = rows["city"]
    assert count == 2 and "Rome fell in May." in shown and "Bob `at` noon." in shown
    assert Counter(page.marks) == Counter(["Rome", "May", "Anna", "Bob", "at", "alert"])


def test_the_table_of_concepts_keeps_what_the_annotator_called_them(workdir):
    with open(workdir / "report" / "concepts.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"concept": "city", "count": "2", "raw_names": '{"Cities": 1, "city": 1}'}
    assert all(sum(json.loads(row["raw_names"]).values()) == int(row["count"]) for row in rows)
    assert {row["concept"] for row in rows} == {"city", "month", "<i>person</i>", "a|b", "</td><script>"}


def test_the_card_is_one_that_the_hub_reads(workdir):
    card = DatasetCard((workdir / "report" / "DATA_CARD.md").read_text())
    assert card.data.to_dict() == {
        "language": ["en"],
        "license": "unknown",
        "task_categories": ["token-classification"],
        "size_categories": ["n<1K"],
        "tags": ["named-entity-recognition", "nuner", "machine-generated"],
    }
    for said in ("some-model", "https://example.org/v1", "Unlabelled is not negative", "To be filled in", "made here"):
        assert (said in card.text) == (said != "made here"), said
    assert "Not complete: 1 of 5 units" in card.text
    assert r"a\|b" in card.text  # within a table or a list, a text is itself


@pytest.mark.parametrize(
    ("count", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (123_456, "100K<n<1M"), (1_000_000, "1M<n<10M"), (2 * 10**9, "1B<n<10B")],
)
def test_the_card_names_the_size_as_the_hub_does(count, size):
    assert size_category(count) == size


def test_no_secret_is_in_the_report(workdir):
    files = list((workdir / "report").iterdir())
    assert len(files) == 6
    for path in files:
        assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()], path


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pw@host:80/v1?key=x#y", "https://host:80/v1"),
        ("--config.endpoint.base_url=http://me@host/v1 --stages=align", None),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("hf:org/name@main what? a@b", "hf:org/name@main what? a@b"),
        ("http://host/models@v2/x", "http://host/models@v2/x"),
        ("https://me:p@w@host/v1", "https://host/v1"),
        ("gs://me@bucket/part-?.jsonl, s3://b/a#1?.gz", "gs://bucket/part-?.jsonl, s3://b/a#1?.gz"),
    ],
)
def test_urls_lose_what_may_be_secret_and_nothing_else(text, clean):
    expected = clean or "--config.endpoint.base_url=http://host/v1 --stages=align"
    assert without_credentials(text) == expected


def test_a_missing_stage_is_named(tmp_path):
    with pytest.raises(NunerError, match="run the stage select first"):
        write_report(annotate(), tmp_path)


def test_a_run_without_any_record_has_a_report_too(tmp_path):
    page = Page(make_run(tmp_path, [("Nobody asked for this one.", None)], endpoint_kind="replay", price_input=None))
    assert "0 texts annotated" in "".join(page.text)
    assert "Most frequent concepts: none." in (tmp_path / "report" / "DATA_CARD.md").read_text()


def test_of_recordings_nothing_is_said_that_nobody_knows(tmp_path):
    page = Page(make_run(tmp_path, ANSWERS[:2], endpoint_kind="replay"))
    assert dict(page.rows["What it cost"]) == {"spent": "nothing: recorded completions", "units asked for": "2"}
    made = dict(page.rows["What it is"])
    assert made["model and prompt"].startswith("not known here") and "first replayed" in made
    card = (tmp_path / "report" / "DATA_CARD.md").read_text()
    for text in (card, "".join(page.text).partition("Settings")[0]):
        assert "some-model" not in text and "The goal is" not in text and "temperature" not in text


def test_what_was_done_is_told_and_not_what_the_config_says_by_now(tmp_path):
    make_run(tmp_path, ANSWERS[:1], align_normalise=("case",))
    config = annotate()
    config.endpoint.model, config.source.unit, config.align.normalise = "another-model", "row", ()
    config.prompt.template = "structured"
    page = Page(write_report(config, tmp_path))
    made = dict(page.rows["What it is"])
    assert (made["model"], made["unit of text"].split(",")[0]) == ("some-model", "sentence")
    assert "capitals of titles lowered" in made["names of concepts"]
    assert Prompt.make(annotate().prompt).single in "".join(page.text)


def test_prices_that_are_not_known_make_a_spend_that_is_not_known(tmp_path):
    page = Page(make_run(tmp_path, ANSWERS[:1], price_input=None))
    assert "not known" in dict(page.rows["What it cost"])["spent"]


def test_examples_are_few_of_different_words_and_cut_around_the_mention():
    def row(text: str, *words: str) -> dict:
        entities = [{"start": text.index(word), "end": text.index(word) + len(word), "concept": "c"} for word in words]
        return {"text": text, "entities": entities}

    rows = [row("A b.", "A", "b"), row("a again", "a"), row("x" * 99 + "<long>" + "y" * 99, "<long>"), row("d", "d")]
    shown = concept_examples(rows, ["c", "absent"])
    assert shown == {
        "c": ["<mark>A</mark> b.", "A <mark>b</mark>.", f"…{'x' * 60}<mark>&lt;long&gt;</mark>{'y' * 60}…"],
        "absent": [],
    }


def test_concepts_are_counted_as_they_stand_in_the_aligned_file(workdir):
    concepts = Concepts.read(read_rows(workdir / ALIGNED_FILE))
    assert concepts.top(1) == [("city", 2)]
    assert concepts.raw_names("month") == {"month": 1}
    assert len(concepts.mentions) == counts_of(workdir)["records"]["concepts"]


# --- The figures -------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 12), max_size=40))
def test_the_curve_goes_through_every_rank(frequencies):
    ranks, levels = figures.frequency_by_rank(frequencies)
    assert ranks == sorted(set(ranks)) and len(ranks) == len(levels)
    level_at = {}
    for begin, end, level, following in zip(ranks, [*ranks, 0][1:], levels, [*levels, 0][1:], strict=True):
        level_at |= dict.fromkeys(range(begin, end) if following == level else [begin], level)
    assert [level_at[rank] for rank in range(1, len(frequencies) + 1)] == sorted(frequencies, reverse=True)


def test_units_with_very_many_annotations_share_the_last_bar():
    numbers, units = figures.per_unit_bars({"0": 2, "3": 5, "30": 1, "77": 4})
    assert numbers == list(range(31))
    assert {number: count for number, count in zip(numbers, units, strict=True) if count} == {0: 2, 3: 5, 30: 5}


def test_every_line_is_in_one_bar(workdir):
    counts = counts_of(workdir)
    whole, *rows = line_rows(counts)
    assert sum(row.count for row in rows) == whole.count == counts["lines"]["all"]
    assert [(row.name, row.count) for row in rows][:3] == [
        ("found letter by letter", 6),
        ("found by tolerant match", 0),
        ("without a place: not in text", 2),
    ]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", content[16:24])


def test_the_figures_show_what_they_are_given(workdir, tmp_path):
    report = workdir / "report"
    assert png_size(report / figures.FREQUENCY_FILE) == png_size(report / figures.PER_UNIT_FILE) == (768, 504)
    width, height = png_size(report / figures.OUTCOME_FILE)
    assert width == 960 and height > 200
    counts = counts_of(workdir)
    again = figures.draw_all(counts, [2, 1, 1, 1, 1], tmp_path)
    assert [path.read_bytes() for path in again] == [(report / path.name).read_bytes() for path in again]
    counts["annotations_per_unit"]["7"] = 9
    counts["lines"]["ignored"]["blank"] += 5
    other = figures.draw_all(counts, [3, 1, 1], tmp_path)
    assert all(path.read_bytes() != (report / path.name).read_bytes() for path in other)
