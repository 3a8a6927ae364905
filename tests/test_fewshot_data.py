"""Data sets with stated splits: what is read from which format, what is repaired, and what is refused."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from ml_collections import ConfigDict

from nuner_jax.data.importers.conll import read_conll
from nuner_jax.data.ner.datasets import load, report_table
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError

# One sentence in every scheme: two mentions of one type side by side, a longer one, and nothing.
WORDS = ["Anna", "Bo", "saw", "New", "York", "City", "."]
SCHEMES = {
    "IOB1": ["I-per", "B-per", "O", "I-loc", "I-loc", "I-loc", "O"],
    "IOB2": ["B-per", "B-per", "O", "B-loc", "I-loc", "I-loc", "O"],
    "BIOES": ["S-per", "S-per", "O", "B-loc", "I-loc", "E-loc", "O"],
    "BILOU": ["U-per", "U-per", "O", "B-loc", "I-loc", "L-loc", "O"],
    "IO": ["per", "per", "O", "loc", "loc", "loc", "O"],
}
MENTIONS = [("Anna", "per"), ("Bo", "per"), ("New York City", "loc")]
OTHER = "Rome\tB-loc\nis\tO\nold\tO\n"


def conll(words, tags):
    return "".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)) + "\n"


VALID = conll(WORDS, SCHEMES["IOB2"])


def mentions(record):
    return [(record.text[one.start : one.end], one.concept) for one in record.entities]


@pytest.fixture
def folder(tmp_path):
    """Writes the files of a set, by default a train and a test file; gives the keys that load it."""

    def write(train=OTHER, test=VALID, **keys):
        for split, content in (("train", train), ("test", test)):
            content = content if isinstance(content, bytes) else content.encode()
            (tmp_path / f"{split}.txt").write_bytes(content)
        return {"name": "mine", "path": str(tmp_path), **keys}

    return write


# --- CoNLL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_is_told_from_the_tags_and_shown(folder, scheme):
    loaded = load(folder(test=conll(WORDS, SCHEMES[scheme])))
    # IO cannot say where one mention ends and the next of its type begins.
    assert mentions(loaded.test[0]) == (MENTIONS if scheme != "IO" else [("Anna Bo", "per"), MENTIONS[2]])
    assert loaded.report["files"]["test"]["schemes"] == [scheme]
    assert loaded.report["files"]["test"]["repaired_tags"] == {}
    assert f"1 sentences, 0 without entity; {len(mentions(loaded.test[0]))} mentions of 2 types; conll, {scheme}" in (
        report_table(loaded.report)
    )


@pytest.mark.parametrize(
    ("tags", "scheme", "line"),
    [
        ("B-per I-loc O B-loc I-loc I-loc O", "IOB2", 2),
        ("S-per S-per O B-loc I-loc O O", "BIOES", 6),
        ("S-per S-per O O O O B-loc", "BIOES", 7),  # never ended
        ("U-per O O I-loc I-loc L-loc O", "BILOU", 4),
    ],
)
def test_tags_that_are_not_valid_are_repaired_with_a_count_and_their_place(folder, tags, scheme, line):
    valid = conll(WORDS, SCHEMES[scheme])
    keys = folder(test=conll(WORDS, tags.split()) + valid * 3)
    report = load(keys).report
    assert report["files"]["test"]["schemes"] == [scheme]
    repaired = report["files"]["test"]["repaired_tags"]
    assert repaired == {"invalid_sequence": {"count": 1, "first": [f"test.txt:{line}"]}}
    assert f"test: tags repaired: invalid_sequence 1 (test.txt:{line})" in report_table(report)
    with pytest.raises(NunerError, match=rf'test.txt.*test.txt:{line}.*config.sets.mine.invalid_tags = "repair"'):
        load(keys | {"invalid_tags": "refuse"})


def test_words_and_tags_may_stand_in_any_column(folder):
    rows = "".join(f"{tag} {at} {word} x\n" for at, (word, tag) in enumerate(zip(WORDS, SCHEMES["IOB2"], strict=True)))
    loaded = load(
        folder(train=f"## doc\n\n{rows}", test=rows.replace("saw", "met"), word_column=2, tag_column=0, comment="##")
    )
    assert mentions(loaded.train[0]) == mentions(loaded.test[0]) == MENTIONS
    with pytest.raises(NunerError, match=r"train.txt:3: the line has 4 columns, and so none of number tag_column = 4"):
        load(folder(train=f"## doc\n\n{rows}", test=rows, comment="##", tag_column=4))
    with pytest.raises(NunerError, match="word_column and tag_column are both column 0"):
        load(folder(tag_column=0))


def test_the_default_columns_read_as_the_importer_does(folder, tmp_path):
    rng = random.Random(0)
    tags = ["O", "B-per", "I-per", "B-body_part", "I-body_part"]
    text = "".join(conll(WORDS, rng.choices(tags, k=len(WORDS))) for _ in range(50))
    loaded = load(folder(test=text))
    assert list(loaded.test) == [Record(row.text, row.entities) for _, row in read_conll(tmp_path / "test.txt")]
    assert loaded.types == ("body part", "loc", "per")


@pytest.mark.parametrize(
    ("sentence", "complaint"),
    [
        ("Rome\tB-loc\nis\n", "ragged_line 1 .test.txt:10"),
        ("Rome\tB-loc\nis\t\n", "empty_tag 1 .test.txt:10"),
        ("Rome\tB-loc\n\tO\n", "empty_word 1 .test.txt:10"),
        ("Rome\tM-loc\n", "tag_without_prefix 1 .test.txt:9"),
    ],
)
def test_malformed_lines_are_named_and_refused_unless_they_may_be_left_out(folder, sentence, complaint):
    keys = folder(test=conll(WORDS, SCHEMES["IOB2"]) + sentence)
    with pytest.raises(NunerError, match=complaint):
        load(keys)
    left = load(keys | {"malformed": "skip"})
    assert len(left.test) == 1
    assert "test: malformed rows, left out" in report_table(left.report)


def test_other_bad_files_are_refused_by_name(folder):
    with pytest.raises(NunerError, match="test.txt:2: not UTF-8"):
        load(folder(test=b"a\tO\nM\xfcnchen\tB-loc\n"))
    with pytest.raises(NunerError, match="test.txt:1: CoNLL needs a word and a tag"):
        load(folder(test="Rome\n"))
    with pytest.raises(NunerError, match="'.PERSON.' is no IOB tag; CoNLL-2012"):
        load(folder(test="Anna\t(PERSON)\n"))
    with pytest.raises(NunerError, match="the test split has no sentence"):
        load(folder(test="\n\n"))
    with pytest.raises(NunerError, match="no sentence of the test split has an entity"):
        load(folder(test="nothing\tO\n"))


# --- Rows -------------------------------------------------------------------------------------


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_with_offsets_pairs_and_words(folder, tmp_path):
    spans = {"text": "Go to Rome.", "entities": [{"start": 6, "end": 10, "concept": "city"}]}
    pairs = {"text": "Rome to Oslo", "entities": [["Rome", "origin"], ["Oslo", "goal"]]}
    loaded = load(folder(train=lines(spans, {"text": " ", "entities": []}), test=lines(pairs)))
    assert mentions(loaded.train[0]) + mentions(loaded.test[0]) == [
        ("Rome", "city"),
        ("Rome", "origin"),
        ("Oslo", "goal"),
    ]
    assert not loaded.split_on_space
    assert loaded.report["files"]["train"]["empty_sentences"] == 1
    words = {"tokenized_text": WORDS, "ner": [[3, 5, "loc"]]}
    with pytest.raises(NunerError, match=r"config.sets.mine.words is not set, and the files differ \(gliner, spans\)"):
        load(folder(train=lines(spans), test=lines(words)))
    loaded = load(folder(train=lines(spans), test=lines(words), words="space"))
    assert mentions(loaded.test[0]) == [MENTIONS[2]] and loaded.split_on_space


def test_a_row_that_cannot_be_read_is_named(folder):
    good = {"text": "Go to Rome.", "entities": [["Rome", "city"]]}
    with pytest.raises(NunerError, match=r"rows that are not valid \(spans\): invalid_json 1 \(test.txt:2\)"):
        load(folder(train=lines(good), test=lines(good) + "{oops\n"))
    with pytest.raises(NunerError, match=r"annotations that .* not_in_text_in_order 1 \(test.txt:1\)"):
        load(folder(train=lines(good), test=lines({"text": "Go", "entities": [["Rome", "city"]]})))
    with pytest.raises(NunerError, match="lone_surrogate"):
        load(folder(train=lines(good), test='{"text": "\\ud800 Rome", "entities": [["Rome", "city"]]}\n'))
    with pytest.raises(NunerError, match=r"test.txt:1: a row with the keys 'input', 'output' does not say where"):
        load(folder(train=lines(good), test=lines({"input": "Rome", "output": ["Rome <> city"]})))


NUMBERS = {"O": 0, "B-per": 1, "B-loc": 2, "I-loc": 3}


def test_numbered_tags_mean_what_the_labels_say(folder, tmp_path):
    row = {"tokens": WORDS, "tags": [NUMBERS[tag] for tag in SCHEMES["IOB2"]]}
    more = {"tokens": ["Rome"], "tags": [2]}
    keys = folder(train=lines(more), test=lines(row, more), tag_key="tags")
    (tmp_path / "label.json").write_text(json.dumps(NUMBERS))
    for labels in (tuple(NUMBERS), str(tmp_path / "label.json")):
        loaded = load(keys | {"labels": labels})
        assert mentions(loaded.test[0]) == MENTIONS
        assert loaded.report["files"]["test"]["formats"] == ["tokens"]
    with pytest.raises(NunerError, match="train.txt:1: its tags are numbers; say what they mean by `labels`"):
        load(keys)
    with pytest.raises(NunerError, match=r"unknown_tag_number 1 \(test.txt:1\)"):
        load(keys | {"labels": ("O", "B-per", "B-loc")})
    with pytest.raises(NunerError, match=r"train.txt:1: the row has no 'ner_tags' but 'tokens', 'tags'"):
        load(keys | {"tag_key": "ner_tags"})
    with pytest.raises(NunerError, match=r"tokens_and_tags_differ 1 \(test.txt:1\)"):
        load(
            folder(train=lines(more), test=lines({"tokens": WORDS, "tags": [0]}), tag_key="tags", labels=tuple(NUMBERS))
        )


def test_a_parquet_file_of_the_hub_holds_the_names_of_its_tags(tmp_path):
    feature = {"feature": {"names": list(NUMBERS), "_type": "ClassLabel"}, "_type": "Sequence"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"ner_tags": feature}}})}
    for split, words in (("train", WORDS), ("test", [*WORDS[:-1], "!"])):
        table = pyarrow.table({"tokens": [words], "ner_tags": [[NUMBERS[tag] for tag in SCHEMES["IOB2"]]]})
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{split}.parquet")
    assert mentions(load({"name": "mine", "path": str(tmp_path)}).test[0]) == MENTIONS


# --- Splits -----------------------------------------------------------------------------------


def test_a_missing_test_split_is_an_error_and_never_the_train_split_again(folder, tmp_path):
    folder()
    train = str(tmp_path / "train.txt")
    with pytest.raises(NunerError, match=r"config.sets.mine.test is not set: .*a share of the train file"):
        load({"name": "mine", "train": train})
    with pytest.raises(NunerError, match=r"config.sets.mine.test: .*train.txt is the train split too"):
        load({"name": "mine", "train": train, "test": str(tmp_path / "." / "train.txt")})
    with pytest.raises(NunerError, match=r"config.sets.mine.dev: .*test.txt is the test split too"):
        load({"name": "mine", "path": str(tmp_path), "dev": str(tmp_path / "test.txt")})
    with pytest.raises(NunerError, match="every sentence of it is in the train split too"):
        load(folder(test=OTHER))
    (tmp_path / "test.txt").unlink()
    with pytest.raises(NunerError, match=r"config.sets.mine.test is not set"):
        load({"name": "mine", "path": str(tmp_path)})
    with pytest.raises(NunerError, match=r"gone.txt: no such file"):
        load({"name": "mine", "train": train, "test": str(tmp_path / "gone.txt")})


def test_a_file_is_shared_out_by_the_hash_of_each_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"Trip {at % 300} to Rome", "entities": [["Rome", "city"]]} for at in range(400)]
    path.write_text(lines(*rows))
    loaded = load({"name": "mine", "train": str(path), "test": 0.5, "dev": 0.1})
    texts = [{record.text for record in part} for part in (loaded.train, loaded.test, loaded.dev)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 300
    assert len(loaded.train) + len(loaded.test) + len(loaded.dev) == 400
    assert 120 < len(texts[1]) < 180 and 10 < len(texts[2]) < 50
    assert "50% of the train file, by hash" in report_table(loaded.report)
    path.write_text(lines(*reversed(rows)))  # where a text stands does not matter
    assert {record.text for record in load({"name": "mine", "train": str(path), "test": 0.5}).test} == texts[1]
    for shares in ({"test": 1.0}, {"test": 0.6, "dev": 0.4}, {"test": 0.5, "dev": -0.1}):
        with pytest.raises(NunerError, match="shares are above 0, and below 1 together"):
            load({"name": "mine", "train": str(path), **shares})


def test_overlaps_between_splits_and_unknown_types_are_counted_and_named(folder):
    shared = conll(WORDS, SCHEMES["IOB2"])
    loaded = load(folder(train=OTHER + "\n" + shared * 2 + "a\tB-old\n", test=shared + "oak\tB-tree\n\nthe\tO\n"))
    assert loaded.types == ("loc", "old", "per", "tree")
    report = loaded.report
    assert report["duplicate_sentences"]["of test that are in train"] == 1
    assert report["duplicate_sentences"]["within train"] == 1
    assert report["types_only_in_test"] == ["tree"] and report["types_only_in_train"] == ["old"]
    assert report["splits"]["test"]["without_entity"] == 1 and len(loaded.test) == 3
    shown = report_table(report)
    assert "types in test that train lacks, which count with F1 0: tree" in shown
    assert "duplicate sentences of test that are in train: 1" in shown


def test_a_type_of_the_dev_split_alone_is_a_type_and_named(folder, tmp_path):
    keys = folder()
    (tmp_path / "dev.txt").write_text("oak\tB-tree\n")
    loaded = load(keys)
    assert loaded.types == ("loc", "per", "tree")
    assert "types in dev alone: tree" in report_table(loaded.report)


def test_mentions_that_words_cannot_express_are_counted(folder):
    nested = {"text": "Oslo University", "entities": [["Oslo University", "org"]]}
    nested["entities"] = [{"start": 0, "end": 15, "concept": "org"}, {"start": 0, "end": 4, "concept": "city"}]
    within = {"text": "preRome", "entities": [{"start": 3, "end": 7, "concept": "city"}]}
    report = load(folder(train=lines(nested), test=lines(within))).report
    assert report["files"]["train"]["overlapping_mentions"] == 1
    assert report["splits"]["test"]["mentions_within_words"] == 1
    shown = report_table(report)
    assert "train: mentions that overlap a longer one, left out: 1" in shown
    assert "test: mentions that begin or end within a word: 1" in shown


def test_the_fingerprint_follows_the_records_and_nothing_else(folder):
    first = load(folder()).fingerprint
    assert load(folder(name="another", test=conll(WORDS, SCHEMES["BIOES"]))).fingerprint == first
    assert load(folder(test=conll(WORDS, SCHEMES["IO"]))).fingerprint != first
    assert load(folder(words="text")).fingerprint != first


# --- Sets by name -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "types", "mentions_count"), [("travel_desk", 9, 1190), ("lab_notes", 8, 1471)])
def test_the_embedded_sets_load_by_name(name, types, mentions_count):
    loaded = load({"name": name})
    counts = Counter(one.concept for part in (loaded.train, loaded.test) for record in part for one in record.entities)
    assert len(loaded.train) + len(loaded.test) == 400 and not loaded.dev
    assert len(loaded.types) == types and counts.total() == mentions_count
    assert not loaded.report["types_only_in_test"]
    assert not any(loaded.report["duplicate_sentences"].values())
    assert json.loads(json.dumps(loaded.report)) == loaded.report
    other = load(ConfigDict({"name": "desk", "set": name, "test": 0.25}))
    assert len(other.test) < len(loaded.test) and other.name == "desk"


def test_a_public_set_is_read_as_it_is_distributed(tmp_path):
    swapped = "".join(f"{tag}\t{word}\n" for word, tag in zip(WORDS, SCHEMES["IOB2"], strict=True))
    (tmp_path / "engtrain.bio").write_text("B-loc\tRome\n")
    (tmp_path / "engtest.bio").write_text(swapped)
    assert mentions(load({"name": "mit_movie", "path": str(tmp_path)}).test[0]) == MENTIONS
    genia = "###MEDLINE:1\n\n" + conll(WORDS, SCHEMES["IOB2"])
    (tmp_path / "Genia4ERtask2.iob2").write_text(genia)
    (tmp_path / "Genia4EReval2.iob2").write_text(genia.replace("saw", "met"))
    loaded = load({"name": "genes", "set": "bionlp2004", "path": str(tmp_path)})
    assert len(loaded.train) == 1 and mentions(loaded.test[0]) == MENTIONS


def test_a_set_that_is_not_there_says_where_it_is(tmp_path, folder):
    with pytest.raises(NunerError, match=r"config.sets.mit_movie.path is not set: .*groups.csail.mit.edu"):
        load({"name": "mit_movie"})
    with pytest.raises(NunerError, match=r"no train split; looked for eng.train, train.txt"):
        load({"name": "conll2003", "path": str(tmp_path)})
    with pytest.raises(NunerError, match=r"config.sets.mine.set = 'wnut': .*did you mean wnut17"):
        load({"name": "mine", "set": "wnut"})
    with pytest.raises(NunerError, match=r"config.sets.zzz.train is not set, nor is its path.*known are: travel_desk"):
        load({"name": "zzz"})
    ontonotes = folder(name="ontonotes5")
    with pytest.raises(NunerError, match=r"config.sets.ontonotes5.version is not set; .*LDC2013T19"):
        load(ontonotes)
    assert report_table(load(ontonotes | {"version": "v12"}).report).startswith("ontonotes5 (v12)")
    (tmp_path / "valid.conll").write_text(OTHER)
    (tmp_path / "dev.txt").write_text(OTHER)
    with pytest.raises(NunerError, match=r"several files may be its dev split \(dev.txt, valid.conll\)"):
        load(folder())
    given = folder(dev=str(tmp_path / "valid.conll"))
    assert load(given).report["files"]["dev"]["paths"] == [given["dev"]]
    (tmp_path / "train.conll").write_text(OTHER)
    with pytest.raises(NunerError, match=r"several files may be its train split .* name one as config.sets.mine.train"):
        load(given)
    given["train"] = str(tmp_path / "train.conll")
    files = load(given).report["files"]
    assert [files[split]["paths"] for split in ("train", "test")] == [[given["train"]], [str(tmp_path / "test.txt")]]


def test_sets_of_the_hub_come_from_its_cache_without_a_network(tmp_path, run_python):
    """Two layouts, laid out as the hub's client does: TNER's files, and the hub's own conversion to parquet."""
    tner = hub_cache(tmp_path, "tner/bionlp2004", "main")
    for part in ("train", "valid", "test"):
        row = {"tokens": [*WORDS, part], "tags": [*(NUMBERS[tag] for tag in SCHEMES["IOB2"]), 0]}
        (tner / "dataset").mkdir(exist_ok=True)
        (tner / "dataset" / f"{part}.json").write_text(lines(row))
    (tner / "dataset" / "label.json").write_text(json.dumps(NUMBERS))
    few = hub_cache(tmp_path, "DFKI-SLT/few-nerd", "refs/convert/parquet")
    for setting in ("inter", "intra"):
        for part in ("train", "validation", "test"):
            (few / setting / part).mkdir(parents=True)
            table = pyarrow.table({"tokens": [[setting, part]], "fine_ner_tags": [["O", "art-film"]]})
            pyarrow.parquet.write_table(table, few / setting / part / "0000.parquet")
    code = (
        "from nuner_jax.data.ner.datasets import load\n"
        "for name in ('bionlp2004', 'fewnerd_inter'):\n"
        "    one = load({'name': name})\n"
        "    texts = [[record.text for record in part] for part in (one.train, one.test, one.dev)]\n"
        "    print(texts, one.types, one.report['version'])"
    )
    said = run_python("-c", code, env={"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}).stdout
    words = " ".join(WORDS)
    assert said.splitlines() == [
        f"[['{words} train'], ['{words} test'], ['{words} valid']] ('loc', 'per')"
        " as published in tner/bionlp2004, which has cut a dev split from train",
        "[['inter train'], ['inter test'], ['inter validation']] ('art-film',) as published in DFKI-SLT/few-nerd",
    ]


def hub_cache(home: Path, repo: str, revision: str) -> Path:
    """An empty snapshot of a data set in the cache of the hub's client."""
    folder = home / "hub" / f"datasets--{repo.replace('/', '--')}"
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True)
    ref.write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"test_file": "x"}, "config.sets.mine.test_file: no such key; did you mean test"),
        ({"malformed": "ignore"}, "config.sets.mine.malformed = 'ignore': choose one of 'refuse', 'skip'"),
        ({"format": "nuner"}, "config.sets.mine.format = 'nuner': choose one of 'auto', 'conll'"),
        ({"test": True}, "config.sets.mine.test = True: a file, or several, or a share"),
        ({"train": 5}, "config.sets.mine.train = 5: a file, or several$"),
        ({"labels": ("O", 1)}, "config.sets.mine.labels = .* tags, or a file of them"),
        ({"tag_column": "last"}, "config.sets.mine.tag_column = 'last': a column is a whole number"),
    ],
)
def test_unknown_keys_and_values_are_refused(keys, complaint):
    with pytest.raises(NunerError, match=complaint):
        load({"name": "mine", "train": "a", "test": "b", **keys})
