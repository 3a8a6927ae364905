"""Fine-tuning as its users meet it: the one loop, on another task."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from nuner_jax import checkpoint, evaluate, export, optim, sharding
from nuner_jax import config as config_lib
from nuner_jax.errors import NunerError
from nuner_jax.fewshot import features, heads
from nuner_jax.models.params import flatten
from nuner_jax.progress import Progress
from nuner_jax.state import TrainState
from nuner_jax.tasks import make_task
from nuner_jax.train import train
from nuner_jax.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def tiny(**changes):
    """The test config, with these changes."""
    config = config_lib.load_file(f"{ROOT}/tests/configs/tagger.py")
    config.update_from_flattened_dict(changes)
    config_lib.check(config, tasks=("finetune",))
    return config


def last_step(workdir):
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def leaves(workdir, name="params"):
    tree = checkpoint.load_params(workdir / "checkpoints" / str(last_step(workdir)), name=name)
    return {path: np.asarray(leaf) for path, leaf in sharding.tree_paths(tree).items()}


def final_params(task, workdir):
    """Of the last step, placed as the task's programs take them."""
    abstract = sharding.with_shardings(sharding.make_mesh(), jax.eval_shape(task.init_params, jax.random.key(0)), ())
    return checkpoint.load_params(workdir / "checkpoints" / str(last_step(workdir)), abstract)


def curve(workdir):
    return [line["train/loss"] for line in read_metrics(workdir) if "train/loss" in line]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(tiny(), workdir)


@pytest.fixture(scope="module")
def pretrained_run(rows_file, tmp_path_factory):
    """A run of pre-training of three steps, with its export."""
    workdir = tmp_path_factory.mktemp("pretrained")
    config = config_lib.load_file(f"{ROOT}/tests/configs/tiny.py:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    config.steps, config.export = 3, True
    train(config, workdir)
    return workdir


@pytest.mark.parametrize("head", [("linear", "io"), ("mlp", "bilou")], ids="-".join)
def test_a_random_encoder_learns_the_first_rows(tmp_path, head):
    changes = {"head.kind": head[0], "head.scheme": head[1], "head.dropout": 0.0, "model.dropout": 0.0}
    train(tiny(steps=60, lr=5e-3, **changes, **{"eval.every": 60, "checkpoint.every": 60}), tmp_path)
    losses = curve(tmp_path)
    assert losses[0] > 2 and losses[-1] < 0.02
    assert [line["train/accuracy"] for line in read_metrics(tmp_path) if "train/accuracy" in line][-1] == 1.0


def test_the_test_split_is_measured_once_at_the_end_and_chooses_nothing(undisturbed):
    workdir, metrics = undisturbed
    lines = read_metrics(workdir)
    assert not any(name.startswith("test/") for line in lines for name in line)
    evaluations = [line for line in lines if "dev/entity_f1" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6]
    result = json.loads((workdir / "result.json").read_text())
    best = max(evaluations[1:], key=lambda line: line["dev/entity_f1"])  # of equals the first
    assert result["step"] == best["step"]
    assert result["metrics"] == metrics and 0 < metrics["test/loss"] < 4
    measured = evaluate.evaluate(str(workdir))
    assert measured["step"] == best["step"]
    for name, value in metrics.items():
        assert measured[name] == pytest.approx(value, abs=1e-5), name


def test_a_resumed_run_is_bit_identical(undisturbed, tmp_path):
    train(tiny(steps=4), tmp_path)
    train(tiny(), tmp_path)
    for name in ("params", "opt_state"):
        expected, actual = leaves(undisturbed[0], name), leaves(tmp_path, name)
        assert expected.keys() == actual.keys()
        for path in expected:
            np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)
    assert curve(tmp_path) == curve(undisturbed[0])


@pytest.mark.slow
def test_one_device_and_other_meshes_give_the_same_run(undisturbed, tmp_path, run_python):
    train(tiny(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), tmp_path / "mesh")
    one = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = ["-m", "nuner_jax.train", "--config=tests/configs/tagger.py", f"--workdir={tmp_path}/one"]
    assert "devices: 1 x cpu" in run_python(*command, env=one).stdout
    for workdir in (tmp_path / "mesh", tmp_path / "one"):
        np.testing.assert_allclose(curve(workdir), curve(undisturbed[0]), rtol=1e-4)
        for path, leaf in leaves(undisturbed[0]).items():
            np.testing.assert_allclose(leaves(workdir)[path], leaf, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("frozen_layers", [1, -1])
def test_frozen_leaves_stay_bit_identical_and_take_no_memory(pretrained_run, tmp_path, frozen_layers):
    changes = {"model.init": "pretrained", "model.text": str(pretrained_run), "model.tokenizer": None}
    changes |= {"model.frozen_layers": frozen_layers, "head.standardise": True}
    train(tiny(**changes, steps=0), tmp_path / "start")
    train(tiny(**changes), tmp_path / "run")
    initial, final, memory = leaves(tmp_path / "start"), leaves(tmp_path / "run"), leaves(tmp_path / "run", "opt_state")
    assert not np.allclose(initial["head/standard/scale"], 1)
    bottom = ("text/embeddings/", "text/layers/0/", "head/standard/")
    frozen = {path for path in initial if path.startswith(bottom if frozen_layers == 1 else ("text/", bottom[-1]))}
    assert len(frozen) > 10 and initial.keys() - frozen
    for path, leaf in initial.items():
        assert np.array_equal(final[path], leaf) == (path in frozen), path
        assert any(name.endswith(f"mu/{path}") for name in memory) == (path not in frozen), path


def test_layer_wise_decay_scales_the_updates():
    task = make_task(tiny(**{"optim.layer_decay": 0.5, "optim.head_factor": 3.0}), sharding.make_mesh())
    options = {"b1": 0.9, "b2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
    params = flatten(jax.jit(task.init_params)(jax.random.key(0)))
    gradients = jax.tree.map(np.ones_like, params)

    def updates(**more):
        optimizer = optim.make_optimizer(lambda step: 0.1, **options, **more)
        return jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]

    plain, scaled = updates(), updates(share=task.learning_rate_share)
    for start, share in {
        "text/embeddings/": 0.125,
        "text/layers/0/": 0.25,
        "text/layers/1/": 0.5,
        "head/": 3.0,
    }.items():
        for path in (path for path in params if path.startswith(start)):
            np.testing.assert_allclose(scaled[path], share * np.asarray(plain[path]), rtol=1e-6, err_msg=path)


def test_training_ends_when_patience_does_and_is_then_over(tmp_path, capsys):
    changes = {"steps": 40, "lr": 0.0, "eval.patience": 2}
    train(tiny(**changes), tmp_path)
    assert "no better dev/entity_f1 since step 2: training ends at step 6" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 2
    assert len(curve(tmp_path)) == 6
    train(tiny(**changes), tmp_path)
    assert len(curve(tmp_path)) == 6 and max(line["step"] for line in read_metrics(tmp_path)) == 6


def test_a_run_that_is_stopped_again_and_again_chooses_and_ends_as_if_it_were_not(tmp_path, monkeypatch):
    """SIGTERM comes in the first evaluation, then just before one that is due, then between two.

    The one that is due waits for the next start, since a notice leaves little time; and then it is as good as any.
    """
    waiting = {("evaluated", 0), ("step", 2), ("step", 5)}
    evaluated = []  # (start, step)

    def with_signal(name):
        original = getattr(Progress, name)

        def method(self, step, metrics):
            original(self, step, metrics)
            if name == "evaluated":
                evaluated.append((starts, step))
            if (name, step) in waiting:
                waiting.remove((name, step))
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Progress, name, method)

    with_signal("evaluated"), with_signal("step")
    starts = 0
    while not (tmp_path / "result.json").exists():
        train(tiny(steps=40, lr=0.0, **{"eval.patience": 2}), tmp_path)
        starts += 1
    assert not waiting and starts == 4
    assert evaluated == [(0, 0), (2, 2), (2, 4), (3, 6)]
    assert checkpoint.resolve(str(tmp_path)).name == "2", "its metrics came after it was saved"
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 2
    assert len(curve(tmp_path)) == last_step(tmp_path) == 6


@pytest.mark.parametrize("source", ["workdir", "export"])
def test_it_starts_from_a_run_of_pre_training_or_its_export(pretrained_run, tmp_path, source):
    name = str(pretrained_run / ("export" if source == "export" else ""))
    config = tiny(**{"model.init": "pretrained", "model.text": name, "steps": 0})
    config.model.tokenizer = None
    train(config, tmp_path)
    final = leaves(tmp_path)
    expected = flatten(checkpoint.load_params(checkpoint.resolve(str(pretrained_run)))["text"])
    assert {path for path in final if path.startswith("text/")} == {f"text/{path}" for path in expected}
    for path, leaf in expected.items():
        np.testing.assert_array_equal(final[f"text/{path}"], leaf, err_msg=path)


def started_with(config, layers, folder):
    """A checkpoint of no step: what the run of `config` starts with, but for the head, whose layers are these."""
    begin = config.copy_and_resolve_references()
    begin.steps = 0
    train(begin, folder / "begin")
    params = checkpoint.load_params(folder / "begin" / "checkpoints" / "0")
    for name, (kernel, bias) in zip(("hidden", "out")[-len(layers) :], layers, strict=True):
        params["head"][name] = {"kernel": jax.numpy.asarray(kernel), "bias": jax.numpy.asarray(bias)}
    saved = checkpoint.Checkpoints(folder / "start", keep=1, best_metric="dev/loss", best_is_lower=True)
    saved.save(TrainState(jax.numpy.int32(0), params, {"none": jax.numpy.zeros(1)}), {}, {})
    saved.close()
    return str(folder / "start")


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_heads_of_the_fast_path_are_those_of_the_loop(pretrained_run, tmp_path, kind):
    """Both begin with the head that the fast path draws, and every batch is the whole support.

    Every class has words there: one without any has gradients of rounding errors, which AdamW makes large.
    """
    config = tiny(
        **{
            "model.init": "pretrained",
            "model.text": str(pretrained_run),
            "model.tokenizer": None,
            "model.frozen_layers": -1,
            "head.kind": kind,
            "head.dropout": 0.0,
            "head.scheme": "io",
            "head.standardise": True,
            "head.width": 16,
            "loss.balance": 0.5,
            "steps": 30,
            "lr": 5e-3,
            "optim.schedule": "cosine",
            "optim.clip_norm": 1e9,
            "data.rows": 32,
            "eval.every": 30,
            "checkpoint.every": 30,
        }
    )
    options = heads.HeadOptions(
        kind=kind, width=16, steps=30, lr=5e-3, weight_decay=config.optim.weight_decay, batch=4096, balance=0.5
    )
    task = make_task(config, sharding.make_mesh())
    split, test = task.splits["train"], task.splits["test"]
    assert np.unique(split.labels_W).tolist() == list(range(len(task.types) + 1))
    assert task.loader.packing.rows_per_epoch <= 32
    frozen = features.load_frozen(str(pretrained_run))

    def vectors(split):
        words = np.split(split.characters_Wx2, split.sentence_offsets_S1[1:-1])
        return features.word_features(frozen, split.texts, words).features_WxD

    support = np.arange(split.corpus.num_words)
    trained = heads.train_heads(
        vectors(split), split.labels_W, [support], num_types=len(task.types), options=options, seeds=[7]
    )
    layers = jax.tree.map(lambda leaf: leaf[0], trained.layers)
    fast = heads.apply_layers(layers, (vectors(test) - trained.mean_HxD[0]) * trained.scale_HxD[0])

    first = heads.init_layers(7, frozen.config.hidden_size, len(task.types) + 1, options)
    config.checkpoint.init_from = started_with(config, first, tmp_path)
    train(config, tmp_path / "loop")
    loop = task.logits("test", final_params(task, tmp_path / "loop"))
    assert np.std(loop) > 0.3
    np.testing.assert_allclose(loop, fast, atol=1e-4)


@pytest.mark.live
@pytest.mark.parametrize("standardise", [False, True])
def test_transformers_gives_the_same_logits(pretrained_run, tmp_path, standardise):
    torch = pytest.importorskip("torch")
    import transformers

    changes = {"model.init": "pretrained", "model.text": str(pretrained_run), "head.standardise": standardise}
    config = tiny(**changes, export=True)
    config.model.tokenizer = None
    train(config, tmp_path)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    config.data.row_length = 128
    task = make_task(config, sharding.make_mesh())
    assert model.config.id2label == dict(enumerate(task.scheme.names(task.types)))
    best = checkpoint.resolve(str(tmp_path))
    abstract = sharding.with_shardings(sharding.make_mesh(), jax.eval_shape(task.init_params, jax.random.key(0)), ())
    ours_WxC = task.logits("test", checkpoint.load_params(best, abstract))
    split = task.splits["test"]
    for sentence in range(5):
        first, after = split.sentence_offsets_S1[sentence : sentence + 2]
        encoded = tokenizer(split.texts[sentence], return_tensors="pt", return_offsets_mapping=True)
        offsets_Lx2 = encoded.pop("offset_mapping")[0].numpy()
        with torch.no_grad():
            theirs_LxC = model(**encoded).logits[0].numpy()
        for word in range(first, after):
            place = np.flatnonzero(offsets_Lx2[:, 1] > split.characters_Wx2[word, 0])[0]
            np.testing.assert_allclose(ours_WxC[word], theirs_LxC[place], atol=2e-5)


def test_a_tagger_that_transformers_has_no_class_for_is_refused_before_and_after(tmp_path):
    with pytest.raises(NunerError, match=r"config\.export: transformers has no class"):
        tiny(**{"head.kind": "mlp"}, export=True)
    train(tiny(**{"head.kind": "mlp", "steps": 1}), tmp_path)
    with pytest.raises(NunerError, match="transformers has no class for this tagger"):
        export.export(checkpoint.resolve(str(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_for_other_labels_is_no_start(undisturbed, tmp_path):
    for changes in ({"head.scheme": "bilou"}, {"data.set.name": "lab_notes"}):
        with pytest.raises(
            NunerError, match=r"init_from: .* has a head for the labels O, B-.*, and here they are O, B-"
        ):
            train(tiny(**changes, **{"checkpoint.init_from": str(undisturbed[0])}), tmp_path)


def conll_folder(folder, **splits):
    """CoNLL files, from sentences such as "Ann/B-person sang/O"."""
    for name, sentences in splits.items():
        lines = ["".join("\t".join(word.rsplit("/", 1)) + "\n" for word in one.split()) for one in sentences]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {"data.set.name": "mine", "data.set.path": str(folder), "data.sentences": ()}


TRAIN = [f"{name}/B-person went/O to/O Oslo/B-place" for name in ("Ann", "Bob", "Cleo", "Dan", "Eve", "Flo", "Gus")]


def test_what_the_data_lacks_is_said_before_training(tmp_path):
    test = ["Acme/B-firm Inc/I-firm hired/O Ann/B-person", "Acme/B-firm grew/O", "Ann/B-person sang/O " * 60]
    changes = conll_folder(tmp_path, train=TRAIN, test=test)
    said = []
    task = make_task(tiny(**changes, **{"data.dev_share": 0.3}), sharding.make_mesh(), said.append)
    assert "  types in test that train lacks, which count with F1 0: firm" in said
    lost = "test: 2 of 63 mentions are of types that no training sentence has, and cannot be found: firm (2)"
    assert lost in said
    assert any(line.startswith("test: 3 sentences") and "1 texts in several windows" in line for line in said)
    params = task.init_params(jax.random.key(0))
    params["head"]["out"]["kernel"] *= 0  # all classes alike, of which the first is outside
    scores = dict(task.final_evaluators()["test"](params))
    assert scores["entity_f1"] == 0 and np.isfinite(scores["loss"])


def test_a_dev_split_of_its_own_is_not_replaced_by_a_share(tmp_path):
    test, dev = ["Ann/B-person sang/O"], ["Bob/B-person ate/O", "Rome/B-place fell/O"]
    mesh = sharding.make_mesh()
    shared = make_task(tiny(**conll_folder(tmp_path, train=TRAIN, test=test), **{"data.dev_share": 0.3}), mesh)
    assert 0 < len(shared.splits["dev"].texts) == len(TRAIN) - len(shared.splits["train"].texts)
    given = make_task(tiny(**conll_folder(tmp_path, train=TRAIN, test=test, dev=dev), **{"data.dev_share": 0.3}), mesh)
    assert given.splits["dev"].texts == ("Bob ate", "Rome fell")
    assert len(given.splits["train"].texts) == len(TRAIN)
    none = make_task(tiny(**conll_folder(tmp_path, train=TRAIN, test=test, dev=dev), **{"data.set.dev": "0.3"}), mesh)
    assert none.splits["dev"].texts == shared.splits["dev"].texts, "what the user asks for by the key itself holds"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.dev_share": 1e-6}, r"config\.data\.dev_share = 1e-06: the dev split has no sentence"),
        ({"data.sentences": (3, 900)}, r"config\.data\.sentences: there is no sentence 900 among the 162"),
        ({"data.set.name": "travel_desks"}, r"config\.data\.set\.train is not set.*did you mean travel_desk"),
        ({"data.set.dev": "nowhere.txt"}, r"nowhere\.txt: no such file, named in config\.data\.set"),
        ({"data.dev_share": 0.0, "eval.patience": 3}, r"config\.eval\.patience needs a dev split"),
        ({"data.rows": 12}, r"config\.data\.rows / config\.optim\.accumulate = 12 cannot be split over the 8"),
        ({"model.tokenizer": None}, r"config\.model\.tokenizer is not set"),
        ({"model.frozen_layers": 3}, r"config\.model\.frozen_layers: 3 of 2 layers"),
        ({"model.layers": (-1, 5)}, r"hidden layer 5, but the encoder has 2 layers"),
    ],
)
def test_bad_input_is_named_before_any_training(tmp_path, changes, message):
    with pytest.raises(NunerError, match=message):
        train(tiny(**changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_workdir_of_another_task_is_left_as_it_is(pretrained_run):
    before = {path: path.stat().st_mtime_ns for path in pretrained_run.rglob("*")}
    with pytest.raises(NunerError, match="--workdir=.* holds a run of the task 'pretrain': choose another one"):
        train(tiny(), pretrained_run)
    assert {path: path.stat().st_mtime_ns for path in pretrained_run.rglob("*")} == before


def test_standardising_needs_an_encoder_that_was_trained():
    with pytest.raises(NunerError, match=r"config\.head\.standardise needs a pretrained encoder"):
        tiny(**{"head.standardise": True})
    tiny(**{"head.standardise": True, "checkpoint.init_from": "elsewhere"})


def test_patience_needs_a_checkpoint_of_every_evaluation():
    with pytest.raises(NunerError, match=r"eval\.every \(2\) that is a multiple of checkpoint\.every \(5\)"):
        tiny(**{"eval.patience": 2, "checkpoint.every": 5})
