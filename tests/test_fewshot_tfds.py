"""Data sets of entities that TFDS has prepared: by name or folder, and without TensorFlow."""

import pytest

from nuner_jax.data.builder import build
from nuner_jax.data.ner.datasets import load
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError

PREPARE = """
import sys
import tensorflow_datasets as tfds
from nuner_jax.data.tfds_records import NunerRecords

class TinyNer(NunerRecords):
    VERSION = tfds.core.Version("2.1.0")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def _info(self):
        names = ["O", "B-per", "B-loc", "I-loc"]
        tags = tfds.features.Sequence(tfds.features.ClassLabel(names=names))
        features = {"tokens": tfds.features.Sequence(tfds.features.Text()), "ner": tags}
        return self.info_class(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {split: self._examples(split) for split in ("train", "validation", "test")}

    def _examples(self, split):
        yield 0, {"tokens": ["Ann", "saw", "New", "York", split], "ner": ["B-per", "O", "B-loc", "I-loc", "O"]}

from nuner_jax.data import tfds_records
TinyNer.info_class = tfds_records._LocalInfo
TinyNer(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, run_python):
    """The data folder of TFDS with a set `tiny_ner` of words and class numbers, in ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    run_python("-c", PREPARE, folder)
    return folder


def test_a_tfds_data_set_by_name_or_folder_needs_no_tensorflow(prepared, run_python):
    code = (
        "import sys\n"
        "from nuner_jax.data.ner.datasets import load, report_table\n"
        "keys = dict.fromkeys(('train', 'test', 'dev'), 'tfds:' + sys.argv[1])\n"
        "one = load({'name': 'mine', 'tag_key': 'ner', **keys})\n"
        "for record in (*one.train, *one.test, *one.dev):\n"
        "    print(record.text, [(record.text[e.start:e.end], e.concept) for e in record.entities])\n"
        "print(report_table(one.report))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    for name in ("tiny_ner", prepared / "tiny_ner"):
        said = run_python("-c", code, name, env={"TFDS_DATA_DIR": str(prepared)}).stdout.splitlines()
        found = "[('Ann', 'per'), ('New York', 'loc')]"
        assert said[:3] == [f"Ann saw New York {split} {found}" for split in ("train", "test", "validation")]
        assert said[3].startswith("mine (") and said[3].endswith("tiny_ner/2.1.0)")
        assert "tokens, IOB2" in said[4]


def test_records_of_this_project_are_a_tfds_data_set(tmp_path):
    texts = [f"Trip {number} to Rome" for number in range(40)]
    records = [Record(text, (Entity(len(text) - 4, len(text), "city"),)) for text in texts]
    build(records, tmp_path / "set", validation_fraction=0.3)
    keys = {"train": f"tfds:{tmp_path / 'set'}", "test": f"tfds:{tmp_path / 'set'}:validation"}
    loaded = load({"name": "mine", **keys})
    assert sorted(record.text for record in (*loaded.train, *loaded.test)) == sorted(texts)
    assert all(record.text[one.start : one.end] == "Rome" for record in loaded.test for one in record.entities)
    assert loaded.types == ("city",)
    assert loaded.report["files"]["test"]["formats"] == ["spans"] and not loaded.split_on_space


def test_a_tfds_split_that_cannot_be_read_is_named(prepared, tmp_path):
    folder = prepared / "tiny_ner"
    with pytest.raises(NunerError, match="has no split 'oops'; it has: .*train"):
        load({"name": "mine", "train": f"tfds:{folder}", "test": f"tfds:{folder}:oops", "tag_key": "ner"})
    with pytest.raises(NunerError, match="the row has no 'ner_tags' but 'ner', 'tokens'; say which by tag_key"):
        load({"name": "mine", "train": f"tfds:{folder}", "test": f"tfds:{folder}", "format": "tokens"})
    with pytest.raises(NunerError, match=r"config.sets.mine.test: tfds:.*tiny_ner:train is the train split too"):
        load({"name": "mine", "train": f"tfds:{folder}", "test": f"tfds:{folder}:train"})
    with pytest.raises(NunerError, match="no such folder"):
        load({"name": "mine", "train": f"tfds:{tmp_path}/none", "test": f"tfds:{folder}"})
    with pytest.raises(NunerError, match=r'config.sets.mine.format = "conll": .* has rows, not lines'):
        load({"name": "mine", "train": f"tfds:{folder}", "test": f"tfds:{folder}", "format": "conll"})
