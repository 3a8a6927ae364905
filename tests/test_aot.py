"""Compiling for hardware that is not here: what is told, what grows with the devices, what fits, what is refused."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from nuner_jax import config as config_lib
from nuner_jax import program, sharding, train
from nuner_jax.aot import compile as aot_compile
from nuner_jax.aot import sizing, topology
from nuner_jax.errors import NunerError
from nuner_jax.tasks import make_task
from nuner_jax.writers import Console

# A config file; no size is a product of others, so that a number of bytes tells what it is of.
CONFIG = """
from nuner_jax.config import SAMPLE_TOKENIZER, pretrain, source, sources


def get_config(data="nowhere.jsonl"):
    config = pretrain()
    config.data.sources = sources(rows=source(data))
    config.data.update(rows=8, row_length=64, concept_row_length=56)
    config.eval.rows = 8
    config.model.update(init="scratch", tokenizer=SAMPLE_TOKENIZER, frozen_layers=0, dropout=0.0, dtype="float32")
    config.model.encoder.update(
        vocab_size=8192, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=72,
        max_position_embeddings=66,
    )
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def config(config_file):
    return config_lib.load_file(str(config_file))


def compile_quietly(config, *names, stated=(), limit=None):
    said = []
    return aot_compile.compile_all(config, names, dict(stated), limit, said.append), said


def carried(figures):
    return {(row["kind"], row["of"]): row for row in figures["collectives"]}


def test_the_command_needs_no_data_and_tells_what_a_device_holds_computes_and_sends(config_file, tmp_path, run_python):
    out = tmp_path / "figures.json"
    flags = [f"--config={config_file}", "--topology=cpu:16", "--shapes=assumed", f"--out={out}"]
    flags += ["--config.data.rows=16", "--config.data.row_multiple=16", "--config.eval.rows=16"]
    printed = run_python("-m", "nuner_jax.aot", *flags).stdout
    (figures,) = json.loads(out.read_text())["topologies"]
    assert figures["devices"]["number"] == 16
    memory = figures["memory"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=1e-3)  # two moments
    assert memory["parameters"] + memory["optimizer"] + memory["batch"] == pytest.approx(memory["arguments"], rel=1e-3)
    assert memory["peak"] >= memory["arguments"] + memory["temporaries"]
    assert figures["operations"]["compiled"] * 16 > 0.9 * figures["operations"]["model"]
    gradients = carried(figures)["all-reduce", "gradients"]
    assert gradients["bytes"] == pytest.approx(memory["parameters"], rel=1e-3)
    assert gradients["sent"] == pytest.approx(2 * 15 / 16 * gradients["bytes"])
    for line in ("cpu:16: 16 x cpu", "  parameters", "  all-reduce of gradients"):
        assert line in printed


@pytest.mark.parametrize("mesh", [{"data": -1, "fsdp": 1}, {"data": -1, "fsdp": 2}, {"data": 1, "fsdp": -1}])
def test_none_but_the_concepts_grows_with_the_devices(config, mesh):
    config.mesh.update(mesh)
    config.data.rows = config.eval.rows = config.data.row_multiple = 4
    (small, large), said = compile_quietly(config, "cpu:4", "cpu:8")
    assert large["batch"]["tokens"][1] == 2 * small["batch"]["tokens"][1]
    small, large = carried(small), carried(large)
    growing = {key for key in large if large[key]["bytes"] > small.get(key, {"bytes": 0})["bytes"]}
    assert {of for _, of in growing} == {"concepts"}
    assert {of for _, of in large} <= {"concepts", "gradients", "parameters", "scalars"}
    assert large["all-gather", "concepts"]["bytes"] == 2 * small["all-gather", "concepts"]["bytes"]
    assert [line for line in said if line.endswith("grows")]


def test_a_batch_as_stated_is_the_one_that_training_has(config_file, rows_file):
    config = config_lib.load_file(f"{config_file}:{rows_file}")
    config.data.cache_dir = str(rows_file.parent / "cache")
    mesh = sharding.make_mesh(8)
    task = make_task(config, mesh)
    shapes = dataclasses.asdict(task.loader.shapes)
    stated = sizing.parse_shapes(",".join(f"{key}={shapes[key]}" for key in sizing.STATED))
    real = sizing.batch_shapes(task, mesh)
    assert sizing.Sized(config, mesh, stated).abstract_batch() == real
    assert sizing.Sized(config, mesh, stated).costs() == task.costs()


@pytest.mark.parametrize("remat", ["attention", "layers"])
def test_the_config_says_what_both_towers_compute_again(config, remat):
    mesh = sharding.make_mesh(8)
    barriers = []
    for config.model.remat in ("none", remat):
        task = sizing.Sized(config, mesh, {})
        made = program.make_program(config, task, mesh)
        lowered = made.train_step.lower(made.abstract, task.abstract_batch()).as_text()
        barriers.append(lowered.count("stablehlo.optimization_barrier"))
    assert barriers[1] - barriers[0] == 2  # one layer each


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_would(config):
    config.data.rows = config.eval.rows = 4
    config.data.row_multiple = 2
    config.data.row_length = 512
    config.model.encoder.max_position_embeddings = 514
    (whole,), _ = compile_quietly(config, "cpu:2")
    limit = whole["memory"]["peak"] * 0.85
    (figures,), said = compile_quietly(config, "cpu:2", limit=limit)
    assert not figures["memory"]["fits"]
    advice = {key: one for one in figures["advice"] for key in one["changes"]}
    assert {"optim.accumulate", "mesh.fsdp", "data.rows"} <= advice.keys()
    assert "model.remat" not in advice  # of no use on CPUs
    assert advice["data.rows"]["fits"]
    assert advice["data.rows"]["peak"] <= limit
    assert any("does not fit" in line for line in said)
    assert any(line.startswith("  --config.data.rows=2: ") and line.endswith(", fits") for line in said)


def test_a_run_that_does_not_fit_ends_before_its_first_step_and_says_what_would(
    config_file, rows_file, tmp_path, monkeypatch, capsys
):
    config = config_lib.load_file(f"{config_file}:{rows_file}")
    config.data.update(cache_dir=str(tmp_path / "cache"), rows=32, row_length=256)
    config.model.encoder.max_position_embeddings = 258
    config.steps = 2
    run = train.prepare(config, tmp_path / "run", Console(active=False))
    compiled = aot_compile.compile_to_run(config, run.task, run.mesh, run.train_step, run.state, print)
    needed, limit = map(float, re.search(r"a step needs ([\d.]+) of ([\d.]+) GB", capsys.readouterr().out).groups())
    assert compiled.memory_analysis().temp_size_in_bytes / 1e9 < needed < limit, "of this very machine"

    monkeypatch.setattr(topology, "free_memory", lambda devices, state: 0.6 * needed * 1e9)
    with pytest.raises(NunerError) as refused:
        train.loop(run, Console(active=True))
    said = str(refused.value)
    assert re.search(rf"a step needs {needed:g} of [\d.]+ GB \(parameters [\d.]+, optimizer .*temporaries [\d.]+", said)
    assert re.search(r"--config\.data\.rows=(16|8): [\d.]+ GB, fits", said)
    assert run.checkpoints.latest is None
    assert not re.search("^(training from|step )", capsys.readouterr().out, re.MULTILINE)


def test_what_is_free_is_this_machine_s_and_what_the_run_holds_already(monkeypatch):
    total = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    devices = jax.devices()
    assert 0 < topology.free_memory(devices, ()) * len(devices) < 1024 * int(total.split()[1])
    monkeypatch.setattr(topology, "_free_host_memory", lambda: 8000)
    everywhere = jax.device_put(np.ones(100, np.float32), sharding.replicated(sharding.make_mesh(8)))
    assert topology.free_memory(devices, {"a": everywhere}) == 8000 / 8 + 400
    monkeypatch.setattr(topology, "_free_host_memory", lambda: None)
    assert topology.free_memory(devices, {"a": everywhere}) is None


@pytest.mark.parametrize(
    ("changes", "topology", "complaint"),
    [
        ({}, "v5e:3x3", "--topology=v5e:3x3: there is no such topology. There are v5e: and v6e: 1x1, 2x2"),
        ({}, "v6e:4x4x4", "no such topology"),
        ({}, "v5p:4x8x4", "no such topology"),
        ({}, "h100:8", "no such topology"),
        ({}, "cpu:0", "no such topology"),
        ({}, "gpu", "no GPU was found on this machine"),
        ({}, "cpu:4096", "this process has made 8 CPU devices already"),
        ({"mesh.fsdp": 3}, "cpu:8", "'fsdp': 3, 'tensor': 1} does not fit 8 device"),
        (
            {"data.rows": 4},
            "cpu:8",
            "config.data.rows / config.optim.accumulate = 4 cannot be split over the 8 devices",
        ),
        ({"model.attention": "cudnn", "model.dtype": "bfloat16"}, "cpu:8", "needs an NVIDIA GPU, and this is cpu"),
    ],
)
def test_what_is_impossible_is_refused_by_name(config, changes, topology, complaint):
    for key, value in changes.items():
        group, _, name = key.partition(".")
        config[group][name] = value
    with pytest.raises(NunerError) as refused:
        compile_quietly(config, topology)
    assert complaint in str(refused.value)


@pytest.mark.parametrize("text", ["rows=3", "pairs_per_row", "concept_rows=0", "concept_rows=-1"])
def test_shapes_that_are_not_understood_are_refused(text):
    with pytest.raises(NunerError, match="--shapes"):
        sizing.parse_shapes(text)


def test_a_tpu_s_compiler_that_is_missing_is_named(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NunerError, match=r"needs libtpu.*nuner_jax\[tpu\]"):
        compile_quietly(config, "v5e:4x4")


def test_the_table_of_the_cost_model_is_what_its_program_prints(root, capsys):
    page = (root / "launch" / "COST.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out in page


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is not installed")
def test_a_tpu_that_is_not_here(config):
    config.data.rows = config.eval.rows = config.data.row_multiple = 16
    (figures,), _ = compile_quietly(config, "v5e:4x4")
    assert figures["devices"] == {"number": 16, "kind": "TPU v5 lite"}
    assert figures["memory"]["limit"] == 16e9
    assert figures["memory"]["fits"]
    assert ("all-reduce", "gradients") in carried(figures)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is not installed")
@pytest.mark.parametrize("mesh", [{"data": 16}, {"data": 4, "fsdp": 2, "tensor": 2}])
def test_a_tpu_s_own_attention_sends_nothing_more(config, mesh):
    config.data.rows = config.eval.rows = config.data.row_multiple = 16
    config.mesh.update(mesh)
    sent = []
    for config.model.attention in ("xla", "splash"):
        (figures,), _ = compile_quietly(config, "v5e:4x4")
        sent.append(carried(figures))
    assert sent[0] == sent[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra `tpu` is not installed")
def test_what_a_tpu_computes_again_it_need_not_hold(config):
    config.data.update(rows=64, row_length=512)  # of more attention weights than a chip holds beside its memory
    config.eval.rows = 64
    config.model.encoder.update(max_position_embeddings=514, num_hidden_layers=2)
    (devices,) = topology.devices(["v5e:1x1"])
    advised = aot_compile.alternatives(config, devices)[0]
    assert advised == [{"model.remat": "attention"}, {"model.remat": "layers"}]
    figures = []
    for remat in ("none", "attention", "layers"):
        config.model.remat = remat
        figures.append(aot_compile.figures_of(config, devices, {"concept_rows": 8}, None))
    nothing, *again = ((one["memory"]["temporaries"], one["operations"]["compiled"]) for one in figures)
    assert all(memory < 0.8 * nothing[0] and operations > nothing[1] for memory, operations in again)
    assert len({one["operations"]["model"] for one in figures}) == 1  # what is computed twice counts once
