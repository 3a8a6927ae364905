"""The tokenised corpus: every token, every mention and every name is where the arrays say it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from nuner_jax.data import builder
from nuner_jax.data.corpus import Corpus, load_corpus
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError
from nuner_jax.pretrained import load_tokenizer

CUTS = ("cuts_between_words", "cuts_in_words", "cuts_through_mentions")


@pytest.fixture(scope="module")
def byte_level(root):
    """The sample's own tokenizer: bytes, as RoBERTa's."""
    return load_tokenizer(root / "nuner_jax" / "data" / "sample" / "tokenizer")


@pytest.fixture(scope="module")
def minilm(minilm_folder):
    """A real WordPiece tokenizer, which lowers case and strips accents."""
    return load_tokenizer(minilm_folder)


@pytest.fixture(scope="module", params=["byte_level", "minilm"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def rows_dir(rows_file, tmp_path_factory) -> Path:
    return builder.ensure_built(str(rows_file), tmp_path_factory.mktemp("shards"), validation_fraction=0.1)


@pytest.fixture(scope="module")
def load(rows_dir, tmp_path_factory):
    """load_corpus on the 400 rows, with a cache for all tests; arguments override."""
    shared = tmp_path_factory.mktemp("cache")

    def load_rows(tokenizer, sources=None, split="train", window=128, concept_length=32, cache=shared) -> Corpus:
        return load_corpus(
            sources or {"rows": rows_dir},
            split,
            tokenizer,
            window=window,
            concept_length=concept_length,
            cache_dir=cache,
        )

    return load_rows


@pytest.fixture
def load_records(load, tmp_path):
    """load_corpus on hand-made records."""

    def load_made(tokenizer, *records: Record, **options) -> Corpus:
        builder.build(records, tmp_path / "made", validation_fraction=0)
        return load(tokenizer, {"made": tmp_path / "made"}, **options)

    return load_made


def marked(text: str) -> Record:
    """A record from "the city of [Rome|city]"."""
    plain, entities = "", []
    for before, surface, concept in re.findall(r"([^\[]*)(?:\[([^|]*)\|([^\]]*)\])?", text):
        plain += before
        if concept:
            entities.append(Entity(len(plain), len(plain) + len(surface), concept))
            plain += surface
    return Record(plain, tuple(entities))


def sequences(corpus: Corpus) -> list[list[int]]:
    at = corpus.sequence_offsets_W1
    return [corpus.tokens_T[start:stop].tolist() for start, stop in zip(at[:-1], at[1:], strict=True)]


def pairs(corpus: Corpus) -> list[list[tuple[int, str]]]:
    """(position, concept name) of every sequence's pairs."""
    at = corpus.pair_offsets_W1
    return [
        [
            (int(position), corpus.concept_names[concept])
            for position, concept in zip(
                corpus.pair_positions_P[start:stop], corpus.pair_concepts_P[start:stop], strict=True
            )
        ]
        for start, stop in zip(at[:-1], at[1:], strict=True)
    ]


def overlapping(tokenizer, text: str, entity: Entity) -> list[int]:
    """The tokens of a text (no special tokens) that share a character with a mention, one by one."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [t for t, (start, end) in enumerate(spans) if start < entity.end and end > entity.start]


def folded(text: str) -> str:
    """Without case, accents and white space: what WordPiece keeps of a text."""
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(c for c in letters if unicodedata.category(c) != "Mn" and not c.isspace())


def by_text(corpus: Corpus, records, tokenizer) -> list[list[int]]:
    """The sequences (indices) of each text: as many as it takes to have all of its tokens."""
    length_W, owners, at = corpus.length_W, [], 0
    for record in records:
        left, mine = len(tokenizer(record.text, add_special_tokens=False)["input_ids"]), []
        while left > 0:
            mine.append(at)
            left -= int(length_W[at]) - 2
            at += 1
        assert left == 0, record.text
        owners.append(mine)
    assert at == length_W.size
    return owners


def test_pairs_are_the_tokens_of_the_mentions_and_spell_them(load, rows_dir, tokenizer, byte_level):
    corpus, records = load(tokenizer), builder.open_split(rows_dir, "train")
    assert len(records) == len(sequences(corpus)) == corpus.report["texts"] > 300
    mentions = inexact = 0
    for record, ids, found in zip(records, sequences(corpus), pairs(corpus), strict=True):
        expected = set()
        for entity in record.entities:
            tokens = overlapping(tokenizer, record.text, entity)
            expected |= {(t + 1, entity.concept) for t in tokens}
            spelt, surface = tokenizer.decode([ids[t + 1] for t in tokens]), record.text[entity.start : entity.end]
            mentions += 1
            if tokenizer is byte_level:  # exact; but the tokenizer may join "22%" and the comma after it
                inexact += spelt.lstrip(" ") != surface
                assert re.fullmatch(re.escape(surface) + r"[^\w\s]*", spelt.lstrip(" "))
            else:
                assert folded(spelt) == folded(surface)
        assert len(found) == len(set(found)), "each pair once"
        assert set(found) == expected, record.text
    assert mentions == corpus.report["mentions"] > 1500
    assert inexact < 0.01 * mentions


def test_a_token_that_two_mentions_share_is_one_pair_per_concept(load_records, minilm):
    entities = (Entity(0, 2, "number"), Entity(1, 4, "number"), Entity(0, 4, "year"))
    corpus = load_records(minilm, Record("1984 was a book", entities))
    assert minilm.tokenize("1984 was") == ["1984", "was"]
    assert sorted(pairs(corpus)[0]) == [(1, "number"), (1, "year")]
    assert dict(zip(corpus.concept_names, corpus.concept_mentions_C.tolist(), strict=True)) == {"number": 2, "year": 1}


@pytest.mark.parametrize("window", [16, 128])
def test_sequences_lie_between_special_tokens_and_in_the_window(load, tokenizer, window):
    for ids in sequences(load(tokenizer, window=window)):
        assert 3 <= len(ids) <= window
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        assert not set(ids[1:-1]) & {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id}


@pytest.mark.parametrize("window", [12, 24])
def test_windows_hold_every_token_once_and_end_between_words_outside_mentions(load, rows_dir, tokenizer, window):
    whole, corpus = load(tokenizer), load(tokenizer, window=window)
    records, cut, counts = builder.open_split(rows_dir, "train"), sequences(corpus), dict.fromkeys(CUTS, 0)
    owners, cut_pairs = by_text(corpus, records, tokenizer), pairs(corpus)
    for record, mine, ids, found in zip(records, owners, sequences(whole), pairs(whole), strict=True):
        assert [t for w in mine for t in cut[w][1:-1]] == ids[1:-1]
        shifts = np.cumsum([0, *(len(cut[w]) - 2 for w in mine)])
        moved = [(p + shift, c) for w, shift in zip(mine, shifts, strict=False) for p, c in cut_pairs[w]]
        assert sorted(moved) == sorted(found), "no pair is lost or moved"

        spans = tokenizer(record.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        again = [t > 0 and spans[t - 1][0] == start for t, (start, _) in enumerate(spans)]  # of one character
        starts_word = [start == 0 or record.text[start - 1].isspace() for start, _ in spans]
        divides = [
            a or any(e.start < s < e.end for e in record.entities) for a, (s, _) in zip(again, spans, strict=True)
        ]
        for start, stop in zip(shifts[:-1], shifts[1:-1], strict=False):
            kind = "through_mentions" if divides[stop] else "between_words" if starts_word[stop] else "in_words"
            counts[f"cuts_{kind}"] += 1
            better = range(start + 1, start + window - 1)
            if kind != "between_words":
                assert all(divides[t] or (kind == "in_words" and not starts_word[t]) for t in better), "unavoidable"
    assert counts == {kind: corpus.report.get(kind, 0) for kind in CUTS}
    assert counts["cuts_between_words"] > 300
    assert corpus.report["texts_split"] == sum(len(mine) > 1 for mine in owners)
    assert corpus.report["sequences"] == len(cut)


def test_a_word_longer_than_a_window_is_cut_where_the_window_is_full(load_records, byte_level):
    record = marked("an [address|url] is https://" + "qzxv" * 60 + " and so on")
    corpus = load_records(byte_level, record, window=32)
    ids, cut = byte_level(record.text, add_special_tokens=False)["input_ids"], sequences(corpus)
    assert [t for part in cut for t in part[1:-1]] == ids
    # The words before it, full windows of it, its end with the words after it.
    assert byte_level.decode(cut[0][1:-1]) == "an address is"
    assert {len(part) for part in cut[1:-1]} == {32}
    assert {kind: corpus.report.get(kind, 0) for kind in CUTS} == {
        "cuts_between_words": 1,
        "cuts_in_words": len(cut) - 2,
        "cuts_through_mentions": 0,
    }


@pytest.mark.parametrize("window", [14, 15])
def test_a_script_without_spaces_is_cut_outside_mentions(load_records, tokenizer, window):
    record = marked("𝒜她在[北京|city]见到[王明|person]后飞往[上海|city]与[李雷|person]开会并参观[故宫|museum]的展览")
    corpus = load_records(tokenizer, record, window=window)
    cut = sequences(corpus)
    assert len(cut) > 2
    assert [t for part in cut for t in part[1:-1]] == tokenizer(record.text, add_special_tokens=False)["input_ids"]
    assert corpus.report["cuts_in_words"] == len(cut) - 1
    ends = np.cumsum([len(part) - 2 for part in cut])
    whole = [*record.entities, *(Entity(at, at + 1, "a character of several bytes") for at in range(len(record.text)))]
    for part in whole:
        window_of = np.searchsorted(ends, overlapping(tokenizer, record.text, part), side="right")
        assert len(set(window_of)) == 1, record.text[part.start : part.end]


def test_a_mention_longer_than_a_window_is_cut_and_counted_and_stays_positive(load_records, tokenizer):
    title = "the very long and winding title of a book that nobody ever read to its end"
    corpus = load_records(tokenizer, marked(f"she wrote [{title}|book title] in May"), window=10)
    positive = [[p for p, _ in found] for found in pairs(corpus)]
    assert corpus.report["cuts_through_mentions"] >= 1
    assert sum(map(len, positive)) == len(tokenizer(" " + title, add_special_tokens=False)["input_ids"])
    cut = sequences(corpus)
    spelt = " ".join(tokenizer.decode([cut[w][p] for p in at]).strip() for w, at in enumerate(positive) if at)
    assert spelt == title, "cut between its words"


def test_no_cut_divides_the_bytes_of_a_character(load_records, byte_level):
    title = "🏛️ 👩‍👧 🇮🇹 𝒜𝓈 🌋🌋 " * 4
    corpus = load_records(byte_level, marked(f"they read [{title.strip()}|book title] aloud"), window=18)
    assert corpus.report["cuts_through_mentions"] > 5
    assert not [part for part in sequences(corpus) if "�" in byte_level.decode(part)]


def test_a_text_without_tokens_has_no_sequence(load_records, minilm, tmp_path):
    empty = Record("\u200b\u200b", (Entity(0, 1, "nothing"),))
    corpus = load_records(minilm, empty, marked("a [dog|animal]"))
    assert [minilm.decode(ids) for ids in sequences(corpus)] == ["[CLS] a dog [SEP]"]
    assert pairs(corpus) == [[(2, "animal")]]
    assert corpus.report["texts"] == 2
    assert corpus.report["texts_without_tokens"] == corpus.report["mentions_without_tokens"] == 1
    builder.build([empty], tmp_path / "empty", validation_fraction=0)
    with pytest.raises(NunerError, match=r"train split of .*empty holds no text"):
        load_corpus(
            {"empty": tmp_path / "empty"}, "train", minilm, window=16, concept_length=8, cache_dir=tmp_path / "c"
        )
    assert not list((tmp_path / "c" / "corpus").glob("train-*")), "nothing half made is left"


def test_a_split_that_a_data_set_lacks_is_named(load_records, minilm):
    with pytest.raises(NunerError, match=r"has no split 'validation'"):
        load_records(minilm, marked("a [dog|animal]"), split="validation")


def test_texts_without_entity_are_read_and_give_no_concept(load_records, byte_level):
    corpus = load_records(byte_level, Record("Nothing to see."), Record("Move on."))
    assert len(sequences(corpus)) == 2
    assert (corpus.pair_positions_P.size, corpus.concept_tokens_U.size, corpus.concept_names) == (0, 0, [])
    assert corpus.concept_offsets_C1.tolist() == [0]


@pytest.mark.parametrize(
    "text",
    [
        "👩\u200d👩\u200d👧 and 🇮🇹 love [Rome|city] 🏛️",
        "𝒜𝓈𝓉𝓇𝑜 says [👍🏽|emoji], [Rome|city]",
        "Cafe\u0301 in [Co\u0302te d'Azur|region], no[e\u0308l|feast], [Rome|city]",
        "نقل من [القاهرة|city] إلى [Rome|city]",
        "[हिन्दी|language] in\u00a0[Rome|city],\u2003[Çeşme|city]\u3000x",
        "\ufeff\tA  b \r\n [Rome|city]\x00\x01 [R\u0130ZE|city]",
        "ﬁve ｆｕｌｌ [Ｒｏｍｅ|city] [Straße|street]",
    ],
)
def test_any_unicode_keeps_its_place(load, byte_level, minilm, tmp_path, text):
    record = marked(text)
    file = tmp_path / "made.jsonl"
    file.write_text(json.dumps(record.as_dict()) + "\n")  # astral characters as surrogate pairs
    data = {"made": builder.ensure_built(str(file), tmp_path / "shards", validation_fraction=0)}
    for tokenizer in (byte_level, minilm):
        corpus = load(tokenizer, data)
        [ids], [found] = sequences(corpus), pairs(corpus)
        tokens = {entity: overlapping(tokenizer, record.text, entity) for entity in record.entities}
        assert set(found) == {(t + 1, entity.concept) for entity, mine in tokens.items() for t in mine}
        for entity, mine in tokens.items():
            spelt, surface = tokenizer.decode([ids[t + 1] for t in mine]), record.text[entity.start : entity.end]
            if tokenizer is byte_level:
                assert spelt.strip() == surface
            elif surface.isascii():  # others may be unknown to it
                assert spelt == surface.lower()
    ids = sequences(load(byte_level, data))[0]
    assert byte_level.decode(ids[1:-1]) == record.text


def test_each_concept_name_is_tokenised_once_as_it_stands(load, tokenizer):
    corpus = load(tokenizer)
    at = corpus.concept_offsets_C1
    assert len(set(corpus.concept_names)) == len(corpus.concept_names) == at.size - 1 > 500
    for name, start, stop in zip(corpus.concept_names, at[:-1], at[1:], strict=True):
        expected = tokenizer(name)["input_ids"]  # with special tokens
        assert corpus.concept_tokens_U[start:stop].tolist() == expected
    assert corpus.report["concept_names_cut"] == 0
    assert corpus.concept_mentions_C.sum() == corpus.report["mentions"]


def test_long_concept_names_are_cut_and_counted(load, tokenizer):
    corpus, limit = load(tokenizer, concept_length=5), 5
    whole = [tokenizer(name)["input_ids"] for name in corpus.concept_names]
    lengths = np.diff(corpus.concept_offsets_C1)
    np.testing.assert_array_equal(lengths, [min(len(ids), limit) for ids in whole])
    assert corpus.report["concept_names_cut"] == sum(len(ids) > limit for ids in whole) > 0
    first = next(i for i, ids in enumerate(whole) if len(ids) > limit)
    start, stop = corpus.concept_offsets_C1[first : first + 2]
    assert corpus.concept_tokens_U[start:stop].tolist() == [*whole[first][: limit - 1], tokenizer.sep_token_id]


def test_sources_follow_one_another_and_share_concepts(load, load_records, byte_level, rows_dir, tmp_path):
    alone = load_records(byte_level, marked("the [Tiber|river]"), marked("[Rome|city] fell"))
    made, rows = tmp_path / "made", load(byte_level)
    both = load(byte_level, {"rows": rows_dir, "made": made})
    assert both.source_names == ["rows", "made"]
    np.testing.assert_array_equal(both.source_W, [0] * len(sequences(rows)) + [1] * 2)
    assert sequences(both) == sequences(rows) + sequences(alone)
    assert pairs(both) == pairs(rows) + pairs(alone)
    assert len(both.concept_names) == len({*rows.concept_names, *alone.concept_names})
    turned = load(byte_level, {"made": made, "rows": rows_dir})
    assert turned.source_names == ["made", "rows"]
    assert sequences(turned) == sequences(alone) + sequences(rows)


def corpus_files(cache: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in cache.rglob("*") if p.is_file()}


def test_a_corpus_is_made_once_per_data_tokenizer_split_and_lengths(
    load, load_records, byte_level, minilm, tmp_path, rows_dir
):
    cache = tmp_path / "cache"
    first = load(byte_level, cache=cache)
    before = corpus_files(cache)
    assert load(byte_level, cache=cache).fingerprint == first.fingerprint
    assert corpus_files(cache) == before, "read, not made again"
    byte_level("padded and cut for another purpose", padding="max_length", truncation=True, max_length=9)
    assert load(byte_level, cache=cache).fingerprint == first.fingerprint
    others = [
        load(minilm, cache=cache),
        load(byte_level, window=64, cache=cache),
        load(byte_level, concept_length=16, cache=cache),
        load(byte_level, split="validation", cache=cache),
        load(byte_level, {"other name": rows_dir}, cache=cache),
        load_records(byte_level, marked("the [Tiber|river]"), cache=cache),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 7
    assert {path: stat for path, stat in corpus_files(cache).items() if path in before} == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [("tokens_T", "cut"), ("pair_offsets_W1", "removed"), ("concept_tokens_U", "cut"), ("corpus.json", "cut")],
)
def test_a_damaged_cache_is_named_and_can_be_made_again(load_records, load, byte_level, tmp_path, name, damage):
    made, cache = {"made": tmp_path / "made"}, tmp_path / "cache"
    whole = sequences(load_records(byte_level, marked("the [Tiber|river] at [Rome|city]"), cache=cache))
    [path] = cache.rglob(name)
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with pytest.raises(NunerError, match=re.escape(f"{path} is missing or incomplete: delete the folder")):
        load(byte_level, made, cache=cache)
    shutil.rmtree(path.parent)
    assert sequences(load(byte_level, made, cache=cache)) == whole


def test_a_cache_that_cannot_be_written_is_named(load, byte_level, tmp_path):
    cache = tmp_path / "cache"
    cache.write_text("a file")
    with pytest.raises(NunerError, match=re.escape(f"{cache / 'corpus'}") + ".*cannot be written"):
        load(byte_level, cache=cache)


RACE = """
import os, sys
from pathlib import Path
import tensorflow_datasets, transformers  # before the race, which would otherwise be one of imports
from absl import logging
from nuner_jax.data.corpus import load_corpus
from nuner_jax.pretrained import load_tokenizer

data, tokenizer, cache = map(Path, sys.argv[1:])
logging.set_verbosity(logging.INFO)
tokenizer = load_tokenizer(tokenizer)
wait, start = os.pipe()
for _ in range(2):
    if os.fork() == 0:
        os.close(start)
        os.read(wait, 1)
        corpus = load_corpus({"rows": data}, "train", tokenizer, window=64, concept_length=32, cache_dir=cache)
        os.write(1, f"{corpus.fingerprint} {corpus.tokens_T.size} {corpus.tokens_T.sum()}\\n".encode())
        os._exit(0)
os.close(start)
sys.exit(max(os.wait()[1] for _ in range(2)))
"""


def test_processes_that_race_make_one_corpus(rows_dir, root, run_python, tmp_path):
    done = run_python("-c", RACE, rows_dir, root / "nuner_jax" / "data" / "sample" / "tokenizer", tmp_path)
    first, second = done.stdout.splitlines()
    assert first == second
    assert done.stderr.count("tokenised the train split of source rows") == 1
    assert [path.name for path in (tmp_path / "corpus").iterdir() if path.is_dir()] == [f"train-{first[:16]}"]
