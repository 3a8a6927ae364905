"""What is selected depends on texts and seed alone, and every unit is accounted for."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nuner_jax.annotate.selection import duplicates
from nuner_jax.annotate.selection.select import LEFT_OUT, Selection, read_units, select
from nuner_jax.annotate.workdir import SELECTION_FILE, UNITS_FILE
from nuner_jax.config import annotate
from nuner_jax.errors import NunerError


def run(folder: Path, *paths, seed: int = 0, said: list[str] | None = None, **source) -> Selection:
    config = annotate()
    config.seed = seed
    config.source.paths = tuple(map(str, paths))
    for key, value in source.items():
        config.source[key] = value
    return select(config, folder, (said if said is not None else []).append)


def texts(folder: Path, *paths, **source) -> list[str]:
    return [unit.text for unit in read_units(run(folder, *paths, **source).path)]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def numbered(count: int, start: int = 0) -> list[str]:
    """Sentences of which no two are near duplicates."""
    words = random.Random(7)
    drawn = [" ".join(f"w{words.randrange(10**6)}" for _ in range(8)) for _ in range(start + count)]
    return [f"Sentence {at} {line}." for at, line in enumerate(drawn)][start:]


# --- Order, sample and shards ------------------------------------------------------------------


def test_a_sample_begins_every_larger_one_and_the_order_of_files_does_not_matter(tmp_path):
    lines = numbered(300)
    one = write_lines(tmp_path / "one.txt", lines)
    lines.reverse()
    parts = [write_lines(tmp_path / f"p{at}.txt", lines[at::3]) for at in (2, 0, 1)]
    everything = texts(tmp_path / "all", one)
    assert sorted(everything) == sorted(lines) and everything != lines
    assert texts(tmp_path / "10", one, size=10) == everything[:10]
    assert texts(tmp_path / "20", *parts, size=20) == everything[:20]
    assert texts(tmp_path / "parts", *parts, size=5000) == everything
    assert texts(tmp_path / "seed", one, seed=1)[:20] != everything[:20]
    ranks = [hashlib.blake2b(b"0\0" + text.encode(), digest_size=12).digest() for text in everything]
    assert ranks == sorted(ranks)


def test_shards_are_disjoint_and_make_up_the_whole(tmp_path):
    path = write_lines(tmp_path / "a.txt", numbered(200))
    whole = texts(tmp_path / "whole", path, size=100)
    made = [run(tmp_path / f"{part}", path, size=100, shard=f"{part}/3") for part in range(3)]
    shards = [[unit.text for unit in read_units(one.path)] for one in made]
    assert sorted(text for shard in shards for text in shard) == sorted(whole)
    assert all(shard == [text for text in whole if text in shard] for shard in shards)
    assert all(one.counts["other_shard"] == 100 - len(shard) > 0 for one, shard in zip(made, shards, strict=True))
    with pytest.raises(NunerError, match=r"^config.source.shard = \d/9: none of the 1 units is in it$"):
        for part in range(2):
            run(tmp_path / f"nine{part}", path, size=1, shard=f"{part}/9")


@settings(max_examples=60)
@given(
    lines=st.lists(st.sampled_from([*numbered(9), "x", "б " * 30, "few", "a\x01" * 20]), min_size=1, max_size=40),
    size=st.none() | st.integers(1, 12),
    shards=st.integers(1, 3),
    duplicate=st.sampled_from(["exact", "near"]),
)
def test_every_unit_ends_in_exactly_one_count(tmp_path_factory, lines, size, shards, duplicate):
    folder = tmp_path_factory.mktemp("counts")
    path = write_lines(folder / "a.jsonl", [json.dumps({"text": line}) for line in lines])
    good = {line for line in lines if line.startswith("Sentence")}
    selected = []
    for part in range(shards):
        try:
            made = run(folder / f"{part}", path, size=size, shard=f"{part}/{shards}", unit="row", duplicates=duplicate)
        except NunerError as error:
            assert "is in it" in str(error) or not good
            continue
        counts = made.counts
        assert counts["units"] == len(lines) == counts["selected"] + sum(counts[reason] for reason in LEFT_OUT)
        selected += [unit.text for unit in read_units(made.path)]
    assert len(selected) == len(set(selected)) == min(len(good), size or len(good))
    assert set(selected) <= good


def test_a_sample_needs_memory_for_the_sample_only(tmp_path):
    path = write_lines(tmp_path / "a.txt", numbered(20_000))
    peaks = {}
    for size in (10, None):
        tracemalloc.start()
        run(tmp_path / f"{size}", path, size=size, duplicates="exact")
        peaks[size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[10] < 1_000_000 < 20_000 * 150 < peaks[None] < 20_000 * 500


# --- Duplicates --------------------------------------------------------------------------------

LETTER = " ".join(f"word{at}" for at in range(60))


def test_equal_and_near_equal_units_are_left_out(tmp_path):
    near = [f"{LETTER} ending number {at}." for at in range(3)] + [LETTER.upper() + " ENDING, NUMBER (0)!"]
    path = write_lines(tmp_path / "a.txt", [*numbered(20), *near, near[0], near[0]])
    made = run(tmp_path / "near", path, unit="row")
    assert (made.counts["near_duplicate"], made.counts["duplicate"], made.counts["selected"]) == (3, 2, 21)
    assert run(tmp_path / "exact", path, unit="row", duplicates="exact").counts["selected"] == 24
    assert run(tmp_path / "1.0", path, unit="row", near_threshold=1.0).counts["near_duplicate"] == 1


def test_reading_is_repeated_if_near_duplicates_leave_too_few(tmp_path):
    path = write_lines(tmp_path / "a.txt", [*numbered(12), *(f"{LETTER} {at}." for at in range(2500))])
    said: list[str] = []
    made = run(tmp_path / "out", path, size=10, said=said)
    assert made.counts["selected"] == 10 and made.counts["beyond_sample"] > 0
    assert any(line.endswith("reading again, and holding 2,024") for line in said)
    whole = texts(tmp_path / "whole", path)
    assert len(whole) == 13
    assert [unit.text for unit in read_units(made.path)] == whole[:10]


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
)
def test_near_duplicates_are_those_of_the_rule(lines, threshold):
    signatures = np.stack([duplicates.signature(line) for line in lines])
    keys = [set(duplicates.bands(one, threshold)) for one in signatures]
    expected = [
        any(
            keys[at] & keys[before] and duplicates.similarity(signatures[[before]], signatures[at])[0] >= threshold
            for before in range(at)
        )
        for at in range(len(lines))
    ]
    assert duplicates.near_duplicates(lines, threshold).tolist() == expected


def test_the_similarity_estimates_that_of_the_word_triples():
    words = LETTER.split()
    for changed in (1, 5, 20):
        other = " ".join([*words[:-changed], *(f"new{at}" for at in range(changed))])
        mine, others = set(duplicates.shingles(LETTER)), set(duplicates.shingles(other))
        estimate = duplicates.similarity(duplicates.signature(LETTER)[None], duplicates.signature(other))[0]
        assert estimate == pytest.approx(len(mine & others) / len(mine | others), abs=0.12)
    assert duplicates.shingles("One, TWO!") == [b"one two"] and duplicates.shingles("?!") == [b"?!"]


def test_signatures_are_the_same_in_every_process():
    """A change of this value makes other selections of the same texts: raise the version in select.py with it."""
    assert duplicates.rank(3, b"text").hex() == "bf7674d9e07810924e883c50"
    assert (
        hashlib.sha256(b"".join(duplicates.bands(duplicates.signature(LETTER), 0.8))).hexdigest()[:16]
        == "ee5a49a5b1d5a599"
    )


# --- The folder --------------------------------------------------------------------------------


def test_a_selection_is_made_once_and_its_bytes_are_always_the_same(tmp_path):
    path = write_lines(tmp_path / "a.txt", numbered(50))
    made, said = run(tmp_path / "out", path, size=20), []
    packed = made.path.read_bytes()
    again = run(tmp_path / "out", path, size=20, said=said)
    assert again == Selection(made.path, made.fingerprint, made.counts, reused=True) and not made.reused
    assert said == ["selection    20 units: up to date"]
    assert run(tmp_path / "other", path, size=20).path.read_bytes() == packed
    assert (
        made.fingerprint == hashlib.sha256(b"".join(b"%s\n" % u.id.encode() for u in read_units(made.path))).hexdigest()
    )
    assert not run(tmp_path / "out", path, size=20, seed=1).reused
    assert not run(tmp_path / "out", path, size=20).reused
    (tmp_path / "out" / UNITS_FILE).unlink()
    assert not run(tmp_path / "out", path, size=20).reused
    write_lines(path, numbered(51))
    assert not run(tmp_path / "out", path, size=20).reused
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [SELECTION_FILE, UNITS_FILE]


def test_a_full_disk_leaves_the_selection_that_was_there(tmp_path):
    path = write_lines(tmp_path / "a.txt", numbered(4000))
    before = run(tmp_path / "out", path, size=10, duplicates="exact")
    stored = before.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(NunerError, match=r"out: cannot be written \(File too large\)"):
            run(tmp_path / "out", path, duplicates="exact")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before.path.read_bytes() == stored
    assert run(tmp_path / "out", path, size=10, duplicates="exact").reused
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-20], "the gzip data is corrupt or truncated here"),
        (lambda packed: gzip.compress(gzip.decompress(packed) + b'{"id": "1"}\n'), ":4: is no line of a selection"),
        (lambda packed: gzip.compress(b"oops\n"), ":1: is no line of a selection; delete the file and select again"),
    ],
)
def test_a_damaged_selection_is_named(tmp_path, damage, message):
    made = run(tmp_path / "out", write_lines(tmp_path / "a.txt", numbered(3)))
    made.path.write_bytes(damage(made.path.read_bytes()))
    with pytest.raises(NunerError) as raised:
        list(read_units(made.path))
    assert str(raised.value).startswith(str(made.path)) and message in str(raised.value)
