"""The stage `align`: completions become records, and every unit, line and annotation is accounted for.

    units        =  kept + dropped_concept + unlabelled_left_out + failed (by reason) + pending
    lines        =  annotations + rejected (by reason) + ignored (by reason)      of all completions
    annotations  =  found + unplaced (by reason)

`align_unit` does it for one unit, without any I/O; the stage runs it over a journal.

    WORKDIR/aligned.jsonl.gz    the records, with "unit" and the "raw_concepts" of their entities
    WORKDIR/rejected.jsonl.gz   each line that is no annotation, or has no place: unit, line, reason
    WORKDIR/align.json          the counts, the options, and the sha256 of the records
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.journal.journal import Journal
from nuner_jax.annotate.units import Completed
from nuner_jax.annotate.workdir import ALIGNED_FILE, COUNTS_FILE, REJECTED_FILE
from nuner_jax.data.align import DELIMITER, AlignOptions, Annotation, align
from nuner_jax.data.completions import Completion, Rejected, parse_completion
from nuner_jax.data.concepts import normalise_case, plural_forms
from nuner_jax.data.importers.rows import text_lines
from nuner_jax.data.records import Entity, Record
from nuner_jax.folders import writing

OUTCOMES = ("kept", "dropped_concept", "unlabelled_left_out", "failed", "pending")


@dataclass(frozen=True, slots=True)
class UnitOptions:
    """How a completion becomes a record.

    align: what counts as a place of a mention. lower: whether the case of concept names is evened out.
    singulars: the name of each concept that is the plural of another one. drop_concept: in lower case; texts
    with this concept, in any case, are left out; "" keeps them. keep_unlabelled: whether texts in which nothing was
    found are kept.
    """

    align: AlignOptions = AlignOptions()
    lower: bool = False
    singulars: Mapping[str, str] = field(default_factory=dict)
    drop_concept: str = ""
    keep_unlabelled: bool = False

    @classmethod
    def of(cls, config: ConfigDict) -> UnitOptions:
        """The options of a config; its plurals are known only after a look at all completions."""
        return cls(
            AlignOptions(config.align.occurrences, config.align.match, config.align.min_chars, config.align.max_chars),
            lower="case" in config.align.normalise,
            drop_concept=config.build.drop_concept.lower(),
            keep_unlabelled=config.build.keep_unlabelled,
        )

    def concept(self, raw: str) -> str:
        """The name under which a concept is kept."""
        name = normalise_case(raw) if self.lower else raw
        return self.singulars.get(name, name)


@dataclass(frozen=True, slots=True)
class AlignedUnit:
    """What became of one unit and of every line of its completion.

    outcome: one of `OUTCOMES`. reason: of a failed unit, a word or two. record: of a kept unit.
    raw_concepts: what the annotator called the concept of each entity of `record`.
    found: how many annotations have a place in the text; `inexact` of them not letter by letter, `ambiguous` of them
    at several places. unplaced: the other annotations. rejected, ignored: lines that are none.
    """

    unit: str
    outcome: str
    reason: str = ""
    record: Record | None = None
    raw_concepts: tuple[str, ...] = ()
    found: int = 0
    inexact: int = 0
    ambiguous: int = 0
    unplaced: tuple[Rejected, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    ignored: tuple[Rejected, ...] = ()

    def row(self) -> dict[str, Any]:
        """A kept unit as a line of the aligned file, which is one of the import format `spans` too."""
        return {"unit": self.unit, **self.record.as_dict(), "raw_concepts": list(self.raw_concepts)}

    def rejected_rows(self) -> Iterator[dict[str, str]]:
        """Lines of the file of rejected ones; halves of characters, which no file can hold, as their escapes."""
        for one in (*self.rejected, *self.unplaced):
            line = one.line.encode("utf-8", "backslashreplace").decode()
            yield {"unit": self.unit, "line": line, "reason": one.reason}


@dataclass
class Counts:
    """The counts of many units; those of parts add up to those of the whole.

    per_unit: how many answered units have that many annotations with a place. concepts: mentions in kept records.
    """

    units: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    annotations: Counter[str] = field(default_factory=Counter)
    unplaced: Counter[str] = field(default_factory=Counter)
    per_unit: Counter[int] = field(default_factory=Counter)
    concepts: Counter[str] = field(default_factory=Counter)

    def add(self, unit: AlignedUnit) -> None:
        """Counts one more unit."""
        self.units[unit.outcome] += 1
        if unit.outcome == "failed":
            self.failed[unit.reason] += 1
        if unit.outcome in ("failed", "pending"):
            return
        self.rejected.update(one.reason for one in unit.rejected)
        self.ignored.update(one.reason for one in unit.ignored)
        self.unplaced.update(one.reason for one in unit.unplaced)
        self.annotations.update(found=unit.found, inexact=unit.inexact, ambiguous=unit.ambiguous)
        self.per_unit[unit.found] += 1
        if unit.record:
            self.units["unlabelled_kept"] += not unit.record.entities
            self.concepts.update(entity.concept for entity in unit.record.entities)

    def update(self, other: Counts) -> None:
        """Adds the counts of other units."""
        for one in dataclasses.fields(self):
            getattr(self, one.name).update(getattr(other, one.name))

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON data; of the concepts, their numbers only."""
        found, unplaced = self.annotations["found"], self.unplaced.total()
        return {
            "units": {
                "all": sum(self.units[outcome] for outcome in OUTCOMES),
                **{outcome: self.units[outcome] for outcome in OUTCOMES},
                "failed_by_reason": _by_count(self.failed),
            },
            "lines": {
                "all": found + unplaced + self.rejected.total() + self.ignored.total(),
                "annotations": found + unplaced,
                "rejected": _by_count(self.rejected),
                "ignored": _by_count(self.ignored),
            },
            "annotations": {
                "found": found,
                "inexact": self.annotations["inexact"],
                "ambiguous": self.annotations["ambiguous"],
                "unplaced": _by_count(self.unplaced),
            },
            "records": {
                "records": self.units["kept"],
                "unlabelled": self.units["unlabelled_kept"],
                "entities": self.concepts.total(),
                "concepts": len(self.concepts),
                "singletons": sum(count == 1 for count in self.concepts.values()),
            },
            "annotations_per_unit": {str(number): self.per_unit[number] for number in sorted(self.per_unit)},
        }


def align_unit(completed: Completed, options: UnitOptions) -> AlignedUnit:
    """Reads the completion of a unit and finds its annotations in the text: a pure function."""
    if completed.state != "done":
        return AlignedUnit(completed.id, completed.state, completed.error.partition(":")[0])
    parsed = _parsed(completed)
    names = [options.concept(one.concept) for one in parsed.annotations]
    # Each goes with its number in the place of its description: so an entity tells which annotation it is of, of
    # several with one concept after normalisation.
    numbered = [Annotation(one.surface, names[n], str(n)) for n, one in enumerate(parsed.annotations)]
    aligned = align(completed.text, numbered, options.align)
    origins = [parsed.annotations[int(entity.description)] for entity in aligned.entities]
    entities = tuple(
        Entity(entity.start, entity.end, entity.concept, origin.description)
        for entity, origin in zip(aligned.entities, origins, strict=True)
    )
    if options.drop_concept and any(name.lower() == options.drop_concept for name in names):
        outcome = "dropped_concept"
    elif not entities and not options.keep_unlabelled:
        outcome = "unlabelled_left_out"
    else:
        outcome = "kept"
    return AlignedUnit(
        completed.id,
        outcome,
        record=Record(completed.text, entities) if outcome == "kept" else None,
        raw_concepts=tuple(origin.concept for origin in origins) if outcome == "kept" else (),
        found=len(aligned.found),
        inexact=aligned.inexact,
        ambiguous=aligned.ambiguous,
        unplaced=tuple(
            Rejected(_as_line(parsed.annotations[int(one.description)]), reason) for one, reason in aligned.rejected
        ),
        rejected=parsed.rejected,
        ignored=parsed.ignored,
    )


def concept_names(completed: Completed, options: UnitOptions) -> list[str]:
    """The concepts that a unit's completion names, as they are before plurals are looked at."""
    if completed.state != "done":
        return []
    return [options.concept(one.concept) for one in _parsed(completed).annotations]


def align_journal(config: ConfigDict, journal: Journal, workdir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Aligns every answered unit of the journal; writes the files that this module's head names.

    Args:
      config: its `align` and `build` count.
      journal: read only; once, or twice where plurals are to be found.
      workdir: where the files go; earlier ones are replaced when all is done.
      say: gets the summary.

    Returns:
      What align.json holds.

    Raises:
      NunerError: the files cannot be written.
    """
    options = UnitOptions.of(config)
    if "plural" in config.align.normalise:
        vocabulary = {name for completed in journal.completions() for name in concept_names(completed, options)}
        options = dataclasses.replace(options, singulars=plural_forms(vocabulary))
    counts, digest = Counts(), hashlib.sha256()
    with writing(workdir):
        with _line_file(workdir / REJECTED_FILE) as reject, _line_file(workdir / ALIGNED_FILE) as keep:
            for completed in journal.completions():
                unit = align_unit(completed, options)
                counts.add(unit)
                if unit.record:
                    digest.update(keep(unit.row()))
                for row in unit.rejected_rows():
                    reject(row)
            (workdir / COUNTS_FILE).unlink(missing_ok=True)  # it vouches for the two others, so it comes last
        content = {
            **counts.as_dict(),
            "options": options_dict(config, options),
            "selection": journal.fingerprint(),
            "sha256": digest.hexdigest(),
        }
        _write_whole(workdir / COUNTS_FILE, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    for line in summary_lines(content):
        say(line)
    return content


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of one of the files of this stage.

    Raises:
      NunerError: it is missing or broken.
    """
    return (json.loads(line) for _, line in text_lines(path))


def read_records(path: Path) -> Iterator[Record]:
    """The records of the aligned file, in the order of the selection; raises as `read_rows`."""
    return map(Record.from_dict, read_rows(path))


def summary_lines(counts: Mapping[str, Any]) -> list[str]:
    """What align.json holds, for a terminal: one aligned line per figure."""
    units, lines, annotations, records = (counts[key] for key in ("units", "lines", "annotations", "records"))
    every, placed = lines["all"], lines["annotations"]
    return [
        _line("units", units["all"]),
        _line("  kept", units["kept"], units["all"]),
        _line("  dropped by concept", units["dropped_concept"], units["all"]),
        _line("  nothing found, left out", units["unlabelled_left_out"], units["all"]),
        _line("  failed", units["failed"], units["all"]),
        *_reasons(units["failed_by_reason"]),
        _line("  without an answer yet", units["pending"], units["all"]),
        _line("lines of completions", every),
        _line("  annotations", placed, every),
        _line("  ignored", sum(lines["ignored"].values()), every),
        *_reasons(lines["ignored"]),
        _line("  rejected", sum(lines["rejected"].values()), every),
        *_reasons(lines["rejected"]),
        _line("annotations", placed),
        _line("  found in the text", annotations["found"], placed),
        _line("    not letter by letter", annotations["inexact"], placed),
        _line("    at several places", annotations["ambiguous"], placed),
        _line("  without a place", sum(annotations["unplaced"].values()), placed),
        *_reasons(annotations["unplaced"]),
        _line("entities (mentions)", records["entities"]),
        _line("distinct concepts", records["concepts"]),
        _line("  mentioned once", records["singletons"], records["concepts"]),
    ]


def share(part: int, whole: int) -> str:
    """A part in percent of the whole; only nothing is 0.00%, and only all is 100.00%."""
    if not whole:
        return "none"
    if 0 < part < whole:
        hundredths = 10_000 * part / whole
        if hundredths < 1:
            return "<0.01%"
        if hundredths > 9999:
            return ">99.99%"
    return f"{part / whole:.2%}"


def _parsed(completed: Completed) -> Completion:
    return parse_completion(completed.completion, completed.text, cut=completed.finish == "length")


def _as_line(annotation: Annotation) -> str:
    return f" {DELIMITER} ".join(part for part in annotation if part)


def options_dict(config: ConfigDict, options: UnitOptions) -> dict[str, Any]:
    """The options as `align.json` holds them."""
    return {
        **dataclasses.asdict(options.align),
        "normalise": list(config.align.normalise),
        "plurals": len(options.singulars),
        "drop_concept": config.build.drop_concept,
        "keep_unlabelled": options.keep_unlabelled,
    }


@contextlib.contextmanager
def _line_file(path: Path) -> Iterator[Callable[[Mapping[str, Any]], bytes]]:
    """Writes rows as gzip JSON lines, wholly or not at all; writing one gives its bytes. Equal rows, equal file."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:

            def write(row: Mapping[str, Any]) -> bytes:
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                return line

            yield write
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _by_count(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first; of equal ones, by name, so that it does not matter in which order they came."""
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _reasons(counts: Mapping[str, int]) -> Iterable[str]:
    return (f"      {reason} {count:,}" for reason, count in counts.items())


def _line(name: str, count: int, whole: int = 0) -> str:
    return f"{name:<26}{count:>12,}{share(count, whole) if whole else '':>9}".rstrip()
