"""What a data set holds, and how its splits overlap: as data, and as lines for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nuner_jax.data.importers.report import kind_lines
from nuner_jax.data.ner.words import is_within_word
from nuner_jax.data.records import Record

_FILE_COUNTS = {
    "empty_sentences": "empty sentences, left out",
    "overlapping_mentions": "mentions that overlap a longer one, left out",
}
_FILE_TALLIES = {
    "repaired_tags": "tags repaired",
    "malformed_rows": "malformed rows, left out",
    "malformed_annotations": "malformed annotations, left out",
}


def contents(records: Sequence[Record], split_on_space: bool) -> dict[str, Any]:
    """The counts of one split."""
    per_type = Counter(one.concept for record in records for one in record.entities)
    return {
        "sentences": len(records),
        "without_entity": sum(not record.entities for record in records),
        "mentions": per_type.total(),
        "per_type": dict(sorted(per_type.items())),
        "mentions_within_words": sum(
            is_within_word(record.text, one.start, split_on_space)
            or is_within_word(record.text, one.end, split_on_space)
            for record in records
            for one in record.entities
        ),
    }


def overlaps(records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Sentences that come again in another split or their own, and types that are in one of train and test only."""
    texts = {split: [record.text for record in part] for split, part in records.items()}
    again = {f"within {split}": len(part) - len(set(part)) for split, part in texts.items()}
    for split, other in (("test", "train"), ("dev", "train"), ("test", "dev")):
        seen = set(texts[other])
        again[f"of {split} that are in {other}"] = sum(text in seen for text in texts[split])
    types = {split: {one.concept for record in part for one in record.entities} for split, part in records.items()}
    return {
        "duplicate_sentences": again,
        "types_only_in_test": sorted(types["test"] - types["train"]),
        "types_only_in_train": sorted(types["train"] - types["test"]),
        "types_only_in_dev": sorted(types["dev"] - types["train"] - types["test"]),
    }


def report_table(report: Mapping[str, Any]) -> str:
    """The report of a set (`TaggedSet.report`): its splits, and all in them that is not as one would expect."""
    lines = [report["name"] + (f" ({report['version']})" if report["version"] else "")]
    for split, one in report["splits"].items():
        lines.append(
            f"  {split:<5} {one['sentences']:>7,} sentences, {one['without_entity']:,} without entity;"
            f" {one['mentions']:,} mentions of {len(one['per_type'])} types; {_origin(report, split)}"
        )
    for split, files in report["files"].items():
        for key, name in _FILE_TALLIES.items():
            lines += [f"  {split}: {name}: {line}" for line in kind_lines(files[key], places=3)]
        lines += [f"  {split}: {name}: {files[key]:,}" for key, name in _FILE_COUNTS.items() if files[key]]
    for split, one in report["splits"].items():
        if one["mentions_within_words"]:
            lines.append(f"  {split}: mentions that begin or end within a word: {one['mentions_within_words']:,}")
    for where, count in report["duplicate_sentences"].items():
        lines += [f"  duplicate sentences {where}: {count:,}"] if count else []
    for key, name in (
        ("types_only_in_test", "types in test that train lacks, which count with F1 0"),
        ("types_only_in_train", "types in train that test lacks, not scored"),
        ("types_only_in_dev", "types in dev alone"),
    ):
        lines += [f"  {name}: {', '.join(report[key])}"] if report[key] else []
    return "\n".join(lines)


def _origin(report: Mapping[str, Any], split: str) -> str:
    if split in report["shares"]:
        return f"{report['shares'][split]:.0%} of the train file, by hash"
    files = report["files"][split]
    return ", ".join([*files["formats"], *files["schemes"]])
