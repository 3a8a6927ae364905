"""Pages that are readable offline: one HTML file, without a script, with nothing fetched; for phones and paper too."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


class Html(str):
    """What stands in a page as it is; every other string is escaped."""

    __slots__ = ()


def document(title: str, lead: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole document.

    Args:
      title, lead: what it is, and a paragraph about it.
      sections: (heading, content) of each; the content is HTML.
    """
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{content}</section>" for name, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
{body}
</main>
</body>
</html>
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table, which scrolls on its own where it is wider than the page.

    Args:
      head: of each column; one that begins with # holds numbers. (): a table without a head.
      rows: of `Html`, other strings, and whole numbers.
    """
    numbers = [name.startswith("#") for name in head]
    heads = "".join(_cell("th", name.lstrip("#"), is_number) for name, is_number in zip(head, numbers, strict=True))
    lines = [f"<thead><tr>{heads}</tr></thead>"] if head else []
    for row in rows:
        kinds = numbers or [False] * len(row)
        cells = (_cell("td", value, is_number) for value, is_number in zip(row, kinds, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return Html('<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>\n")


def bullets(lines: Iterable[str]) -> Html:
    """A list."""
    return Html(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>\n")


def folded(summary: str, content: str) -> Html:
    """What a reader opens by its summary; the content is HTML."""
    return Html(f"<details><summary>{escape(summary)}</summary>{content}</details>\n")


def marked(text: str, start: int, end: int, context: int) -> Html:
    """The characters start … end, marked, with at most `context` of those on either side."""
    before, after = text[max(0, start - context) : start], text[end : end + context]
    left = "…" if start > context else ""
    right = "…" if end + context < len(text) else ""
    return Html(f"{left}{escape(before)}<mark>{escape(text[start:end])}</mark>{escape(after)}{right}")


def image(path: Path, name: str) -> Html:
    """A PNG file, inside the page; on a phone it scrolls on its own."""
    data = base64.b64encode(path.read_bytes()).decode()
    return Html(f'<div class="wide"><img alt="{escape(name)}" src="data:image/png;base64,{data}"></div>\n')


_STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d5dae0; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e8ebef; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
table.grid td, table.grid th { padding: .15rem .4rem; font-size: .8rem; }
table.grid th { position: sticky; left: 0; background: #fff; font-weight: normal; white-space: nowrap; }
table.grid thead th { position: static; writing-mode: vertical-rl; text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: .8rem; font-size: .85rem; }
code { font-size: .9em; background: #f4f6f8; overflow-wrap: anywhere; }
mark { background: #ffe49a; }
summary { cursor: pointer; padding: .2rem 0; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
@media (max-width: 40rem) {
  .wide table { font-size: .85rem; }
  td.number { white-space: normal; }
  .wide img { max-width: none; width: 44rem; }
}
"""


def _cell(tag: str, value: Any, is_number: bool) -> str:
    content = value if isinstance(value, Html) else escape(f"{value:,}" if isinstance(value, int) else value)
    return f'<{tag} class="number">{content}</{tag}>' if is_number else f"<{tag}>{content}</{tag}>"
