"""The stage `report`: one page that shows all of an annotation run, readable offline, and a data card.

WORKDIR/report/index.html     one file: no script, nothing fetched
WORKDIR/report/DATA_CARD.md   for whoever publishes the data set
WORKDIR/report/concepts.csv   every concept, its mentions, and what the annotator called it
WORKDIR/report/*.png          the figures of the page
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.alignment import read_rows
from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.report.accounts import Row, line_rows, mention_notes, selection_rows, unit_rows, words
from nuner_jax.annotate.report.card import (
    CARD_FILE,
    LIBRARIES,
    Facts,
    Pairs,
    data_card,
    making,
    money,
    without_credentials,
)
from nuner_jax.annotate.report.figures import draw_all
from nuner_jax.annotate.workdir import (
    ALIGNED_FILE,
    COUNTS_FILE,
    JOURNAL_FILE,
    REJECTED_FILE,
    REPORT_FOLDER,
    SELECTION_FILE,
    SELECTION_FOLDER,
    of_stage,
    read_json,
)
from nuner_jax.data.importers.report import kind_lines
from nuner_jax.folders import writing
from nuner_jax.webpage import Html, bullets, document, folded, image, marked, table
from nuner_jax.workdir import command, versions

PAGE_FILE = "index.html"
CONCEPTS_FILE = "concepts.csv"
TOP_CONCEPTS = 50
EXAMPLES = 3  # of a concept, and of a reason for rejecting lines
_CONTEXT = 60  # characters on either side of a mention
_LINE = 200  # characters of a rejected line


@dataclass
class Concepts:
    """The concepts of a data set: their mentions, and other names that were brought to them."""

    mentions: Counter[str] = field(default_factory=Counter)
    other_names: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, rows: Iterable[Mapping[str, Any]]) -> Concepts:
        """Counts the rows of the aligned file; only the concepts are held in memory."""
        concepts = cls()
        for row in rows:
            for entity, raw in zip(row["entities"], row["raw_concepts"], strict=True):
                name = entity["concept"]
                concepts.mentions[name] += 1
                if raw != name:
                    concepts.other_names.setdefault(name, Counter())[raw] += 1
        return concepts

    def top(self, number: int) -> list[tuple[str, int]]:
        """The most frequent concepts with their mentions; of equal ones, by name."""
        return sorted(self.mentions.items(), key=lambda one: (-one[1], one[0]))[:number]

    def raw_names(self, name: str) -> dict[str, int]:
        """What the annotator called a concept, and how often; the most frequent first."""
        others = self.other_names.get(name, Counter())
        raw = Counter({name: self.mentions[name] - others.total()}) + others
        return dict(sorted(raw.items(), key=lambda one: (-one[1], one[0])))


def write_report(config: ConfigDict, workdir: Path) -> Path:
    """Writes the report of what the earlier stages left in `workdir`, in place of an earlier one; gives its page.

    Raises:
      NunerError: a stage has not been run yet, or the report cannot be written.
    """
    facts = _facts(config, workdir)
    aligned = workdir / ALIGNED_FILE
    concepts = Concepts.read(read_rows(aligned))
    top = concepts.top(TOP_CONCEPTS)
    examples = concept_examples(read_rows(aligned), [name for name, _ in top])
    rejected = rejected_examples(read_rows(workdir / REJECTED_FILE), facts.counts)
    folder = workdir / REPORT_FOLDER
    with writing(folder):
        folder.mkdir(exist_ok=True)
        write_concepts(concepts, folder / CONCEPTS_FILE)
        figures = draw_all(facts.counts, concepts.mentions.values(), folder)
        (folder / CARD_FILE).write_text(data_card(facts, top[:10]), encoding="utf-8")
        (folder / PAGE_FILE).write_text(page(facts, concepts, examples, rejected, figures), encoding="utf-8")
    return folder / PAGE_FILE


def concept_examples(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Html]]:
    """Of each of these concepts, its first mentions with different words, each marked within its text."""
    found: dict[str, dict[str, Html]] = {name: {} for name in names}
    missing = len(names)
    for row in rows:
        if not missing:
            break
        for entity in row["entities"]:
            seen = found.get(entity["concept"])
            if seen is None or len(seen) == EXAMPLES:
                continue
            text, start, end = row["text"], entity["start"], entity["end"]
            seen.setdefault(text[start:end].lower(), marked(text, start, end, _CONTEXT))
            missing -= len(seen) == EXAMPLES
    return {name: list(seen.values()) for name, seen in found.items()}


def rejected_examples(rows: Iterable[Mapping[str, str]], counts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of each reason in align.json for which lines were rejected, the first different lines."""
    wanted = {**counts["lines"]["rejected"], **counts["annotations"]["unplaced"]}
    found: dict[str, list[str]] = {reason: [] for reason in wanted}
    for row in rows:
        lines = found.get(row["reason"], [])
        line = row["line"] if len(row["line"]) <= _LINE else row["line"][:_LINE] + "…"
        if len(lines) < EXAMPLES and line not in lines:
            lines.append(line)
    return found


def write_concepts(concepts: Concepts, path: Path) -> None:
    """Writes concept, mentions, and a JSON object of the annotator's names with their counts; by frequency."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["concept", "count", "raw_names"])
        for name, count in concepts.top(len(concepts.mentions)):
            writer.writerow([name, count, json.dumps(concepts.raw_names(name), ensure_ascii=False)])


def page(
    facts: Facts,
    concepts: Concepts,
    examples: Mapping[str, Sequence[Html]],
    rejected: Mapping[str, Sequence[str]],
    figures: Sequence[Path],
) -> str:
    """The page: a whole HTML document."""
    records = facts.counts["records"]
    title = f"{records['records']:,} texts annotated by a language model"
    images = Html("".join(image(path, words(path.stem)) for path in figures))
    settings = table(("key", "value"), _leaves(facts.config))
    sections = [
        ("What it is", _pairs(making(facts))),
        *_prompt(facts),
        ("What it cost", _pairs(money(facts))),
        ("Units", _units(facts)),
        ("Lines of the completions", _lines(facts.counts, rejected)),
        ("Figures", images),
        ("Most frequent concepts", _concepts(concepts, examples)),
        (
            "Versions and command",
            Html(_pairs(list(versions(LIBRARIES).items())) + f"<pre>{escape(facts.command)}</pre>"),
        ),
        ("Settings", folded("All keys of the config", settings)),
    ]
    lead = (
        f"{records['entities']:,} mentions of {records['concepts']:,} concepts, "
        f"{records['singletons']:,} of them mentioned once."
    )
    return document(title, lead, sections)


def _facts(config: ConfigDict, workdir: Path) -> Facts:
    selection = read_json(workdir / SELECTION_FOLDER / SELECTION_FILE, "select")
    counts = read_json(workdir / COUNTS_FILE, "align")
    with Journal.open(of_stage(workdir / JOURNAL_FILE, "request"), read_only=True) as journal:
        return Facts(
            config=config,
            identity=journal.identity,
            selection=selection,
            counts=counts,
            totals=journal.totals(),
            failures=journal.failures(),
            faults=journal.faults(),
            command=without_credentials(command()),
        )


def _prompt(facts: Facts) -> list[tuple[str, Html]]:
    """The section of the prompt, if it is known: recordings do not tell theirs."""
    if facts.recorded:
        return []
    return [("The prompt, word for word", Html(f"<pre>{escape(facts.identity['template'])}</pre>"))]


def _units(facts: Facts) -> Html:
    """What became of the units: in the selection, then with the endpoint, then in alignment."""
    malformed = bullets(kind_lines(facts.selection["malformed"], places=3)) if facts.selection["malformed"] else ""
    parts = [
        Html("<h3>Selection</h3>"),
        table(("what", "#number", "#share", "meaning"), map(_cells, selection_rows(facts.selection["counts"]))),
        Html(f"<p>Malformed rows, with the first places:</p>{malformed}" if malformed else ""),
        Html("<h3>Outcome</h3>"),
        table(("outcome", "#units", "#share", "meaning"), map(_cells, unit_rows(facts.counts))),
        *_reasons("Failed units, by reason", "#units", facts.failures),
        *_reasons("Attempts that gave no answer, by reason", "#attempts", facts.faults),
    ]
    return Html("".join(parts))


def _lines(counts: Mapping[str, Any], rejected: Mapping[str, Sequence[str]]) -> Html:
    """What became of every line, with examples of the rejected ones."""
    rows = []
    for row in line_rows(counts):
        lines = rejected.get(row.key, ()) if row.kind == "lost" else ()
        rows.append((*_cells(row), Html("<br>".join(f"<code>{escape(line)}</code>" for line in lines))))
    shown = table(("outcome", "#lines", "#share", "meaning", "examples"), rows)
    notes = f"Every rejected line is in {REJECTED_FILE}, every completion in {JOURNAL_FILE}."
    return Html(f"{shown}<p>{escape(' '.join([*mention_notes(counts), notes]))}</p>")


def _cells(row: Row) -> tuple[str, int, str, str]:
    return row.name, row.count, row.share(), row.meaning


def _concepts(concepts: Concepts, examples: Mapping[str, Sequence[Html]]) -> Html:
    """The table of the most frequent ones; with what the annotator called them, where that is something else."""
    rows = [(name, concepts.mentions[name], Html("<br>".join(shown))) for name, shown in examples.items()]
    if not concepts.other_names:
        return table(("concept", "#mentions", "examples"), rows)
    merged = []
    for name, count, shown in rows:
        raw = concepts.raw_names(name) if name in concepts.other_names else {}
        written = ", ".join(f"{one} ({times:,})" for one, times in raw.items())
        merged.append((name, count, written, shown))
    return table(("concept", "#mentions", "written also as", "examples"), merged)


def _reasons(title: str, what: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    rows = [(words(reason), count) for reason, count in counts.items()]
    return [Html(f"<h3>{escape(title)}</h3>"), table(("reason", what), rows)]


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", without_credentials(str(value))


def _pairs(rows: Pairs) -> Html:
    return table((), rows)
