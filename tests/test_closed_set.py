"""Pre-training on a closed set of classes: the labels it learns, and the one loop on them."""

import json
import pathlib

import jax
import numpy as np
import pytest

from nuner_jax import checkpoint, evaluate, export, metrics, pretrained, sharding, text_encoder
from nuner_jax import config as config_lib
from nuner_jax.data import builder, classes
from nuner_jax.data.corpus import load_corpus
from nuner_jax.data.records import Entity, Record
from nuner_jax.errors import NunerError
from nuner_jax.models.params import flatten
from nuner_jax.tasks import make_task
from nuner_jax.tasks.closed_set import CLASSES_FILE
from nuner_jax.train import train
from nuner_jax.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


# --- Classes and labels ------------------------------------------------------------------------


def record(text, **mentions):
    """A text and, by concept, the strings that are its mentions."""
    found = [(text.index(string), string, concept) for concept, strings in mentions.items() for string in strings]
    return Record(text, tuple(Entity(start, start + len(string), concept) for start, string, concept in sorted(found)))


TEXTS = [
    record("Ann of York met Bo.", person=["Ann", "Bo"], city=["York"]),
    record("Cy saw York Minster", person=["Cy"], city=["York"], church=["York Minster"]),
    record("Di is in Hull", person=["Di"], city=["Hull"], port=["Hull"]),
    record("rain fell", weather=["rain"]),
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """`TEXTS`, a text a sequence."""
    folder = tmp_path_factory.mktemp("texts")
    builder.build(TEXTS, folder / "data", validation_fraction=0)
    tokenizer = pretrained.load_tokenizer(pathlib.Path(config_lib.SAMPLE_TOKENIZER))
    sizes = {"window": 64, "concept_length": 32, "cache_dir": folder}
    return load_corpus({"texts": folder / "data"}, "train", tokenizer, **sizes)


def labels(corpus):
    """The label of each annotated token of each sequence: {sequence: {position: label}}."""
    pairs = zip(corpus.pair_positions_P.tolist(), corpus.pair_concepts_P.tolist(), strict=True)
    pairs = list(pairs)
    offsets = corpus.pair_offsets_W1
    return [dict(pairs[offsets[w] : offsets[w + 1]]) for w in range(len(offsets) - 1)]


def concepts(corpus):
    """The concepts of each annotated token of each sequence: {sequence: {position: names}}."""
    found = []
    for w in range(corpus.source_W.size):
        at = slice(corpus.pair_offsets_W1[w], corpus.pair_offsets_W1[w + 1])
        mine = {}
        for position, concept in zip(corpus.pair_positions_P[at].tolist(), corpus.pair_concepts_P[at], strict=True):
            mine.setdefault(position, set()).add(corpus.concept_names[concept])
        found.append(mine)
    return found


def test_the_classes_are_the_concepts_with_most_mentions_in_an_epoch(corpus):
    once = np.ones(4, int)
    found = classes.choose(corpus, once, number=3, min_mentions=1)
    assert found.names == ("person", "city", "church"), "of equal frequency in the order of their names"
    assert found.mentions == (4, 3, 1)
    assert found.num_concepts == 5 and found.share == 8 / 10
    rain = np.array(["weather" in set().union(*names.values()) for names in concepts(corpus)])
    assert classes.choose(corpus, np.where(rain, 9, 1), None, 3).names == ("weather", "person", "city")
    assert classes.choose(corpus, np.where(rain, 0, 1), None, 1).names == ("person", "city", "church", "port")


@pytest.mark.parametrize(("others", "other"), [("ignore", -1), ("outside", 0), ("class", 3)])
def test_a_token_has_the_most_frequent_of_its_classes_and_other_concepts_are_as_configured(corpus, others, other):
    names = ("person", "city")
    view = classes.labelled(corpus, names, others)
    assert len(view.pair_positions_P) < len(corpus.pair_positions_P), "York and Hull have two concepts each"
    for found, expected in zip(labels(view), concepts(corpus), strict=True):
        assert found.keys() == expected.keys()
        for position, of in expected.items():
            assert found[position] == (1 if "person" in of else 2 if "city" in of else other), of
    assert other in {label for found in labels(view) for label in found.values()}
    given = [label for found in labels(view) for label in found.values()]
    outside = int(np.sum(corpus.length_W - 2)) - len(given)
    count_C = classes.label_counts(view, np.full(4, 2), 4)
    assert count_C.tolist() == [2 * (given.count(label) + (outside if label == 0 else 0)) for label in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((6, 1), r"config\.classes\.number = 6, but only 5 of the 5 concepts have at least .*min_mentions = 1"),
        ((3, 3), r"config\.classes\.number = 3, but only 2 of the 5 concepts"),
        ((None, 5), r"0 of the 5 concepts have at least config\.classes\.min_mentions = 5 .*most frequent one has 4"),
    ],
)
def test_too_few_concepts_for_the_classes_are_an_error(corpus, options, message):
    with pytest.raises(NunerError, match=message):
        classes.choose(corpus, np.ones(4, int), *options)


# --- The task ----------------------------------------------------------------------------------


SIX_STEPS = {"classes.number": 12, "steps": 6, "eval.every": 3, "checkpoint.every": 3}
SIX_STEPS |= {"optim.schedule": "constant", "optim.warmup": 0.0}


def tiny(rows_file, **changes):
    """The config that goes with the tiny contrastive one, as `configs/ner_bert.py` makes it, with these changes."""
    config = config_lib.load_file(f"{ROOT}/configs/ner_bert.py:{ROOT}/tests/configs/tiny.py:{rows_file}")
    cache = {"data.cache_dir": str(rows_file.parent / "cache")}
    config.update_from_flattened_dict(SIX_STEPS | cache | changes)
    config_lib.check(config, tasks=("pretrain_classes",))
    return config


def leaves(workdir, name="params", step=6):
    tree = checkpoint.load_params(workdir / "checkpoints" / str(step), name=name)
    return {path: np.asarray(leaf) for path, leaf in sharding.tree_paths(tree).items()}


def curve(workdir):
    return [line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line]


@pytest.fixture(scope="module")
def undisturbed(rows_file, tmp_path_factory):
    """A run of six steps on eight devices, and its metrics."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(tiny(rows_file, export=True), workdir)


def test_all_but_the_classes_is_as_in_the_contrastive_config(rows_file):
    contrastive = config_lib.load_file(f"{ROOT}/tests/configs/tiny.py:{rows_file}")
    contrastive.lr, contrastive.data.sources.rows.weight = 0.5, 3.0
    config = config_lib.pretrain_classes(contrastive)
    assert (config.lr, config.data.sources.rows.weight, config.data.rows) == (0.5, 3.0, contrastive.data.rows)
    config.steps = None
    assert contrastive.steps == 20 and contrastive.task == "pretrain", "the other one is left as it was"
    for key in ("concept_row_length", "concept_length", "row_multiple"):
        assert key in contrastive.data and key not in config.data
    assert "loss" not in config and "concept" not in config.model
    with pytest.raises(NunerError, match=r"config\.task = 'finetune': a config of contrastive pre-training"):
        config_lib.pretrain_classes(config_lib.finetune())


def test_the_batches_visit_the_texts_as_contrastive_pre_training_does(rows_file):
    config = tiny(rows_file)
    task = make_task(config, sharding.make_mesh())
    contrastive = config_lib.load_file(f"{ROOT}/tests/configs/tiny.py:{rows_file}")
    contrastive.data.cache_dir = config.data.cache_dir
    other = make_task(contrastive, sharding.make_mesh())
    assert task.steps_per_epoch == other.steps_per_epoch
    ranks = {name: rank for rank, name in enumerate(task.classes.names, start=1)}
    seen = set()
    for step in range(4):
        mine, theirs = task.train_batch(step, np.arange), other.train_batch(step, np.arange)
        np.testing.assert_array_equal(mine["tokens"], theirs["tokens"])
        expected = np.where(theirs["scored"][0], 0, -1)
        for row, place in np.argwhere(theirs["pair_positions"][0] >= 0):
            position, concept = theirs["pair_positions"][0, row, place], theirs["pair_concepts"][0, row, place]
            rank, before = ranks.get(other.corpus.concept_names[concept], -1), expected[row, position]
            expected[row, position] = rank if before <= 0 or 0 < rank < before else before
        np.testing.assert_array_equal(mine["labels"][0], expected)
        seen |= set(expected.ravel().tolist())
    assert {-1, 0, 1, 2} <= seen


def test_a_random_encoder_learns_the_first_rows(rows_file, tmp_path):
    first = tmp_path / "first.jsonl"
    first.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:40]))
    changes = {"lr": 5e-3, "steps": 60, "eval.every": 60, "checkpoint.every": 60, "data.rows": 32}
    changes |= {"data.sources.rows.path": str(first), "model.dropout": 0.0, "model.frozen_layers": 0}
    changes |= {"optim.head_factor": 1.0}
    train(tiny(rows_file, **changes), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert lines[0]["train/loss"] > 0.5 and lines[-1]["train/loss"] < 0.05
    assert lines[-1]["train/accuracy"] > 0.95


def test_what_is_measured_is_what_plain_counting_gives(undisturbed, rows_file):
    workdir, found = undisturbed
    task = make_task(tiny(rows_file), sharding.make_mesh())
    abstract = sharding.with_shardings(sharding.make_mesh(), jax.eval_shape(task.init_params, jax.random.key(0)), ())
    params = checkpoint.load_params(checkpoint.resolve(str(workdir)), abstract)
    gold, predicted, loss = [], [], []
    for batch in task._validation_batches():
        batch = {name: value[0] for name, value in batch.items()}
        logits_RxLxC = np.asarray(jax.jit(task._logits)(params, batch))
        at = np.asarray(batch["labels"]) >= 0
        gold.append(np.asarray(batch["labels"])[at])
        predicted.append(logits_RxLxC[at].argmax(-1))
        loss.append(-np.asarray(jax.nn.log_softmax(logits_RxLxC[at]))[np.arange(at.sum()), gold[-1]])
    gold, predicted, loss = (np.concatenate(parts) for parts in (gold, predicted, loss))
    classed = gold > 0
    assert 0 < classed.sum() < gold.size
    assert found["validation/loss"] == pytest.approx(loss.mean(), rel=1e-5)
    assert found["validation/accuracy"] == pytest.approx((predicted == gold)[classed].mean())
    macro = metrics.token_macro_f1(gold, predicted, num_types=12).f1_H[0]
    assert found["validation/macro_f1"] == pytest.approx(macro)
    assert found["validation/classes"] == len(set(gold[classed]))
    measured = evaluate.evaluate(str(workdir))
    for name, value in found.items():
        assert measured[name] == pytest.approx(value, rel=1e-5), name


def test_training_starts_from_the_frequencies_of_the_labels(undisturbed, rows_file):
    first = next(line for line in read_metrics(undisturbed[0]) if "validation/loss" in line)
    task = make_task(tiny(rows_file), sharding.make_mesh())
    bias_C = np.asarray(jax.jit(task.init_params)(jax.random.key(0))["head"]["out"]["bias"], np.float64)
    assert np.exp(bias_C).sum() == pytest.approx(1, abs=1e-5) and bias_C.argmax() == 0
    labels = np.concatenate([np.asarray(batch["labels"]).ravel() for batch in task._validation_batches()])
    assert first["step"] == 0
    assert first["validation/loss"] == pytest.approx(-bias_C[labels[labels >= 0]].mean(), rel=1e-4)


def test_the_bottom_half_stays_as_it_was_and_takes_no_memory(undisturbed, rows_file):
    task = make_task(tiny(rows_file), sharding.make_mesh())
    initial = {path: np.asarray(leaf) for path, leaf in flatten(jax.jit(task.init_params)(jax.random.key(0))).items()}
    final, memory = leaves(undisturbed[0]), leaves(undisturbed[0], "opt_state")
    frozen = {path for path in initial if path.startswith(("text/embeddings/", "text/layers/0/"))}
    assert len(frozen) > 10 and {"head/out/kernel", "head/out/bias"} <= initial.keys() - frozen
    for path, leaf in initial.items():
        assert np.array_equal(final[path], leaf) == (path in frozen), path
        assert any(name.endswith(f"mu/{path}") for name in memory) == (path not in frozen), path


def test_a_resumed_run_is_bit_identical(undisturbed, rows_file, tmp_path):
    train(tiny(rows_file, steps=3), tmp_path)
    train(tiny(rows_file), tmp_path)
    for name in ("params", "opt_state"):
        expected, actual = leaves(undisturbed[0], name), leaves(tmp_path, name)
        assert expected.keys() == actual.keys()
        for path in expected:
            np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)
    assert curve(tmp_path) == curve(undisturbed[0])


@pytest.mark.slow
def test_one_device_and_other_meshes_give_the_same_run(undisturbed, rows_file, tmp_path, run_python):
    train(tiny(rows_file, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path / "mesh")
    config = f"--config={ROOT}/configs/ner_bert.py:{ROOT}/tests/configs/tiny.py:{rows_file}"
    changes = SIX_STEPS | {"data.cache_dir": rows_file.parent / "cache"}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    one = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = run_python("-m", "nuner_jax.train", config, f"--workdir={tmp_path}/one", *flags, env=one)
    assert "devices: 1 x cpu" in done.stdout
    for workdir in (tmp_path / "mesh", tmp_path / "one"):
        np.testing.assert_allclose(curve(workdir), curve(undisturbed[0]), rtol=1e-4)
        for path, leaf in leaves(undisturbed[0]).items():
            np.testing.assert_allclose(leaves(workdir)[path], leaf, atol=1e-4, err_msg=path)


def test_micro_batches_add_up_to_the_same_update(rows_file, tmp_path):
    changes = {"steps": 1, "data.rows": 16, "model.dropout": 0.0}
    for accumulate in (1, 2):
        train(tiny(rows_file, **changes, **{"optim.accumulate": accumulate}), tmp_path / str(accumulate))
    expected = leaves(tmp_path / "1", step=1)
    for path, leaf in leaves(tmp_path / "2", step=1).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)
    np.testing.assert_allclose(curve(tmp_path / "2"), curve(tmp_path / "1"), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes.others": "outside"}, "the training data is not that of the checkpoint"),
        ({"classes.number": 11}, r"head/out/kernel"),
        ({"data.sources.rows.weight": 0.3}, "the training data is not that of the checkpoint"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_does_not_go_on_with_other_classes(undisturbed, rows_file, changes, message):
    workdir = undisturbed[0]
    before = (workdir / CLASSES_FILE).read_text()
    with pytest.raises(NunerError, match=message):
        train(tiny(rows_file, **changes, steps=9), workdir)
    assert (workdir / CLASSES_FILE).read_text() == before
    assert not (workdir / "checkpoints" / "9").exists()


def test_a_head_for_other_classes_is_no_start(undisturbed, rows_file, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:40]))
    changes = {"data.sources.rows.path": str(few), "checkpoint.init_from": str(undisturbed[0])}
    with pytest.raises(NunerError, match=r"init_from: .* has a head for the classes .*, and here they are .*"):
        train(tiny(rows_file, **changes), tmp_path / "run")


def test_the_workdir_lists_the_classes_and_is_an_encoder_for_other_commands(undisturbed):
    workdir, _ = undisturbed
    listed = json.loads((workdir / CLASSES_FILE).read_text())
    assert len(listed) == 12 and listed[0]["mentions"] >= listed[-1]["mentions"] > 0
    best = checkpoint.resolve(str(workdir))
    assert checkpoint.read_info(best)["classes"] == [row["name"] for row in listed]
    found = text_encoder.find(str(workdir))
    assert found.config.hidden_size == 64 and found.load_tokenizer().vocab_size == 8192
    trained = flatten(checkpoint.load_params(best)["text"])
    exported = pretrained.load_encoder(workdir / "export", found.config, found.load_params(None))
    for tree in (flatten(found.load_params(None)), flatten(exported)):
        assert tree.keys() == trained.keys()
        for path, leaf in tree.items():
            np.testing.assert_array_equal(leaf, trained[path], err_msg=path)
    joined = json.loads((workdir / "export" / "nuner.json").read_text())
    assert joined["classes"] == [row["name"] for row in listed]
    assert not (workdir / "export" / "concept").exists()


def test_another_command_exports_the_text_tower(undisturbed, tmp_path):
    assert export.export(checkpoint.resolve(str(undisturbed[0])), tmp_path / "out") == "AutoModel"
    same = (undisturbed[0] / "export" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes.number": 90_000}, r"config\.classes\.number = 90,000, but only [\d,]+ of the"),
        ({"classes.number": None, "classes.min_mentions": 10_000}, r"min_mentions = 10,000 mentions in an epoch; the"),
        ({"data.rows": 12}, r"config\.data\.rows / config\.optim\.accumulate = 12 cannot be split over the 8"),
        ({"model.tokenizer": None}, r"config\.model\.tokenizer is not set"),
        ({"model.frozen_layers": 3}, r"config\.model\.frozen_layers: 3 of 2 layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_before_any_training(rows_file, tmp_path, changes, message):
    with pytest.raises(NunerError, match=message):
        train(tiny(rows_file, **changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes.others": "drop"}, r"config\.classes\.others = 'drop': choose one of 'ignore', 'outside', 'class'"),
        ({"classes.number": 0}, r"config\.classes\.number = 0: at least 1"),
        ({"checkpoint.best": "retrieval/mrr"}, r"config\.checkpoint\.best = 'retrieval/mrr': choose one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_no_run_could_use_is_refused_by_name(rows_file, changes, message):
    with pytest.raises(NunerError, match=message):
        tiny(rows_file, **changes)
