"""The PyTorch peer of pre-training trains what this project trains: the same loss, the same updates, whole epochs."""

import json
import pathlib

import jax
import numpy as np
import pytest

from nuner_jax import config as config_lib
from nuner_jax import initialise, optim, pretrained, sharding, steps
from nuner_jax.tasks import make_task

pretrain_peer = pytest.importorskip("tests.benchmarks.pretrain_peer", reason="torch is missing")

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARITY = 1e-5  # relative difference of the losses
UPDATES = 3

VARIANTS = {
    "roberta": {"loss.chunk": 16},
    "bert": {
        "model.encoder.model_type": "bert",
        "model.encoder.type_vocab_size": 2,
        "model.frozen_layers": 0,
        "model.concept_pooling": "first",
        "loss.normaliser": "pairs",
        "loss.learn_bias": False,
    },
}

pytestmark = pytest.mark.live


@pytest.fixture(params=VARIANTS)
def task(request, rows_file, tmp_path):
    """A small model without dropout, whose every batch is all of 100 sentences."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:100]))
    config = config_lib.load_file(f"{ROOT}/tests/configs/tiny.py:{few}")
    config.update_from_flattened_dict(VARIANTS[request.param] | {"model.dropout": 0.0, "steps": UPDATES})
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.row_multiple = config.data.rows = config.eval.rows = 1
    mesh = jax.make_mesh(
        (1, 1, 1), sharding.AXES, devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    config.data.rows = round(make_task(config, mesh).steps_per_epoch)
    return make_task(config, mesh), config, mesh


def trained(task, config, mesh):
    """Our parameters and losses, from the start on: of every update."""
    schedule = optim.learning_rate(
        "cosine", peak=config.lr, end=0, warmup_steps=round(config.optim.warmup * UPDATES), total_steps=UPDATES
    )
    names = ("b1", "b2", "eps", "weight_decay", "clip_norm")
    optimizer = optim.make_optimizer(schedule, **{name: config.optim[name] for name in names})
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, initialise.abstract_state(task, optimizer, mesh, config.mesh.rules)
    )
    step = steps.make_train_step(task, optimizer, schedule, shardings, mesh, config.seed)
    state = jax.device_put(steps.new_state(task, optimizer, task.init_params(jax.random.key(0))), shardings)
    params, losses = [jax.device_get(state.params)], []
    for number in range(UPDATES):
        state, metrics = step(state, task.train_batch(number, np.arange))
        params.append(jax.device_get(state.params))
        losses.append(float(metrics["loss"]))
        assert metrics["dropped"] == 0
    return params, losses


def peer_of(task, config, params, folder):
    """The peer with our parameters, through an export of them."""
    for place, tower, sizes in (
        (folder, "text", task.text_config),
        (folder / "concept", "concept", task.concept_config),
    ):
        pretrained.save_encoder(place, sizes, params[tower])
    (folder / "nuner.json").write_text(json.dumps({name: float(value) for name, value in params["logit"].items()}))
    return pretrain_peer.TwoTowers(folder, config).train()


def test_loss_and_updates_are_ours(task, tmp_path):
    task, config, mesh = task
    params, losses = trained(task, config, mesh)
    peer = peer_of(task, config, params[0], tmp_path / "start")
    updates = pretrain_peer.Updates(peer, config, UPDATES)
    batches = pretrain_peer.Batches(task.corpus, task.text_config.pad_token_id, concept_groups=3)
    everything = np.arange(task.corpus.length_W.size)
    for number in range(UPDATES):
        loss = peer(batches[np.random.default_rng(number).permutation(everything)])
        assert loss.item() == pytest.approx(losses[number], rel=PARITY)
        updates.update(loss)

    start = peer_of(task, config, params[0], tmp_path / "start").state_dict()
    ours, theirs = peer_of(task, config, params[-1], tmp_path / "end").state_dict(), peer.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Adam divides by the size of the gradient: where that is next to nothing, rounding is all there is.
        assert (value - ours[name]).abs().quantile(0.99) <= 0.01 * config.lr, name
        assert (value - ours[name]).abs().max() <= 0.2 * config.lr, name
    frozen = [name for name, value in theirs.items() if value.equal(start[name])]
    bottom = ("text.embeddings", "text.encoder.layer.0.") if config.model.frozen_layers else ("bias",)
    assert frozen == [name for name in theirs if name.startswith(bottom)]


def test_every_sentence_once_an_epoch_and_batches_of_one_length():
    length_M = np.random.default_rng(1).integers(3, 60, 40)
    order = pretrain_peer.plan(length_M, batch=4, steps=24, warmup=2, pool=6, seed=0)
    assert order.shape == (24, 4)
    np.testing.assert_array_equal(np.bincount(order.reshape(-1))[:40], 2 + (np.bincount(order.reshape(-1)) > 2))
    spread = np.ptp(length_M[order], axis=1)
    assert spread[2:].mean() < 0.25 * np.ptp(length_M)
    assert not (pretrain_peer.plan(length_M, 4, 24, 2, 6, seed=1) == order).all()


@pytest.mark.slow
def test_the_command_compares_both_sides_after_the_same_sentences(run_python, rows_file, tmp_path):
    run_python(
        "tests/benchmarks/pretrain_torch.py",
        "--steps=6",
        "--every=2",
        "--pool=4",
        "--rounds=1",
        "--evaluations=2",
        f"--out={tmp_path / 'out'}",
        f"--config=tests/configs/tiny.py:{rows_file}",
        f"--config.data.cache_dir={rows_file.parent / 'cache'}",
        env={"XLA_FLAGS": ""},  # one device, as on the machine of a person who compares
        timeout=600,
    )
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    (sides,) = result["rounds"]
    ours, theirs = sides["nuner_jax"], sides["PyTorch/transformers"]
    assert abs(ours["sentences"] - theirs["sentences"]) <= 0.5 * 6
    assert theirs["validation_loss"].keys() == {"3", "6"} and ours["validation_loss"].keys() == {"0", "3", "6"}
    for step, loss in theirs["validation_loss"].items():
        assert loss == pytest.approx(ours["validation_loss"][step], rel=0.01)
        assert loss < 0.99 * ours["validation_loss"]["0"]
    assert [one["step"] for one in theirs["intervals"]] == [2, 3, 4, 6]  # a saving of weights ends an interval too
    assert [one["step"] for one in ours["intervals"]] == [2, 4, 6]
    assert result["summary"]["ratio"] > 0 and result["config"]["lr"] == 1e-3
