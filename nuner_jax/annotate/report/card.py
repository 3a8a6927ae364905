"""What a data set made here says about itself: the facts of its making, and the data card that tells them.

The card has the form of the Hugging Face Hub: YAML with the Hub's names, then Markdown.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

import nuner_jax
from nuner_jax.annotate.journal.journal import Totals
from nuner_jax.annotate.money import Prices, dollars

CARD_FILE = "DATA_CARD.md"
Pairs = list[tuple[str, str]]  # what, and what about it
_LIBRARIES = ("openai", "sentencex", "datasketch", "inflect", "tensorflow-datasets", "array_record")
_POWERS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")  # the Hub's bounds of sizes, from a thousand on


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the report and the card tell, apart from the records themselves.

    prompt: its identity, with the template word for word. selection, counts: what selection.json and align.json hold.
    failures: failed units by reason; faults: attempts that were not done, by reason.
    """

    config: ConfigDict
    prompt: Mapping[str, Any]
    selection: Mapping[str, Any]
    counts: Mapping[str, Any]
    totals: Totals
    failures: Mapping[str, int]
    faults: Mapping[str, int]
    command: str


def without_credentials(text: str) -> str:
    """A text with the user, password and query of every URL in it taken away."""
    return re.sub(r"(\w://)(?:[^/\s@]*@)?([^\s?#]*)(?:[?#]\S*)?", r"\1\2", text)


def making(facts: Facts) -> Pairs:
    """Model, endpoint, dates and source."""
    source, totals = facts.config.source, facts.totals
    duplicates = {"exact": "exact ones left out", "near": "near ones left out"}
    lengths = f"{source.min_chars} to {source.max_chars} characters"
    size = "all units" if source.size is None else f"{source.size:,} units at random"
    return [
        *_endpoint(facts.config),
        ("first attempt", _date(totals.began)),
        ("last outcome", _date(totals.ended)),
        ("source", without_credentials(", ".join(source.paths))),
        ("unit", f"{source.unit}, {lengths}, script {source.script or 'any'}"),
        ("duplicates", duplicates[source.duplicates]),
        ("sample", f"{size}, seed {facts.config.seed}"),
        ("part", source.shard),
        ("units in one request", str(facts.prompt["units_per_request"])),
        ("form of the answers", facts.prompt["format"].replace("_", " ")),
    ]


def money(facts: Facts) -> Pairs:
    """Attempts, tokens, prices and what was spent."""
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


def versions() -> Pairs:
    """The program and the libraries whose release may change a result; those that are not installed are left out."""
    found = [("Python", platform.python_version()), ("nuner_jax", nuner_jax.__version__)]
    for name in _LIBRARIES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def number_rows(counts: Mapping[str, Any], prefix: str = "") -> Pairs:
    """Counts as rows, those in a dictionary under the name of it."""
    rows: Pairs = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            rows += number_rows(value, f"{prefix}{name}: ")
        else:
            rows.append(((prefix + name).replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)))
    return rows


def share(part: int, whole: int) -> str:
    """A part in percent of the whole."""
    return f"{part / whole:.2%}" if whole else "none"


def data_card(facts: Facts, top_concepts: Sequence[tuple[str, int]]) -> str:
    """The data card as Markdown.

    Args:
      facts: of the making.
      top_concepts: some of the most frequent concepts with their mentions.
    """
    counts, records = facts.counts, facts.counts["records"]
    concepts = ", ".join(f"{_inline(name)} ({count:,})" for name, count in top_concepts)
    return f"""{_front_matter(facts)}
# {records["records"]:,} texts annotated by a language model

Texts with character spans of entities, each with a concept and mostly a description of it, for pre-training entity
encoders as in NuNER (Bogdanov et al., 2024). The annotator is a language model; no human has looked at the result.

| | |
|---|---|
{_rows(_sizes(facts))}
Most frequent concepts: {concepts}.

## How it was made
{_table(making(facts))}
The prompt, word for word:

{_fenced(facts.prompt["template"])}

## What it cost
{_table(money(facts))}
## What became of everything
Units of text:

{_table(number_rows(counts["units"]))}
Lines of completions:

{_table(number_rows(counts["lines"]))}
Annotations:

{_table(number_rows(counts["annotations"]))}
The selection of the units:

{_table(number_rows(facts.selection.get("counts", {})))}
## Known limits
{_limits(facts)}

## Licences
To be filled in by whoever publishes:

- the texts: …
- the annotations (the terms of the model and of its provider): …
- the data set as a whole: …

{_LOADING}Made with:

{_table(versions())}"""


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
- "{facts.config.source.language}"
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
    align = facts.config.align
    unplaced, rejected = sum(annotations["unplaced"].values()), sum(lines["rejected"].values())
    places = "every place where the words stand" if align.occurrences == "every" else "the first place of the words"
    match = "letter by letter" if align.match == "exact" else "differences of case and Unicode form aside"
    limits = [
        f"Positions come from a string match ({match}), not from the model: {places} in the text counts as a mention. "
        f"{share(annotations['ambiguous'], annotations['found'])} of the annotations stand at several places, of which "
        "the model may have meant one.",
        "Unlabelled is not negative: the model names some of the entities of a text, not all of them, and nobody says "
        "which are missing.",
        "Concepts are the model's own words. One idea has many names, one name may mean several ideas, and some "
        "annotations are wrong.",
        f"{share(rejected, lines['all'])} of the lines could not be read as annotations, and "
        f"{share(unplaced, lines['annotations'])} of the annotations have no place in their text; these are left out, "
        "which favours texts and entities that are easy to copy.",
        f"{share(units['failed'], units['all'])} of the units have no answer (failed), and "
        f"{share(units['unlabelled_left_out'], units['all'])} an answer in which nothing was found; a model's refusals "
        "do not fall at random.",
    ]
    if units["pending"]:
        limits.append(f"Not complete: {units['pending']:,} of {units['all']:,} units were not annotated.")
    return "\n".join(f"- {limit}" for limit in limits)


def _endpoint(config: ConfigDict) -> Pairs:
    endpoint = config.endpoint
    if endpoint.kind == "replay":
        return [
            ("endpoint", "recorded completions, no network"),
            ("recorded in", str(endpoint.replay)),
            ("model", endpoint.model or "not known: see where the completions come from"),
            ("prompt", "the one below is the config's; the completions may have been made with another"),
        ]
    sampling = {key: endpoint[key] for key in ("temperature", "top_p", "max_tokens") if endpoint[key] is not None}
    return [
        ("model", endpoint.model),
        ("endpoint", "the Batch API" if endpoint.kind == "batch" else "live requests"),
        ("server", without_credentials(endpoint.base_url)),
        ("sampling", ", ".join(f"{key} {value}" for key, value in sampling.items())),
        ("further keys of the request", "none" if endpoint.extra == "{}" else endpoint.extra),
    ]


def _prices(config: ConfigDict) -> str:
    price, kind = config.price, config.endpoint.kind
    if kind == "replay":
        return "nothing was bought"
    cached = "" if price.cached is None else f", ${price.cached:g} from the cache"
    batch = f", times {price.batch:g} (Batch API)" if kind == "batch" else ""
    return f"${price.input:g} in, ${price.output:g} out{cached} per million tokens{batch}"


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else "none"


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
