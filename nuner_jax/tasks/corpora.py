"""The training data of a config: shards built, texts tokenised, both splits opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from nuner_jax.annotate.pipeline import ensure_annotated
from nuner_jax.data import builder
from nuner_jax.data.corpus import Corpus, load_corpus
from nuner_jax.errors import NunerError


def open_corpora(
    data: ConfigDict, tokenizer, *, window: int, concept_length: int, say: Callable[[str], None]
) -> tuple[Corpus, Corpus]:
    """The tokenised train and validation texts of all sources; what is not there yet is made.

    Args:
      data: `config.data`.
      tokenizer: a fast tokenizer.
      window, concept_length: tokens per sequence and per concept name at most, special tokens included.
      say: is told what was found in each source.

    Raises:
      NunerError: a source that cannot be read, no text with an entity, or no validation split.
    """
    options = {
        "validation_fraction": data.validation_fraction,
        "drop_concept": data.drop_concept or None,
        "max_malformed": data.max_malformed,
    }
    cache_dir = Path(data.cache_dir).expanduser()
    folders = {}
    for name, source in data.sources.items():
        if source.path.endswith(".py"):
            say(f"source {name}: the records of {source.path}")
            folders[name] = ensure_annotated(source.path, cache_dir / "annotated")
        else:
            folders[name] = builder.ensure_built(source.path, cache_dir / "shards", **options)
        say(f"source {name}: {_summary(folders[name])}")
    held_out = {name: folder for name, folder in folders.items() if "validation" in builder.splits(folder)}
    if not held_out:
        raise NunerError(
            f"no validation split in {', '.join(map(str, folders.values()))}: build one of them with "
            "--validation_fraction above 0"
        )
    sizes = {"window": window, "concept_length": concept_length, "cache_dir": cache_dir}
    train = load_corpus(folders, "train", tokenizer, **sizes)
    validation = load_corpus(held_out, "validation", tokenizer, **sizes)
    for split, corpus in (("train", train), ("validation", validation)):
        for line in _description(split, corpus):
            say(line)
        if not corpus.concept_names:
            raise NunerError(f"no {split} text of {', '.join(map(str, folders.values()))} has an entity")
    return train, validation


def _summary(folder: Path) -> str:
    """What the import of a data set counted, in a line."""
    stored = builder.read_report(folder)
    report = stored["report"]
    if annotation := stored.get("annotation"):
        units, lines = annotation["units"], annotation["lines"]
        return (
            f"{units['all']:,} units annotated, {units['kept']:,} kept; {annotation['annotations']['found']:,} of "
            f"{lines['all']:,} lines aligned ({folder.parent}/report/index.html)"
        )
    if not report:
        return f"{stored['records']:,} records ({folder})"
    malformed = sum(kind["count"] for kind in report["malformed_rows"].values())
    found, missing = report["annotations_found"], report["annotations_not_in_text"]
    return (
        f"{report['rows']:,} rows, {malformed:,} malformed, {report['records']:,} kept; "
        f"{found:,} annotations found, {missing:,} not in the text ({folder}/report.json)"
    )


def _description(split: str, corpus: Corpus):
    """What tokenising made of a split, line by line; what is out of the ordinary only where it happened."""
    report = corpus.report
    amounts = ("texts", "sequences", "tokens", "mentions", "concepts")
    yield f"{split}: " + ", ".join(f"{report[name]:,} {name}" for name in amounts)
    for name in ("texts_split", "cuts_through_mentions", "cuts_in_words", "mentions_without_tokens"):
        if report.get(name):
            yield f"{split}: {name.replace('_', ' ')}: {report[name]:,}"
    if report["concept_names_cut"]:
        yield f"{split}: {report['concept_names_cut']:,} concept names cut (config.data.concept_length)"
