"""The table that closes pre-training: there, the same again on a second start, and never computed twice."""

import json
import pathlib

import pytest

from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import frozen
from nuner_jax.fewshot.results import read_rows
from nuner_jax.train import train

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def config(rows_file):
    config = config_lib.load_file(f"{ROOT}/tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    config.steps = 2
    config.transfer.update(sets=("travel_desk",), k=(2,), seeds=2)
    return config


@pytest.fixture
def start(config, tmp_path, capsys, monkeypatch):
    """Starts the run; gives its table as it was printed, its rows, and the encoders whose features were computed."""
    encoded = []
    real = frozen.word_features
    monkeypatch.setattr(frozen, "word_features", lambda *a, **k: encoded.append(a[0].origin) or real(*a, **k))

    def begin():
        encoded.clear()
        train(config, tmp_path)
        printed = capsys.readouterr().out
        table = printed[printed.index("Token macro F1\n") : printed.index("  Points (0 to 100)")]
        assert printed.index("few-shot transfer, before and after") < printed.index(table) < printed.index("Trained to")
        return table, sorted(read_rows(table_folder(tmp_path) / "results.jsonl"), key=str), sorted(set(encoded))

    return begin


def table_folder(workdir):
    """Of the best checkpoint."""
    return workdir / "fewshot" / str(json.loads((workdir / "result.json").read_text())["step"])


def test_a_run_ends_with_the_table_and_never_computes_it_twice(start, tmp_path):
    table, rows, encoded = start()
    assert len(encoded) == 2
    assert {(row["encoder"], row["seed"]) for row in rows} == {
        (name, s) for name in ("before", "after") for s in (0, 1)
    }
    assert len({row["sample_hash"] for row in rows if row["seed"] == 0}) == 1, "both learn from the same sentences"
    for words in ("travel_desk", "before", "after", "… minus before"):
        assert words in table
    assert (table_folder(tmp_path) / "results.html").is_file()

    assert start() == (table, rows, [])

    path = table_folder(tmp_path) / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["encoder"] == "before"))  # killed after these
    (best,) = (name for name in encoded if "checkpoints" in name)
    again = start()
    assert again[0] == table and again[2] == [best]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transfer.sets": ("travel_desk", "nothing")}, "config.transfer.sets: no set is known by the name 'nothing'"),
        ({"transfer.k": (4, 4)}, r"config.transfer.k = \(4, 4\): different whole numbers"),
        ({"transfer.k": ()}, r"config.transfer.k = \(\): different whole numbers, at least 1"),
        ({"transfer.seeds": 0}, "config.transfer.seeds = 0: at least 1"),
    ],
)
def test_mistakes_are_named_before_any_data_is_opened(change, message, tmp_path):
    config = config_lib.pretrain()
    config.data.sources = config_lib.sources(web=config_lib.source("nowhere"))
    config.update_from_flattened_dict(change)
    with pytest.raises(NunerError, match=message):
        config_lib.check(config)
        train(config, tmp_path)
