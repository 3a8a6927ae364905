"""The few-shot command: from files to tables; the same samples for all; nothing computed is lost."""

import json
import pathlib
import types

import numpy as np
import pytest
from tiny_fewshot import make_material, write_conll

from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import frozen, run
from nuner_jax.fewshot.results import METRICS, read_rows


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with two random encoders, `one` and `two`, and two data sets, `voyages` and `notes`."""
    return make_material(tmp_path_factory.mktemp("fewshot"))


@pytest.fixture
def config(material):
    config = config_lib.load_file("configs/fewshot.py:x")
    config.encoders = {name: str(material / name) for name in ("one", "two")}
    config.baseline = "two"
    config.sets = {name: {"path": str(material / name)} for name in ("voyages", "notes")}
    config.k, config.seeds = (2, 4), 3
    config.head.steps, config.head.width, config.head.lr = 40, 16, 0.02
    return config


@pytest.fixture
def console():
    lines = []
    return types.SimpleNamespace(say=lambda line="": lines.append(line), progress=lambda *_, **__: None, lines=lines)


def evaluate(config, workdir, console):
    config_lib.check(config, tasks=("fewshot",))
    return run.fewshot(config, workdir, console)


def without_time(rows):
    return sorted(json.dumps({**row, "seconds": 0}, sort_keys=True) for row in rows)


def test_a_run_gives_a_row_for_every_head_and_all_outputs(config, tmp_path, console):
    config.k = (2, 16)
    results = evaluate(config, tmp_path, console)
    rows = results.rows
    assert len(rows) == 2 * 2 * 2 * 3 and not results.missing
    assert results.grid.encoders == ("two", "one")  # the baseline first
    # Eight names of each type: even a random encoder tells those that it has seen, and 16 mentions are most of them.
    for metric in ("token_macro_f1", "entity_f1"):
        mean = {k: np.mean([row[metric] for row in rows if row["k"] == k]) for k in (2, 16)}
        assert mean[16] > mean[2] + 0.1 and mean[16] > 0.5, (metric, mean)
    for row in rows:
        assert all(set(row["per_type"][metric]) == {"city", "person"} for metric in METRICS)
        f1_of_types = [one["f1"] for one in row["per_type"]["token_macro_f1"].values()]
        assert row["token_macro_f1"] == pytest.approx(np.mean(f1_of_types))
    for name in ("results.md", "results.csv", "results.json", "results.html", "token_macro_f1.png", "config.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert "Worst errors: one, k = 16" in (tmp_path / "results.html").read_text()
    printed = "\n".join(console.lines)
    assert "… minus two" in printed and "about 0 s left" in printed


def test_every_encoder_learns_from_the_same_stored_sentences(config, tmp_path, console, material):
    rows = evaluate(config, tmp_path, console).rows
    stored = json.loads((tmp_path / "samples.json").read_text())
    for name in ("voyages", "notes"):
        texts = (material / name / "train.txt").read_text().split("\n\n")
        for k in (2, 4):
            for seed in (0, 1, 2):
                sample = stored[name][str(k)][str(seed)]
                tags = "".join(texts[number] + "\n" for number in sample["ids"])
                assert sample["reached"] == {type: tags.count(f"B-{type}") for type in ("city", "person")}
                assert all(k <= count <= 2 * k for count in sample["reached"].values())
                mine = [row for row in rows if (row["set"], row["k"], row["seed"]) == (name, k, seed)]
                assert [row["sample_hash"] for row in mine] == [sample["hash"]] * 2
                assert [row["sentences"] for row in mine] == [len(sample["ids"])] * 2


def test_a_second_start_computes_only_what_is_missing(config, tmp_path, console, monkeypatch):
    first = evaluate(config, tmp_path, console).rows
    encoded = []
    real = frozen.word_features
    monkeypatch.setattr(
        frozen, "word_features", lambda *a, **k: encoded.append(pathlib.Path(a[0].origin).name) or real(*a, **k)
    )
    assert without_time(evaluate(config, tmp_path, console).rows) == without_time(first)
    assert not encoded
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["encoder"] == "two" or json.loads(line)["seed"] == 1]
    path.write_text("".join(kept) + lines[0][:50])  # killed in the midst of a line
    again = evaluate(config, tmp_path, console)
    assert without_time(again.rows) == without_time(first) == without_time(read_rows(path))
    assert set(encoded) == {"one"}
    config.k, config.seeds = (2, 4, 8), 4
    grown = evaluate(config, tmp_path, console).rows
    assert len(grown) == 2 * 2 * 3 * 4 and set(without_time(first)) <= set(without_time(grown))


def test_the_same_config_gives_the_same_rows_but_for_their_time(config, tmp_path, console):
    config.k, config.seeds = (4,), 2
    first, second = (evaluate(config, tmp_path / name, console).rows for name in ("a", "b"))
    assert without_time(first) == without_time(second)


def test_a_workdir_of_another_task_is_refused_before_anything_is_read(config, tmp_path, console):
    (tmp_path / "config.json").write_text('{"task": "pretrain"}')
    config.encoders["one"] = "nowhere"
    with pytest.raises(NunerError, match="holds a run of the task 'pretrain': choose another one"):
        evaluate(config, tmp_path, console)
    assert (tmp_path / "config.json").read_text() == '{"task": "pretrain"}'


def test_types_that_train_lacks_count_and_are_told(config, tmp_path, console, material):
    (tmp_path / "set").mkdir()
    train, test = ((material / "notes" / f"{split}.txt").read_text() for split in ("train", "test"))
    (tmp_path / "set" / "train.txt").write_text(train)
    (tmp_path / "set" / "test.txt").write_text(test + "\noak\tB-tree\n")
    config.sets = {"notes": {"path": str(tmp_path / "set")}}
    config.k, config.seeds = (4,), 2
    results = evaluate(config, tmp_path / "run", console)
    for row in results.rows:
        f1 = {name: one["f1"] for name, one in row["per_type"]["token_macro_f1"].items()}
        assert f1["tree"] == 0 and row["token_macro_f1"] == pytest.approx((f1["city"] + f1["person"]) / 3)
        assert row["short_types"] == ["tree"]
    told = (tmp_path / "run" / "results.md").read_text()
    assert "notes: types in test that train lacks: tree; no head can learn them, and they count with F1 0" in told


def test_a_query_sample_without_a_mention_is_refused_before_anything_is_computed(
    config, tmp_path, console, monkeypatch
):
    monkeypatch.setattr(frozen, "word_features", lambda *_, **__: pytest.fail("it was computed"))
    (tmp_path / "set").mkdir()
    write_conll(tmp_path / "set" / "train.txt", 60, 0)
    (tmp_path / "set" / "test.txt").write_text("it\tO\n\n" * 300 + "Rome\tB-city\n")
    config.sets = {"rare": {"path": str(tmp_path / "set")}}
    config.eval.max_sentences = 2
    with pytest.raises(
        NunerError, match=r"config.eval.max_sentences = 2: no sentence that was drawn .* of rare has a mention"
    ):
        evaluate(config, tmp_path / "run", console)


def test_a_k_that_draws_nothing_is_refused_before_anything_is_computed(config, tmp_path, console, monkeypatch):
    monkeypatch.setattr(frozen, "word_features", lambda *_, **__: pytest.fail("it was computed"))
    (tmp_path / "set").mkdir()
    for split, words in (("train", "Rome or Lima or Oslo or Turin or Brest"), ("test", "Quito to Accra")):
        tagged = (f"{word}\t{'O' if word.islower() else 'B-city'}\n" for word in words.split())
        (tmp_path / "set" / f"{split}.txt").write_text("".join(tagged) + "\nit\tO\n")
    config.sets = {"lists": {"path": str(tmp_path / "set")}}
    config.k = (2, 4)
    with pytest.raises(NunerError, match=r"k = 2 draws nothing of lists, .* more than 4 mentions .* draws any is 3"):
        evaluate(config, tmp_path / "run", console)


def test_a_workdir_of_other_settings_is_refused(config, tmp_path, console):
    evaluate(config, tmp_path, console)
    config.head.lr = 0.01
    with pytest.raises(NunerError, match="results.jsonl holds results of two on notes with other .* settings"):
        evaluate(config, tmp_path, console)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoders.one": "nowhere"}, "no model 'nowhere'"),
        ({"sets.notes.path": "nowhere"}, r"config.sets.notes.path = nowhere"),
        ({"sets.notes.pth": "x"}, r"config.sets.notes.pth: no such key; did you mean path"),
        ({"sets": {}}, "config.sets is empty"),
        ({"sets": {"notes": "train.txt"}}, "config.sets.notes = 'train.txt'"),
        ({"encoders": {}}, "config.encoders is empty"),
        ({"baseline": "three"}, "config.baseline = 'three': not among config.encoders and config.llms, one, two"),
        ({"k": (4, 0)}, "config.k"),
        ({"k": (4, 4)}, "config.k"),
        ({"k": ()}, "config.k is empty"),
        ({"head.kinds": ("tree",)}, "config.head.kinds: no head 'tree'"),
        ({"rule": "n"}, "config.rule = 'n': choose one of"),
        ({"seeds": 0}, "config.seeds = 0: at least 1"),
        ({"seed": 2**32}, "config.seed = 4294967296: between 0 and"),
        ({"sets.notes.comment": 3}, "config.sets.notes.comment = 3: a text"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(config, tmp_path, console, monkeypatch, change, message):
    monkeypatch.setattr(frozen, "word_features", lambda *_, **__: pytest.fail("it was computed"))
    with config.unlocked():
        config.update_from_flattened_dict({key: value for key, value in change.items() if not isinstance(value, dict)})
        for key, value in change.items():
            if isinstance(value, dict):
                config[key] = value
    with pytest.raises(NunerError, match=message):
        evaluate(config, tmp_path, console)


def test_heads_layers_and_limits_of_the_config_take_effect(config, tmp_path, console, material):
    config.head.kinds, config.layers, config.features = ("linear", "mlp"), "two", "file"
    config.eval.max_sentences, config.k, config.seeds = 15, (500,), 2
    del config.sets["notes"]
    results = evaluate(config, tmp_path, console)
    assert {(row["encoder"], row["head"]) for row in results.rows} == {
        (encoder, head) for encoder in ("one", "two") for head in ("linear", "mlp")
    }
    test = (material / "voyages" / "test.txt").read_text()
    support = sum(one["support"] for one in results.rows[0]["per_type"]["entity_f1"].values())
    assert 0 < support < test.count("B-")
    assert np.load(tmp_path / "features" / "query.npy", mmap_mode="r").shape[1] == 2 * 32
    notes = (tmp_path / "results.md").read_text()
    assert "scored on 15 of the 40 sentences" in notes
    assert "larger than the number of mentions of some types in all 60 sentences of the pool: k = 500: city" in notes
    assert all(row["short_types"] == ["city", "person"] for row in results.rows)


def test_the_command_tells_a_mistake_in_one_line(run_python, tmp_path):
    done = run_python(
        "-m", "nuner_jax.fewshot", "--config=configs/fewshot.py:nowhere", f"--workdir={tmp_path}", check=False
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: no model 'nowhere'")
    done = run_python("-m", "nuner_jax.fewshot", "--config=configs/quickstart.py", check=False)
    assert done.returncode == 2 and "this command takes a config of fewshot" in done.stderr
