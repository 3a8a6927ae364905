"""What a data set made here says about itself: the facts of its making, and the data card that tells them.

The card has the form of the Hugging Face Hub: YAML with the Hub's names, then Markdown.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.alignment import share
from nuner_jax.annotate.journal.journal import Totals
from nuner_jax.annotate.money import Prices, dollars
from nuner_jax.annotate.report.accounts import (
    Row,
    line_rows,
    mention_notes,
    selection_rows,
    unit_rows,
    words,
)
from nuner_jax.workdir import versions

CARD_FILE = "DATA_CARD.md"
Pairs = list[tuple[str, str]]  # what, and what about it
LIBRARIES = ("openai", "sentencex", "datasketch", "inflect", "tensorflow-datasets", "array_record")
_POWERS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")  # the Hub's bounds of sizes, from a thousand on


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the report and the card tell, apart from the records themselves.

    config: of this start. identity: the journal's, which says what the answers answer, with the prompt word for word;
    of recordings, the sha256 of their files. selection, counts: what selection.json and align.json hold; so what they
    tell was true when they were made, whatever the config says by now.
    failures: failed units by reason; faults: attempts that were not done, by reason.
    """

    config: ConfigDict
    identity: Mapping[str, Any]
    selection: Mapping[str, Any]
    counts: Mapping[str, Any]
    totals: Totals
    failures: Mapping[str, int]
    faults: Mapping[str, int]
    command: str

    @property
    def recorded(self) -> bool:
        """Whether the completions come from recordings."""
        return "replay" in self.identity


def without_credentials(text: str) -> str:
    """A text with the user and password of every URL in it taken away, and what follows an address of the web."""
    text = re.sub(r"(\w://)[^/\s]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?#]*)[?#]\S*", r"\1", text, flags=re.IGNORECASE)


def making(facts: Facts) -> Pairs:
    """Model, endpoint, dates, source, and how mentions were found."""
    source, totals = facts.selection["source"], facts.totals
    duplicates = {"exact": "exact ones left out", "near": "exact and near ones left out"}
    lengths = f"{source['min_chars']:,} to {source['max_chars']:,} characters"
    size = "all units" if source["size"] is None else f"{source['size']:,} units at random"
    dates = ("first replayed", "last replayed") if facts.recorded else ("first request", "last answer")
    part = [] if source["shard"] == "0/1" else [("part", f"{source['shard']} (number from 0, of so many)")]
    return [
        *_endpoint(facts),
        (dates[0], _date(totals.began)),
        (dates[1], _date(totals.ended)),
        ("source", without_credentials(", ".join(source["paths"]))),
        ("unit of text", f"{source['unit']}, {lengths}, script {source['script'] or 'any'}"),
        ("duplicates", duplicates[source["duplicates"]]),
        ("sample", f"{size}, seed {facts.selection['seed']}"),
        *part,
        *_alignment(facts.counts["options"]),
    ]


def money(facts: Facts) -> Pairs:
    """Attempts, tokens, prices and what was spent."""
    if facts.recorded:
        return [("spent", "nothing: recorded completions"), ("units asked for", f"{facts.totals.attempts:,}")]
    totals, known = facts.totals, Prices.make(facts.config).known
    return [
        ("attempts (units asked for, repeats counted)", f"{totals.attempts:,}"),
        ("prompt tokens", f"{totals.prompt_tokens:,}"),
        ("of them from the endpoint's cache", f"{totals.cached_tokens:,}"),
        ("completion tokens", f"{totals.completion_tokens:,}"),
        ("prices", _prices(facts.config) if known else "not known"),
        ("spent", dollars(totals.spent) if known else "not known: no prices were given"),
        ("not sure (requests whose answer was lost), at most", dollars(totals.unsure)),
        ("reserved for what is on its way", dollars(totals.reserved)),
    ]


def data_card(facts: Facts, top_concepts: Sequence[tuple[str, int]]) -> str:
    """The data card as Markdown.

    Args:
      facts: of the making.
      top_concepts: some of the most frequent concepts with their mentions.
    """
    counts, records = facts.counts, facts.counts["records"]
    concepts = ", ".join(f"{_inline(name)} ({count:,})" for name, count in top_concepts) or "none"
    return f"""{_front_matter(facts)}
# {records["records"]:,} texts annotated by a language model

Texts with character spans of entities, each with a concept and mostly a description of it, for pre-training entity
encoders as in NuNER (Bogdanov et al., 2024). The annotator is a language model; no human has looked at the result.

| | |
|---|---|
{_rows(_sizes(facts))}
Most frequent concepts: {concepts}.

## How it was made
{_table(making(facts))}{_prompt(facts)}
## What it cost
{_table(money(facts))}
## What became of everything
The selection of the units:

{_accounts(selection_rows(facts.selection["counts"]))}
The selected units:

{_accounts(unit_rows(counts))}{_failures(facts)}
The lines of their completions:

{_accounts(line_rows(counts))}
{" ".join(mention_notes(counts))}

## Known limits
{_limits(facts)}

## Licences
To be filled in by whoever publishes:

- the texts: …
- the annotations (the terms of the model and of its provider): …
- the data set as a whole: …

{_LOADING}
## Made with
{_table(list(versions(LIBRARIES).items()))}"""


_LOADING = """\
## How to load it
Below, `shards` is the folder with the data set's `report.json`.

```python
from nuner_jax.data.builder import open_split  # needs no TensorFlow
records = open_split("shards", "train")        # records[0].text, .entities: start, end, concept, description

import tensorflow_datasets as tfds
source = tfds.data_source("nuner_records", data_dir="shards", split="train")
```

As rows of the published NuNER format (`input`, `output`):

```
python -m nuner_jax.data.export_rows --data=shards --out=rows.jsonl.gz
```
"""


def _front_matter(facts: Facts) -> str:
    return f"""---
language:
- {json.dumps(facts.selection["source"]["language"])}  # as config.source.language says
license: unknown  # to be filled in by whoever publishes
task_categories:
- token-classification
size_categories:
- {size_category(facts.counts["records"]["records"])}
tags:
- named-entity-recognition
- nuner
- machine-generated
---
"""


def size_category(count: int) -> str:
    """A number of texts in the Hub's classes."""
    power = max(0, len(str(count)) - 3)  # of ten, above a hundred
    low, high = ("n", *_POWERS)[power : power + 2]
    return f"{low}<{high}" if power == 0 else f"{low}<n<{high}"


def _sizes(facts: Facts) -> Pairs:
    records = facts.counts["records"]
    return [
        ("texts", f"{records['records']:,}"),
        ("of them without an entity", f"{records['unlabelled']:,}"),
        ("entities (mentions)", f"{records['entities']:,}"),
        ("concepts", f"{records['concepts']:,}"),
        ("concepts mentioned once", f"{records['singletons']:,}"),
    ]


def _limits(facts: Facts) -> str:
    lines, annotations, units = (facts.counts[key] for key in ("lines", "annotations", "units"))
    options = facts.counts["options"]
    unplaced, rejected = sum(annotations["unplaced"].values()), sum(lines["rejected"].values())
    places = "every place" if options["occurrences"] == "every" else "the first place"
    limits = [
        f"Positions come from a string match, not from the model: {places} where the words stand counts as a mention. "
        f"{share(annotations['ambiguous'], annotations['found'])} of the annotations stand at several places, of which "
        "the model may have meant one.",
        "Unlabelled is not negative: the model names some of the entities of a text, not all of them, and nobody says "
        "which are missing.",
        "Concepts are the model's own words. One idea has many names, one name may mean several ideas, and some "
        "annotations are wrong.",
        f"{share(rejected, lines['all'])} of the lines were rejected (unreadable, or repeated), and "
        f"{share(unplaced, lines['annotations'])} of the annotations have no place in their text; these are left out, "
        "which favours texts and entities that are easy to copy.",
        f"{share(units['failed'], units['all'])} of the units have no answer (failed), and "
        f"{share(units['unlabelled_left_out'], units['all'])} an answer in which nothing was found; a model's refusals "
        "do not fall at random.",
    ]
    if units["pending"]:
        limits.append(f"Not complete: {units['pending']:,} of {units['all']:,} units were not annotated.")
    return "\n".join(f"- {limit}" for limit in limits)


def _endpoint(facts: Facts) -> Pairs:
    endpoint, identity = facts.config.endpoint, facts.identity
    if facts.recorded:
        return [
            ("endpoint", "recorded completions, no network"),
            ("recorded in", f"{without_credentials(endpoint.replay)} (sha256 {identity['replay'][:12]}…)"),
            ("model and prompt", "not known here: see where the completions come from"),
        ]
    sampling = {key: identity[key] for key in ("temperature", "top_p", "max_tokens") if identity[key] is not None}
    return [
        ("model", identity["model"]),
        ("endpoint", "the Batch API" if endpoint.kind == "batch" else "live requests"),
        ("server", without_credentials(endpoint.base_url)),
        ("sampling", ", ".join(f"{key} {value}" for key, value in sampling.items())),
        ("further keys of the request", "none" if identity["extra"] == "{}" else identity["extra"]),
        ("units in one request", f"{identity['units_per_request']} at most"),
        ("form of the answers", words(identity["format"])),
    ]


def _alignment(options: Mapping[str, Any]) -> Pairs:
    """How annotations became mentions: the options of align.json."""
    match = "letter by letter"
    if options["match"] == "tolerant":
        match += "; else at the only place that differs in case, Unicode form, quotes, dashes or spaces alone"
    longest = "any length" if options["max_chars"] is None else f"at most {options['max_chars']:,} characters"
    names = ["as the model wrote them, their spaces collapsed"]
    if "case" in options["normalise"]:
        names.append("the capitals of titles lowered")
    if "plural" in options["normalise"]:
        names.append(f"plurals made the singular that is in use ({options['plurals']:,} of the names)")
    if names[1:]:
        names.append("what the model wrote is kept in concepts.csv and aligned.jsonl.gz")
    dropped = f"those with an annotation of the concept {options['drop_concept']!r}" if options["drop_concept"] else ""
    unlabelled = "" if options["keep_unlabelled"] else "those in which nothing was found"
    return [
        ("places of a mention", "every one" if options["occurrences"] == "every" else "the first"),
        ("match", match),
        ("length of a mention", f"at least {options['min_chars']:,}, {longest}"),
        ("names of concepts", "; ".join(names)),
        ("texts left out", " and ".join(filter(None, [dropped, unlabelled])) or "none"),
    ]


def _prompt(facts: Facts) -> str:
    """The prompt as far as it is known, as a paragraph of the card."""
    if facts.recorded:
        return ""
    template = _fenced(facts.identity["template"])
    return f"\nThe prompt, word for word; a text takes the place of its placeholder:\n\n{template}\n"


def _prices(config: ConfigDict) -> str:
    price, kind = config.price, config.endpoint.kind
    cached = "" if price.cached is None else f", ${price.cached:g} from the cache"
    batch = f", times {price.batch:g} (Batch API)" if kind == "batch" else ""
    return f"${price.input:g} in, ${price.output:g} out{cached} per million tokens{batch}"


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else "none"


def _accounts(rows: Sequence[Row]) -> str:
    """Counts as a table; what never happened is left out."""
    lines = (
        f"| {_inline(row.name)} | {row.count:,} | {_inline(row.share())} | {_inline(row.meaning)} |\n"
        for row in rows
        if row.count or row.whole is None
    )
    return "| | number | share | meaning |\n|---|---:|---:|---|\n" + "".join(lines)


def _failures(facts: Facts) -> str:
    reasons = ", ".join(f"{_inline(words(reason))} {count:,}" for reason, count in facts.failures.items())
    return f"\nFailed for: {reasons}.\n" if reasons else ""


def _table(rows: Pairs) -> str:
    return f"| | |\n|---|---|\n{_rows(rows)}"


def _rows(rows: Pairs) -> str:
    return "".join(f"| {_inline(name)} | {_inline(value)} |\n" for name, value in rows)


def _inline(text: str) -> str:
    """A text as itself within a line of Markdown, whatever it holds."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """A text word for word: the fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.rstrip(chr(10))}\n{fence}"
