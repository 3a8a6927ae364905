"""The alignment report: what became of every row and every annotation of an import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLACES_KEPT = 20


@dataclass
class Tally:
    """Counts by kind, with the first `PLACES_KEPT` different places ("file:line") of each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        """Counts one more of `kind`, seen at `place`."""
        self.counts[kind] += 1
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES_KEPT and place not in places:
            places.append(place)

    def total(self) -> int:
        """The count over all kinds."""
        return self.counts.total()

    def as_dict(self) -> dict[str, Any]:
        """`{kind: {"count": …, "first": [place, …]}}`."""
        return {kind: {"count": count, "first": self.places[kind]} for kind, count in self.counts.most_common()}


@dataclass
class Report:
    """Counts of one import. Every row ends in exactly one place:

      rows = malformed rows + empty_text + dropped + duplicates + left_out + records

    rows: rows of the files (sentences, for CoNLL), blank lines aside.
    malformed: rows that could not be read; `bad_annotations`: single annotations in readable rows.
    empty_text: rows with no text.
    dropped: rows with an annotation whose concept is the dropped one ("concept" in the paper).
    duplicates: rows whose text was already kept: a text must be in one split only.
    unlabelled: rows with no entity; `left_out`: how many of them were not kept.
    records: rows kept. entities: their mentions.
    found, not_in_text: annotations of the rows that reached alignment; ambiguous: how many of
      `found` stand at more than one place.
    concept_counts: annotations found in kept rows, by concept.
    """

    rows: int = 0
    malformed: Tally = field(default_factory=Tally)
    bad_annotations: Tally = field(default_factory=Tally)
    empty_text: int = 0
    dropped: int = 0
    duplicates: int = 0
    unlabelled: int = 0
    left_out: int = 0
    records: int = 0
    entities: int = 0
    found: int = 0
    not_in_text: int = 0
    ambiguous: int = 0
    concept_counts: Counter[str] = field(default_factory=Counter)

    @property
    def concepts(self) -> int:
        """Distinct concepts of the kept records."""
        return len(self.concept_counts)

    @property
    def singletons(self) -> int:
        """Concepts that were annotated once only."""
        return sum(count == 1 for count in self.concept_counts.values())

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON data; of the concepts, their number and the 20 most frequent."""
        return {
            "rows": self.rows,
            "malformed_rows": self.malformed.as_dict(),
            "empty_text": self.empty_text,
            "dropped_rows": self.dropped,
            "duplicate_texts": self.duplicates,
            "unlabelled_rows": self.unlabelled,
            "unlabelled_left_out": self.left_out,
            "records": self.records,
            "entities": self.entities,
            "annotations_found": self.found,
            "annotations_not_in_text": self.not_in_text,
            "annotations_ambiguous": self.ambiguous,
            "malformed_annotations": self.bad_annotations.as_dict(),
            "concepts": self.concepts,
            "singleton_concepts": self.singletons,
            "top_concepts": dict(self.concept_counts.most_common(20)),
        }


def kind_lines(tally: Mapping[str, Any], places: int) -> list[str]:
    """One line per kind of a stored tally, with its first `places` places."""
    return [
        f"{kind} {entry['count']:,} ({', '.join(entry['first'][:places])}"
        + (", …)" if entry["count"] > places else ")")
        for kind, entry in tally.items()
    ]


def report_table(report: Mapping[str, Any], places: int = 3) -> str:
    """A stored report (`Report.as_dict`) for a terminal: one aligned line per figure."""
    rows, found, concepts = report["rows"], report["annotations_found"], report["concepts"]
    annotations = found + report["annotations_not_in_text"]
    bad_rows, bad_annotations = report["malformed_rows"], report["malformed_annotations"]
    return "\n".join(
        [
            _line("rows read", rows),
            _line("  malformed", _total(bad_rows), rows),
            *(f"      {line}" for line in kind_lines(bad_rows, places)),
            _line("  empty text", report["empty_text"], rows),
            _line("  dropped by concept", report["dropped_rows"], rows),
            _line("  text seen before", report["duplicate_texts"], rows),
            _line("  no entity, left out", report["unlabelled_left_out"], rows),
            _line("  records kept", report["records"], rows),
            _line("annotations", annotations),
            _line("  found in the text", found, annotations),
            _line("    at several places", report["annotations_ambiguous"], annotations),
            _line("  not in the text", report["annotations_not_in_text"], annotations),
            _line("annotations malformed", _total(bad_annotations)),
            *(f"      {line}" for line in kind_lines(bad_annotations, places)),
            _line("entities (mentions)", report["entities"]),
            _line("distinct concepts", concepts),
            _line("  annotated once", report["singleton_concepts"], concepts),
        ]
    )


def _total(tally: Mapping[str, Any]) -> int:
    return sum(entry["count"] for entry in tally.values())


def _line(name: str, count: int, whole: int | None = None) -> str:
    share = f"{count / whole:9.2%}" if whole else ""
    return f"{name:<24}{count:>12,}{share}"
