"""Texts come from every kind of source and are cut into units; bad sources are named, and units left out counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_annotate_select import numbered, run, texts, write_lines

from nuner_jax.annotate.selection import duplicates
from nuner_jax.annotate.selection.filters import paragraphs, unit_splitter
from nuner_jax.annotate.selection.select import read_units
from nuner_jax.annotate.units import Unit
from nuner_jax.annotate.workdir import SELECTION_FILE
from nuner_jax.data.builder import build
from nuner_jax.data.records import Record
from nuner_jax.errors import NunerError

LONG, SHORT = "Dr. Grey met the mayor of Rome in May.", "They spoke about the old harbour wall."
DOCUMENTS = [f"{LONG} {SHORT}", "The museum opens on Monday at ten."]
SENTENCES = {LONG, SHORT, DOCUMENTS[1]}


def encoded(kind: str) -> bytes:
    """`DOCUMENTS` in a kind of file, in the column or under the key `body`."""
    rows = [{"n": at, "body": text} for at, text in enumerate(DOCUMENTS)]
    if kind == "parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    out = io.StringIO()
    if kind == "csv":
        writer = csv.DictWriter(out, ["n", "body"])
        writer.writeheader()
        writer.writerows(rows)
    elif kind == "array":
        json.dump(rows, out)
    else:
        out.writelines(f"{json.dumps(row) if kind == 'jsonl' else row['body']}\n" for row in rows)
    return out.getvalue().encode()


# --- Sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [
        ("a.txt", "text", 1),
        ("a", "text", 1),
        ("a.jsonl", "jsonl", 1),
        ("a", "jsonl", 1),
        ("a.json", "array", 1),
        ("a.csv", "csv", 2),
        ("a.parquet", "parquet", 1),
    ],
)
def test_every_kind_of_file_gives_the_same_units(tmp_path, name, kind, first, packed):
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(encoded(kind)) if packed else encoded(kind))
    units = list(read_units(run(tmp_path / "out", path, field="body").path))
    assert {unit.text for unit in units} == SENTENCES
    assert {unit.source for unit in units} == {f"{path.name}:{first}", f"{path.name}:{first + 1}"}
    assert all(unit == Unit.of(unit.text, unit.source) for unit in units)


def test_of_parquet_only_the_wanted_column_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    image = pyarrow.array([b"\xff" * 50_000] * len(DOCUMENTS))
    table = pyarrow.table({"image": image, "body": DOCUMENTS})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    at = path.read_bytes().index(b"\xff" * 50_000)
    with open(path, "r+b") as file:  # the pages of the other column are destroyed, and nobody notices
        file.seek(4)
        file.write(b"\0" * at)
    assert set(texts(tmp_path / "out", path, field="body")) == SENTENCES
    with pytest.raises(NunerError, match=r"a\.parquet: corrupt parquet"):
        run(tmp_path / "out", path, field="image")


def test_a_glob_is_all_its_files_and_the_sample_is_its_recorded_texts(tmp_path):
    for at in range(3):
        write_lines(tmp_path / f"part{at}.txt", numbered(1, at))
    assert set(texts(tmp_path / "a", tmp_path / "part*.txt")) == set(numbered(3))
    sample = run(tmp_path / "b", "sample", unit="row", field="another", min_chars=1, min_words=0, script="")
    assert sample.counts["texts"] == sample.counts["units"] > 1000


def test_no_more_documents_are_read_than_are_wanted_of_each_path(tmp_path):
    for at in range(2):
        write_lines(tmp_path / f"{at}.txt", numbered(9, 9 * at))
    made = run(tmp_path / "out", tmp_path / "0.txt", tmp_path / "1.txt", documents=4)
    assert {unit.text for unit in read_units(made.path)} == set(numbered(4)) | set(numbered(4, 9))


def test_a_tfds_data_set_is_read_from_its_folder_or_by_name_without_tensorflow(tmp_path, run_python):
    build([Record(text) for text in numbered(40)], tmp_path / "set", validation_fraction=0.2)
    everything = texts(tmp_path / "a", f"tfds:{tmp_path / 'set'}:train+validation")
    assert sorted(everything) == sorted(numbered(40))
    train = texts(tmp_path / "b", f"tfds:{tmp_path / 'set'}")
    assert 0 < len(train) < 40
    code = (
        "import pathlib, sys; from nuner_jax.annotate.selection.select import select;"
        "from nuner_jax.config import annotate;"
        "config = annotate(); config.source.paths = ('tfds:nuner_records:1.0.0:train[:5]',);"
        f"made = select(config, pathlib.Path({str(tmp_path / 'c')!r}), print);"
        "assert made.counts['selected'] == 5, made; assert 'tensorflow' not in sys.modules"
    )
    run_python("-c", code, env={"TFDS_DATA_DIR": str(tmp_path / "set")})
    with pytest.raises(NunerError, match=r"has no split 'oops'; it has: train, validation$"):
        run(tmp_path / "d", f"tfds:{tmp_path / 'set'}:oops")
    with pytest.raises(NunerError, match=r"has no 'body' \(config.source.field\); its keys are: 'entities', 'text'$"):
        run(tmp_path / "d", f"tfds:{tmp_path / 'set'}", field="body")
    shard = next(tmp_path.glob("set/*/*/*train*"))
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(NunerError, match=r"set: cannot be read after row 0 \(RuntimeError: Corrupted"):
        run(tmp_path / "d", f"tfds:{tmp_path / 'set'}")


def test_a_hugging_face_data_set_is_streamed(tmp_path):
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", [json.dumps({"n": 1, "body": text}) for text in numbered(5)])
    assert sorted(texts(tmp_path / "a", f"hf:{tmp_path / 'set'}", field="body")) == numbered(5)
    with pytest.raises(NunerError, match=r"set:1: has no 'text' \(config.source.field\); its keys are: 'n', 'body'$"):
        run(tmp_path / "b", f"hf:{tmp_path / 'set'}")
    with pytest.raises(NunerError, match=r"set::oops: cannot be opened \(ValueError: Bad split: oops"):
        run(tmp_path / "b", f"hf:{tmp_path / 'set'}::oops")
    with pytest.raises(NunerError, match=r"^hf:org/none: cannot be opened \(.*check the name.*and the network$"):
        run(tmp_path / "b", "hf:org/none")


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "{path}: no such file"),
        ("a*.txt", None, "{path}: no file matches"),
        ("a.png", PNG, "{path}:1: not UTF-8 (byte 0x89)"),
        ("a.bin", b"ab\nc\0d\n", "{path}:2: a binary file (it has a NUL byte), or text in UTF-16"),
        ("a.csv", b"text\n\0\n", "{path}:2: a binary file"),
        ("a.jsonl", "no".encode("utf-16-le"), "{path}:1: a binary file"),
        ("a.txt", b"good\ncaf\xe9\n", "{path}:2: not UTF-8 (byte 0xe9)"),
        ("a.txt.gz", gzip.compress(b"good\n" * 99, mtime=0)[:-9], "{path}:"),
        ("a.txt.gz", b"plain", "{path}: named .gz, but it is not a gzip file"),
        ("a.parquet", b"PAR1", "{path}: corrupt parquet after row 0"),
        ("a.json", b'[{"text": ', "{path}:1: the JSON array is truncated or invalid"),
        ("a.jsonl", b'{"body": 1, "n": 2}', "{path}:1: has no 'text' (config.source.field); its keys are: 'body', 'n'"),
        ("a.txt", b" \n\n\t\n", "{path}: holds no text"),
        ("a.csv", b"text\n", "{path}: holds no text"),
        (
            "a.jsonl",
            b"oops\n[]\n",
            "{path}: holds no text; malformed rows: invalid_json 1 (a.jsonl:1); not_an_object 1",
        ),
        ("a.txt", b"ab\n" * 3, "{path}: no unit is left (too_short 3); see config.source"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NunerError) as raised:
        run(tmp_path / "out", path)
    assert str(raised.value).startswith(message.format(path=path))
    assert not (tmp_path / "out").exists()


def test_a_folder_and_bad_names_are_refused(tmp_path):
    for entry, message in {
        str(tmp_path): f"{tmp_path}: is a folder; name its files, such as {tmp_path}/*.jsonl.gz",
        "tfds:": "config.source.paths: tfds:: a TFDS data set is tfds:NAME_OR_FOLDER[:SPLIT]",
        "hf:": "config.source.paths: hf:: a hub data set is hf:ORG/NAME[:CONFIG[:SPLIT]]",
        f"tfds:{tmp_path}": f"tfds:{tmp_path}: holds no data set of TFDS",
        f"tfds:{tmp_path}/none": f"tfds:{tmp_path}/none: no such folder",
    }.items():
        with pytest.raises(NunerError) as raised:
            run(tmp_path / "out", entry)
        assert str(raised.value) == message
    with pytest.raises(NunerError, match="has no prepared data set 'c4/en' in .*`tfds build c4/en --file_format=array"):
        run(tmp_path / "out", "tfds:c4/en:validation")


def test_malformed_rows_are_counted_with_their_places(tmp_path):
    bad = ["{", '{"body": "no text"}', '{"text": ["a", "list"]}', '{"text": "half \\ud83d of it"}', "{}"]
    rows = [json.dumps({"text": text}) for text in DOCUMENTS]
    path = write_lines(tmp_path / "a.jsonl", [*rows, *bad, '{"text": null}'])
    said: list[str] = []
    made = run(tmp_path / "out", path, said=said)
    assert (made.counts["texts"], made.counts["malformed"], made.counts["units"]) == (3, 5, 3)
    assert json.loads((tmp_path / "out" / SELECTION_FILE).read_text())["malformed"] == {
        "missing_field": {"count": 2, "first": ["a.jsonl:4", "a.jsonl:7"]},
        "invalid_json": {"count": 1, "first": ["a.jsonl:3"]},
        "not_a_string": {"count": 1, "first": ["a.jsonl:5"]},
        "lone_surrogate": {"count": 1, "first": ["a.jsonl:6"]},
    }
    assert "missing_field 2 (a.jsonl:4, a.jsonl:7)" in said[-1]


# --- Units and filters -------------------------------------------------------------------------

WRAPPED = ["A first passage that is", "wrapped at some width.", " ", "", "And a second  one\tafter it."]


def test_the_unit_is_a_sentence_a_passage_or_a_row(tmp_path):
    text = "Mr. Hill left town. \tHe  came\u00a0back: «Why?»\nA second paragraph stands here."
    row = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": f" {text}\n"})])
    first, second = text.split("\n")
    settings = {"min_words": 1, "script": ""}
    assert set(texts(tmp_path / "1", row, unit="row", **settings)) == {text}
    assert set(texts(tmp_path / "2", row, unit="passage", **settings)) == {first, second}
    expected = {"Mr. Hill left town.", "He  came\u00a0back: «Why?»", second}
    assert set(texts(tmp_path / "3", row, min_chars=1, **settings)) == expected


def test_passages_of_a_text_file_are_divided_by_blank_lines(tmp_path):
    path = write_lines(tmp_path / "a.txt", [*WRAPPED, "", *["a line without end"] * 1000])
    made = run(tmp_path / "out", path, unit="passage", max_chars=60)
    expected = {(f"{WRAPPED[0]} {WRAPPED[1]}", "a.txt:1"), (WRAPPED[4], "a.txt:5")}
    assert {(unit.text, unit.source) for unit in read_units(made.path)} == expected
    assert made.counts["too_long"] == 1


def test_paragraphs_are_lines_unless_blank_lines_divide_the_text():
    assert paragraphs("a\nb\n") == ["a", "b", ""]
    assert paragraphs("a\nb\n \t\n\nc\n") == ["a\nb", "c"]
    assert paragraphs("a") == ["a"]


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)) | st.sampled_from(" .\n\r?!"), max_size=80))
def test_sentences_leave_out_nothing_but_space(text):
    units = unit_splitter("sentence", "en")(text)
    assert "".join("".join(units).split()) == "".join(text.split())
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    assert all(unit in lines and unit == unit.strip() != "" for unit in units)


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("unit", ["sentence", "passage", "row"])
def test_line_ends_of_windows_and_old_macs_are_line_ends(tmp_path, unit, end):
    text = "A first passage that is\nwrapped at some width.\n\nAnd a second one\nbehind it."
    made = []
    for name, content in (("a", text), ("b", text.replace("\n", end))):
        path = write_lines(tmp_path / f"{name}.jsonl", [json.dumps({"text": content})])
        made.append(set(texts(tmp_path / name, path, unit=unit)))
    assert made[0] == made[1] and "\n" in "".join(made[0])
    (tmp_path / "c.txt").write_bytes(f"{LONG}{end}{SHORT}{end}".encode())
    assert set(texts(tmp_path / "c", tmp_path / "c.txt")) == {LONG, SHORT}


def test_a_very_long_document_is_cut_into_its_sentences_and_an_empty_one_has_none(tmp_path):
    document = " ".join(numbered(12_000))
    assert len(document) > 900_000
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": one}) for one in (document, "", " \n ", document)])
    counts = run(tmp_path / "out", path, duplicates="exact").counts
    assert (counts["texts"], counts["units"], counts["selected"]) == (4, 24_000, 12_000)
    assert (
        run(
            tmp_path / "row",
            write_lines(path, [json.dumps({"text": document}), json.dumps({"text": LONG})]),
            unit="row",
        ).counts["too_long"]
        == 1
    )


@pytest.mark.parametrize(
    ("text", "reason", "source"),
    [
        ("a\x07 bell rings for all of us here", "control_characters", {}),
        ("tab\tand newline\nare fine in a row", None, {}),
        ("nine char", "too_short", {"min_chars": 10, "min_words": 1}),
        ("ten chars!", None, {"min_chars": 10, "min_words": 1}),
        ("exactly-20-characters", "too_long", {"max_chars": 20, "min_words": 1}),
        ("only three words-here", "few_words", {}),
        ("Пётр пришёл домой очень поздно", "other_script", {}),
        ("Пётр пришёл домой очень поздно", None, {"script": "Cyrillic"}),
        ("Peter came home very late today", "other_script", {"script": "Cyrillic"}),
        ("Peter came home very late today", None, {"script": ""}),
        ("Zoë Łukasz naïve façade ｆｕｌｌ Ångström", None, {}),
        ("東京で「カタカナ」を読んでいますよね、時々は。", None, {"script": "Japanese", "min_words": 1}),
        ("東京で「カタカナ」を読んでいますよね、時々は。", "other_script", {"script": "Han", "min_words": 1}),
        ("half лати half кири abcd абвг", "other_script", {}),
        ("half лати half кири abcd абвг", None, {"script_share": 0.5}),
        ("12 34 56 78 90 12 34 56 78", "other_script", {}),
    ],
)
def test_a_unit_is_left_out_for_one_reason(tmp_path, text, reason, source):
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text}), json.dumps({"text": LONG})])
    source = {"unit": "row", **source}
    if reason is None:
        assert text in texts(tmp_path / "out", path, **source)
        return
    with pytest.raises(NunerError, match=rf"no unit is left \({reason} 1\)"):
        run(tmp_path / "out", write_lines(path, [json.dumps({"text": text})]), **source)


def test_an_unknown_script_is_refused_with_the_known_ones_before_anything_is_read(tmp_path):
    with pytest.raises(NunerError, match="^config.source.script = 'Roman' is unknown; known are: Arabic, Armenian,"):
        run(tmp_path / "out", tmp_path / "none.txt", script="Roman")


@pytest.mark.parametrize("language", ["English", "EN", "e", "", "en\n", "../en"])
def test_what_is_no_code_of_a_language_is_refused(tmp_path, language):
    with pytest.raises(NunerError, match=r"^config\.source\.language = '.*': a code of ISO 639 in lower case, such as"):
        run(tmp_path / "out", tmp_path / "none.txt", language=language)


@pytest.mark.parametrize("language", ["de", "yue", "zh-hans"])
def test_codes_of_languages_are_taken(tmp_path, language):
    assert run(tmp_path / "out", write_lines(tmp_path / "a.txt", DOCUMENTS), language=language).counts["selected"] >= 2


@pytest.mark.parametrize("package", ["sentencex", "datasketch", "datasets"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    duplicates._banding.cache_clear(), duplicates._empty_sketch.cache_clear()
    entry = "hf:org/set" if package == "datasets" else write_lines(tmp_path / "a.txt", DOCUMENTS)
    with pytest.raises(NunerError, match=rf"package {package}; install the extra: pip install 'nuner_jax\[annotate\]'"):
        run(tmp_path / "out", entry)
