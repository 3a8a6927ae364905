"""The page of a few-shot evaluation: one HTML file, readable offline, without a script and with nothing fetched.

Tables of every metric, learning curves, and for each set the scores of its types, the confusion of its words and the
worst errors in their sentences.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nuner_jax.data.ner.set_report import report_table
from nuner_jax.fewshot.results import FURTHER, METRICS, Cell, Results
from nuner_jax.fewshot.tables import Table, as_heading, explanations, score_table, type_table
from nuner_jax.folders import writing
from nuner_jax.metrics import Spans
from nuner_jax.webpage import Html, bullets, document, folded, image, marked, table

EXAMPLES = 5  # missed mentions shown of each type, and as many wrong ones
_CONTEXT = 100  # characters on either side of an error

Mention = tuple[int, int, int, int]  # sentence, start, end, type


@dataclass(frozen=True, slots=True)
class Error:
    """A mention that heads missed, or that they found where none is.

    heads: how many of them made it.
    text, start, end: the sentence, and the characters of the mention.
    instead: what is there: of a missed one, what most heads found over it; of a wrong one, the right one that it
      overlaps; empty for nothing.
    """

    heads: int
    text: str
    start: int
    end: int
    instead: str


@dataclass(frozen=True, slots=True)
class TypeErrors:
    """The errors at one type: `missed` and `wrong` mentions per head of `support` right ones, and the worst of them."""

    type: str
    support: int
    missed: float
    wrong: float
    worst_missed: list[Error]
    worst_wrong: list[Error]


@dataclass(frozen=True, slots=True)
class Detail:
    """What the page tells of one set beyond its scores: plain data.

    title: whose errors they are: the encoder, its head and k.
    heads: how many heads (seeds) are counted together.
    classes: "outside" and the types. confusion: words per head, by right class and found class.
    types: those that were missed most come first.
    """

    title: str
    heads: int
    classes: list[str]
    confusion: list[list[float]]
    types: list[TypeErrors]


def examine(
    title: str,
    types: Sequence[str],
    texts: Sequence[str],
    gold: Spans,
    predicted: Spans,
    confusion_HxCxC: np.ndarray,
) -> Detail:
    """Finds the worst errors: those that most heads make, of the same words only the first.

    Args:
      title: whose errors they are.
      types: names of the types 1 … T.
      texts: the sentences.
      gold, predicted: in characters; predicted by all heads.
      confusion_HxCxC: words, from `metrics.confusion`.
    """
    heads = len(confusion_HxCxC)
    right = set(gold.mentions())
    columns = (predicted.sentence_N, predicted.start_N, predicted.end_N, predicted.type_N)
    found = Counter(zip(*(column.tolist() for column in columns), strict=True))
    missed = {mention: heads - found[mention] for mention in sorted(right) if found[mention] < heads}
    wrong = {mention: count for mention, count in sorted(found.items()) if mention not in right}
    right_in, wrong_in = _by_sentence(dict.fromkeys(sorted(right), heads)), _by_sentence(wrong)

    def worst(
        errors: Mapping[Mention, int], others: Mapping[int, list[tuple[Mention, int]]], shown: bool
    ) -> list[Error]:
        chosen: dict[str, Error] = {}
        for mention, count in sorted(errors.items(), key=lambda one: -one[1]):
            sentence, start, end, _ = mention
            text = texts[sentence]
            if len(chosen) < EXAMPLES and text[start:end].lower() not in chosen:
                over = _overlapping(mention, others.get(sentence, ()), text, types, heads if shown else None)
                chosen[text[start:end].lower()] = Error(count, text, start, end, over)
        return list(chosen.values())

    def of_type(number: int, name: str) -> TypeErrors:
        lost = {mention: count for mention, count in missed.items() if mention[3] == number}
        false = {mention: count for mention, count in wrong.items() if mention[3] == number}
        return TypeErrors(
            name,
            sum(mention[3] == number for mention in right),
            sum(lost.values()) / heads,
            sum(false.values()) / heads,
            worst(lost, wrong_in, shown=True),
            worst(false, right_in, shown=False),
        )

    every = [of_type(number, name) for number, name in enumerate(types, start=1)]
    every.sort(key=lambda one: -one.missed / max(one.support, 1))
    return Detail(title, heads, ["outside", *types], confusion_HxCxC.mean(axis=0).tolist(), every)


def write_detail(detail: Detail, path: Path) -> None:
    """Keeps a detail as JSON, so that the page can be made again without the encoder.

    Raises:
      NunerError: it cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(asdict(detail), ensure_ascii=False), encoding="utf-8")


def read_detail(path: Path) -> Detail:
    """The inverse of `write_detail`."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    types = []
    for one in plain.pop("types"):
        worst = {name: [Error(**error) for error in one.pop(name)] for name in ("worst_missed", "worst_wrong")}
        types.append(TypeErrors(**one, **worst))
    return Detail(**plain, types=types)


def write_page(
    results: Results,
    cells: Sequence[Cell],
    manifest: Mapping[str, Any],
    details: Mapping[str, Detail],
    figures: Sequence[Path],
    out: Path,
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page in place of an earlier one, and gives `out`.

    Args:
      results: of a run.
      cells: `summarise(results)`.
      manifest: `make_manifest(…)`.
      details: of the sets that have one.
      figures: PNG files, put into the page.
      out: an HTML file.
      notes: as for `explanations`.

    Raises:
      NunerError: it cannot be written.
    """
    grid = results.grid

    def scores(name: str) -> Html:
        return _numbers(score_table(cells, grid, name), names=3)

    sections = [(as_heading(METRICS["token_macro_f1"]), scores("token_macro_f1"))]
    sections.append(("What the numbers mean", bullets(explanations(results, notes))))
    sections.append(("Learning curves", Html("".join(image(path, path.stem) for path in figures))))
    others = {name: title for name, title in (METRICS | FURTHER).items() if name != "token_macro_f1"}
    folds = [folded(as_heading(title), scores(name)) for name, title in others.items()]
    sections.append(("Other metrics, precision and recall", Html("".join(folds))))
    for name in grid.sets:
        content = f"<pre>{escape(report_table(manifest['data'][name]))}</pre>"
        content += _detail(details[name]) if name in details else ""
        sections.append((name, content + _types(results, name)))
    settings = escape(json.dumps(manifest, indent=2, ensure_ascii=False))
    about = "Config, seeds, hashes of the samples, fingerprints, versions, starts, duration"
    sections.append(
        ("How to get this again", f"<pre>{escape(manifest['command'])}</pre>{folded(about, f'<pre>{settings}</pre>')}")
    )
    lead = (
        f"{len(grid.encoders) + len(grid.llms)} encoders on {len(grid.sets)} data sets, "
        f"k = {', '.join(map(str, grid.k))}, {len(grid.seeds)} seeds."
    )
    with writing(out):
        out.write_text(document("Few-shot results", lead, sections), encoding="utf-8")
    return out


def _by_sentence(counts: Mapping[Mention, int]) -> dict[int, list[tuple[Mention, int]]]:
    """The mentions of each sentence, with their counts."""
    grouped: dict[int, list[tuple[Mention, int]]] = {}
    for mention, count in counts.items():
        grouped.setdefault(mention[0], []).append((mention, count))
    return grouped


def _overlapping(
    mention: Mention,
    others: Iterable[tuple[Mention, int]],
    text: str,
    types: Sequence[str],
    heads: int | None,
) -> str:
    """The most counted one of those that share a character with a mention, in words; with its count if `heads`."""
    _, start, end, _ = mention
    over = [(count, other) for other, count in others if other[1] < end and start < other[2]]
    if not over:
        return ""
    count, (_, first, after, number) = max(over, key=lambda one: one[0])
    told = f"“{text[first:after]}” as {types[number - 1]}"
    return told if heads is None else f"{told} ({count} of {heads})"


def _types(results: Results, set_name: str) -> Html:
    """What each type of a set scored."""
    parts = [
        folded(f"Each type, {title}: F1 (precision / recall), mean over seeds", _numbers(of_types, names=1))
        for name, title in METRICS.items()
        if (of_types := type_table(results, set_name, name))
    ]
    return Html("<h3>Types</h3>" + "".join(parts))


def _detail(detail: Detail) -> Html:
    """Confusion and errors of a set."""
    whose = escape(f"{detail.title}, {detail.heads} seeds together")
    parts = [f"<h3>Confusion: {whose}</h3>", _confusion(detail), f"<h3>Worst errors: {whose}</h3>"]
    for one in detail.types:
        if not one.worst_missed and not one.worst_wrong:
            continue
        summary = (
            f"{one.type}: of {one.support:,} mentions {one.missed:.1f} missed, and {one.wrong:.1f} wrong, per seed"
        )
        rows = [_error("missed", error, detail.heads) for error in one.worst_missed]
        rows += [_error("wrong", error, detail.heads) for error in one.worst_wrong]
        parts.append(folded(summary, table(("sentence", "error", "found, or right, instead"), rows)))
    return Html("\n".join(parts))


def _confusion(detail: Detail) -> Html:
    """A cell is the darker, the larger its share of the row; words that none has are left white."""
    head = "".join(f"<th>{escape(name)}</th>" for name in detail.classes)
    lines = [f"<thead><tr><td></td>{head}</tr></thead>"]
    for name, row in zip(detail.classes, detail.confusion, strict=True):
        whole = sum(row) or 1
        cells = "".join(_share(words, words / whole) for words in row)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    what = "<p>Words per seed: a row is what is right, a column what was found.</p>"
    return Html(f'{what}<div class="wide"><table class="grid">{"".join(lines)}</table></div>')


def _share(words: float, share: float) -> str:
    shown = f"{words:,.0f}" if words >= 0.5 else "" if not words else "<½"
    return f'<td class="number" style="background:rgba(31,111,139,{0.7 * share:.2f})">{escape(shown)}</td>'


def _error(kind: str, error: Error, heads: int) -> tuple[str, ...]:
    sentence = marked(error.text, error.start, error.end, _CONTEXT)
    return sentence, f"{kind} by {error.heads} of {heads}", error.instead or "nothing"


def _numbers(given: Table, names: int) -> Html:
    """A table whose first `names` columns are no numbers."""
    head, *rows = given
    return table((*head[:names], *(f"#{name}" for name in head[names:])), rows)
