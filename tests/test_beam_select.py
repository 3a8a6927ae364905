"""The selection in Beam, on its runner in this process, is that of one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpora import SHARED_WORDS, config_of, sentences, stored, write_corpus
from ml_collections import ConfigDict

from nuner_jax.annotate.beam import files as beam_files
from nuner_jax.annotate.beam import select as beam_select
from nuner_jax.annotate.beam.runner import pipeline_options, runner
from nuner_jax.annotate.selection import select as one_machine
from nuner_jax.errors import NunerError


@pytest.fixture(scope="module")
def run() -> Callable:
    return runner(pipeline_options([]))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def corpus_config(corpus: Path, **source: Any) -> ConfigDict:
    paths = source.pop("paths", ("c-*.txt.gz", "a.txt", "b.jsonl"))
    return config_of([corpus / path for path in paths], **source)


@pytest.mark.parametrize(
    "source",
    [
        {"duplicates": "near", "near_threshold": 0.6},
        {"duplicates": "near", "near_threshold": 0.6, "size": 60},
        {"duplicates": "exact", "size": 30, "shard": "1/3"},
    ],
)
def test_the_selection_is_that_of_one_machine(corpus, tmp_path, run, monkeypatch, source):
    monkeypatch.setattr(beam_files, "ROWS_PER_PART", 7)  # many parts, as of a large corpus
    config = corpus_config(corpus, **source)
    made = one_machine.select(config, tmp_path / "one" / "selection", lambda line: None)
    said = []
    beam_select.select(config, str(tmp_path / "beam"), run, said.append)
    assert stored(tmp_path / "beam" / "selection") == stored(tmp_path / "one" / "selection")
    assert said[-1].startswith("      malformed rows: ") and f"{made.counts['selected']} of" in said[0]
    assert made.counts["malformed"] == 3 and made.counts["duplicate"] + made.counts["beyond_sample"] >= 30
    assert bool(made.counts["near_duplicate"]) == (source["duplicates"] == "near")
    assert [path.name for path in (tmp_path / "beam").iterdir()] == ["selection"]  # nothing is left behind


def test_reading_is_repeated_if_near_duplicates_leave_too_few(tmp_path, run, monkeypatch):
    monkeypatch.setattr(one_machine, "_SPARE_UNITS", 0)
    (tmp_path / "a.txt").write_text(
        "\n".join([*(f"In year {n} {SHARED_WORDS}." for n in range(90)), *sentences(40, 1)])
    )
    config = config_of([tmp_path / "a.txt"], size=20, near_threshold=0.6)
    one_machine.select(config, tmp_path / "one" / "selection", lambda line: None)
    said = []
    beam_select.select(config, str(tmp_path / "beam"), run, said.append)
    assert "reading again, and holding 48" in said[0]
    assert stored(tmp_path / "beam" / "selection") == stored(tmp_path / "one" / "selection")


def test_a_selection_is_divided_for_many_machines(corpus, tmp_path, run):
    config = corpus_config(corpus, duplicates="exact")
    said = []
    beam_select.select(config, str(tmp_path), run, said.append, shards=2)
    assert [line.partition(" ")[0] for line in said if "units in" in line] == ["shard-0-of-2", "shard-1-of-2"]
    for part in range(2):
        config.source.shard = f"{part}/2"
        again = one_machine.select(config, tmp_path / f"shard-{part}-of-2" / "selection", lambda line: None)
        assert again.reused  # one machine recognises it, and does not select again
        fresh = one_machine.select(config, tmp_path / f"{part}", lambda line: None)
        assert again.fingerprint == fresh.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        ({"paths": ("no.txt",)}, r"no\.txt: no such file"),
        ({"field": "words"}, r"b\.jsonl:1: has no 'words' \(config\.source\.field\); its keys are: 'text'$"),
        ({"min_chars": 900}, r"no unit is left \(too_short [\d,]+\)"),
        ({"paths": ("c-2.txt.gz", "a.txt")}, r"c-2\.txt\.gz: holds no text$"),
        ({"script": "Latn"}, r"config\.source\.script = 'Latn' is unknown"),
        ({"language": "English"}, r"config\.source\.language = 'English': a code"),
    ],
)
def test_bad_input_is_told_as_on_one_machine(corpus, tmp_path, run, change, message):
    config = corpus_config(corpus, **change)
    for select, place in [(one_machine.select, tmp_path), (beam_select.select, str(tmp_path))]:
        with pytest.raises(NunerError, match=message):
            select(config, place, *([run] if select is beam_select.select else []), lambda line: None)
