"""The page of a few-shot evaluation: one HTML file, readable offline, without a script and with nothing fetched.

Tables of every metric, learning curves, and for each set the scores of its types, the confusion of its words and the
worst errors in their sentences.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nuner_jax.fewshot.results import METRICS, Cell, Results
from nuner_jax.fewshot.tables import Table, explanations, score_table, type_table
from nuner_jax.folders import writing
from nuner_jax.metrics import Spans

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
    sections = [("What the numbers mean", _list(explanations(results, notes)))]
    sections += [(title, _table(score_table(cells, grid, name), names=2)) for name, title in METRICS.items()]
    sections.append(("Learning curves", "".join(map(_image, figures))))
    for name in grid.sets:
        content = f"<h3>F1 of each type over words, mean over seeds</h3>{_table(type_table(results, name), names=1)}"
        sections.append((name, content + (_detail(details[name]) if name in details else "")))
    settings = escape(json.dumps(manifest, indent=2, ensure_ascii=False))
    sections.append(
        (
            "How to get this again",
            f"<pre>{escape(manifest['command'])}</pre><details><summary>Config, seeds, hashes of the samples, "
            f"fingerprints, versions, duration</summary><pre>{settings}</pre></details>",
        )
    )
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{content}</section>" for name, content in sections)
    with writing(out):
        out.write_text(_PAGE.replace("BODY", body), encoding="utf-8")
    return out


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Few-shot results</title>
<style>
body { margin: 0; font: 15px/1.45 system-ui, sans-serif; color: #1c2430; background: #fff; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5dae0; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e8ebef; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
table.confusion td, table.confusion th { padding: .15rem .4rem; font-size: .8rem; }
table.confusion thead th { writing-mode: vertical-rl; text-align: right; }
pre { white-space: pre-wrap; background: #f4f6f8; padding: .8rem; font-size: .85rem; }
mark { background: #ffe49a; }
summary { cursor: pointer; padding: .2rem 0; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
</style>
</head>
<body>
<main>
<h1>Few-shot results</h1>
BODY
</main>
</body>
</html>
"""


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


def _detail(detail: Detail) -> str:
    """Confusion and errors of a set."""
    whose = escape(f"{detail.title}, {detail.heads} seeds together")
    parts = [f"<h3>Words by right class (rows) and found class (columns), per seed: {whose}</h3>", _confusion(detail)]
    parts.append(f"<h3>Worst errors: {whose}</h3>")
    for one in detail.types:
        if not one.worst_missed and not one.worst_wrong:
            continue
        summary = (
            f"{one.type}: of {one.support:,} mentions {one.missed:.1f} missed, and {one.wrong:.1f} wrong, per seed"
        )
        rows = [_error_row("missed", error, detail.heads) for error in one.worst_missed]
        rows += [_error_row("wrong", error, detail.heads) for error in one.worst_wrong]
        head = "<tr><th>error</th><th>seeds</th><th>sentence</th><th>found, or right, instead</th></tr>"
        table = f'<div class="wide"><table><thead>{head}</thead>{"".join(rows)}</table></div>'
        parts.append(f"<details><summary>{escape(summary)}</summary>{table}</details>")
    return "\n".join(parts)


def _confusion(detail: Detail) -> str:
    """A cell is the darker, the larger its share of the row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in detail.classes)
    lines = [f"<thead><tr><td></td>{head}</tr></thead>"]
    for name, row in zip(detail.classes, detail.confusion, strict=True):
        whole = sum(row) or 1
        cells = "".join(
            f'<td class="number" style="background:rgba(31,111,139,{0.7 * words / whole:.2f})">{words:,.0f}</td>'
            for words in row
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="confusion">{"".join(lines)}</table></div>'


def _error_row(kind: str, error: Error, heads: int) -> str:
    before = error.text[max(0, error.start - _CONTEXT) : error.start]
    after = error.text[error.end : error.end + _CONTEXT]
    left = "…" if error.start > _CONTEXT else ""
    right = "…" if error.end + _CONTEXT < len(error.text) else ""
    marked = f"<mark>{escape(error.text[error.start : error.end])}</mark>"
    sentence = f"{left}{escape(before)}{marked}{escape(after)}{right}"
    cells = (kind, f"{error.heads} of {heads}", sentence, escape(error.instead or "nothing"))
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _table(table: Table, names: int) -> str:
    """A table whose first `names` columns are no numbers."""
    lines = []
    for number, row in enumerate(table):
        tag = "td" if number else "th"
        cells = (
            f"<{tag}{' class=number' if at >= names else ''}>{escape(cell)}</{tag}>" for at, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead>{lines[0]}</thead>{"".join(lines[1:])}</table></div>'


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">\n'
