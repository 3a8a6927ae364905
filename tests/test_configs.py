"""Every config: it resolves, its keys are known, and one whole train step has the shapes it should."""

import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from ml_collections import config_flags

from nuner_jax import config as config_lib
from nuner_jax import initialise, optim, sharding, steps
from nuner_jax.annotate import pipeline
from nuner_jax.annotate.selection.select import read_units
from nuner_jax.errors import NunerError
from nuner_jax.tasks import make_task

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
ANNOTATE = [path for path in CONFIGS if path.stem.startswith("annotate_")]
TRAIN = [path for path in CONFIGS if not path.stem.startswith(("annotate", "fewshot"))]

# Sizes of the encoders that the configs name, as their config.json gives them, but for layers: one above the frozen
# ones is enough to see every shape. No weights are needed for that.
ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
BASE = {"hidden_size": 768, "num_hidden_layers": 7, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 13, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1536}
BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
XLMR = ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002}
ENCODERS = {
    "nuner_base": ROBERTA | BASE,
    "ner_bert": ROBERTA | BASE,
    "nuner_large": ROBERTA | LARGE,
    "nuner_bert": BERT | BASE,
    "nuner_multilingual": XLMR | BASE,
    "minilm_open": BERT | SMALL,
    "quickstart_minilm": BERT | SMALL,
    "finetune": BERT | SMALL,
}


def read(path):
    return config_lib.load_file(str(path))


@pytest.fixture
def on_small_data(rows_file, tmp_path, minilm_folder):
    """Makes a config find its encoder's sizes and some rows on this machine."""

    def adapt(config, name):
        if config.task.startswith("pretrain"):
            config.data.sources = config_lib.sources(rows=config_lib.source(str(rows_file)))
        if config.task == "finetune":
            config.data.rows = 8  # one for each of the tests' devices
        config.data.cache_dir = str(rows_file.parent / "cache")
        if name in ENCODERS:
            folder = tmp_path / "encoder"
            tokenizer = minilm_folder if ENCODERS[name]["model_type"] == "bert" else ROOT / config_lib.SAMPLE_TOKENIZER
            shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "config.json"))
            (folder / "config.json").write_text(json.dumps(ENCODERS[name] | {"layer_norm_eps": 1e-5}))
            for tower in {"text", "concept"} & set(config.model):
                config.model[tower] = str(folder)
        return config

    return adapt


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_one_whole_step_of_every_config_has_the_right_shapes(path, on_small_data):
    config = on_small_data(read(path), path.stem)
    config_lib.check(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    task = make_task(config, mesh)
    schedule = optim.learning_rate("constant", peak=1, end=0, warmup_steps=0, total_steps=1)
    optimizer = optim.make_optimizer(schedule, b1=0.9, b2=0.9, eps=1e-6, weight_decay=0.1, clip_norm=1.0)
    state = initialise.abstract_state(task, optimizer, mesh, config.mesh.rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = steps.make_train_step(task, optimizer, schedule, shardings, mesh, config.seed)
    batch = task.train_batch(0, np.arange)
    for name, value in batch.items():
        assert value.shape[:2] == (config.optim.accumulate, task.batch_rows[name]), name
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(metric.shape == () for metric in metrics.values())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}


@pytest.mark.parametrize(
    "name",
    ["annotate_sample.py", "annotate_openai.py:some-model"]
    + [f"annotate_local.py:{server}" for server in ("vllm", "sglang", "llamacpp", "ollama")],
)
def test_every_annotation_config_selects_and_plans(name, tmp_path):
    config = read(ROOT / "configs" / name)
    assert f"{name.partition(':')[0]}" in {path.name for path in ANNOTATE}
    config.endpoint.model = config.endpoint.model or "some-model"
    config.source.paths = (str(ROOT / "nuner_jax/data/sample/travel_desk.jsonl"),)
    config_lib.check(config, tasks=("annotate",))
    lines = []
    console = types.SimpleNamespace(say=lambda line="": lines.append(line), progress=None)
    pipeline.annotate(config, tmp_path / "run", console, dry_run=True)
    assert any("[INPUT SENTENCE]" not in line and "Label as many entities" in line for line in lines)
    assert read_units_count(tmp_path / "run") > 300


def read_units_count(workdir):
    return sum(1 for _ in read_units(workdir / "selection" / "units.jsonl.gz"))


def test_a_config_of_another_command_is_refused(run_python):
    done = run_python("-m", "nuner_jax.train", "--config=configs/annotate_sample.py", check=False)
    assert done.returncode == 2 and "config.task = 'annotate': this command takes a config of pretrain" in done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_tells_its_command(path):
    assert f"--config=configs/{path.name}" in path.read_text().split('"""')[1]


def test_the_argument_of_a_config_reaches_it():
    config = read(ROOT / "configs" / "nuner_multilingual.py:bert-base-multilingual-cased")
    assert config.model.text == config.model.concept == "bert-base-multilingual-cased"


def test_the_few_shot_config_takes_the_sets_of_a_folder(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("no data set")
    config = read(f"{ROOT}/configs/fewshot.py:encoder,,{tmp_path}")
    config_lib.check(config, tasks=("fewshot",))
    assert config.sets.to_dict() == {name: {"path": str(tmp_path / name)} for name in ("one", "two")}
    assert (config.encoders.to_dict(), config.baseline, config.seeds) == ({"encoder": "encoder"}, None, 10)
    with pytest.raises(NunerError, match="no folder .*absent"):
        read(f"{ROOT}/configs/fewshot.py:encoder,,{tmp_path}/absent")
    with pytest.raises(NunerError, match="holds no folder"):
        read(f"{ROOT}/configs/fewshot.py:encoder,,{tmp_path}/one")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("--config.optim.warmups=1", "no such key; did you mean optim.warmup?"),
        ("--config.lr=fast", "could not convert string to float"),
        ("--confg=configs/quickstart.py", "Did you mean: config"),
        ("--config.lr=nan", "config.lr = nan: at least 0"),
        ("--process_id=1", "--coordinator, --num_processes and --process_id go together"),
    ],
)
def test_a_wrong_flag_is_one_line_of_error(run_python, wrong, hint):
    done = run_python("-m", "nuner_jax.train", "--config=configs/quickstart.py", wrong, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and hint in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("--config.lrr=1", "no such key; did you mean lr"),
        ("--config.data.source.sample.path=x", "did you mean data.sources.sample.path"),
        ("--config=configs/nothing.py", "No such file"),
    ],
)
def test_a_wrong_key_or_file_is_named_with_the_nearest_right_one(monkeypatch, wrong, hint):
    monkeypatch.chdir(ROOT)
    with pytest.raises(NunerError) as error:
        config_lib.parse_flags(["train", "--config=configs/quickstart.py", wrong])
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("model.dtype", "float16", "config.model.dtype = 'float16': choose one of 'float32', 'bfloat16'"),
        ("optim.warmup", 2.0, "config.optim.warmup = 2.0: between 0 and 1.0"),
        ("data.rows", 0, "config.data.rows = 0: at least 1"),
        ("checkpoint.best", "accuracy", "config.checkpoint.best = 'accuracy': choose one of"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_by_name(key, value, hint):
    config = config_lib.pretrain()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(NunerError) as error:
        config_lib.check(config)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ("config.optim.warm_up = 1", r"line 4: no such key 'warm_up'; did you mean optim.warmup?"),
        ("config.lr = 'high'", "line 4: TypeError"),
        ("1 / 0", "line 4: ZeroDivisionError"),
        ("config.data.sources.web = 3", "line 4: no such key 'web'"),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(tmp_path, body, hint):
    path = tmp_path / "mine.py"
    lines = ["from nuner_jax.config import pretrain", "def get_config():", "    config = pretrain()", f"    {body}"]
    path.write_text("\n".join([*lines, "    return config", ""]))
    with pytest.raises(NunerError) as error:
        read(path)
    assert hint in str(error.value) and str(path) in str(error.value)


def test_a_key_that_a_file_adds_by_force_is_refused_all_the_same():
    config = config_lib.pretrain()
    with config.unlocked():
        config.learningrate = 3
    with pytest.raises(NunerError, match="config.learningrate: no such key"):
        config_lib.check(config)


@pytest.mark.parametrize("written", [["--config", "FILE"], ["-config=FILE"], ["--config=FILE"]])
def test_a_wrong_key_is_found_however_the_file_is_given(written):
    arguments = [part.replace("FILE", str(ROOT / "configs/quickstart.py")) for part in written]
    with pytest.raises(NunerError, match="optim.warmpu: no such key; did you mean optim.warmup"):
        config_lib.parse_flags(["train", *arguments, "--config.optim.warmpu=1"])


def test_our_reading_of_a_config_file_is_that_of_the_flags(monkeypatch):
    from absl import flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    name = "configs/nuner_multilingual.py:other"
    monkeypatch.chdir(ROOT)
    values(["program", f"--config={name}"])
    assert values.config.to_json_best_effort() == read(name).to_json_best_effort()


def test_the_difference_between_two_configs_is_told_key_by_key(tmp_path):
    config = config_lib.pretrain()
    config_lib.save(config, tmp_path / "config.json")
    assert config_lib.difference(config, tmp_path / "config.json") == []
    config.data.rows = 3
    assert config_lib.difference(config, tmp_path / "config.json") == ["data.rows: 64 -> 3"]
