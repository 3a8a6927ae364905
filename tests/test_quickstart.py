"""The README's commands, in its order, in a fresh copy of the project: the main job and what follows it."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from nuner_jax.writers import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> pathlib.Path:
    """What a clone holds, where nothing has run yet."""
    folder = tmp_path_factory.mktemp("clone") / "nuner_jax"
    for name in ("nuner_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def launch(clone, command: str) -> str:
    """Runs `launch/local.sh MODULE FLAG…` in the environment that is at hand (test_launch.py tests the script)."""
    script, module, *flags = shlex.split(command)
    assert script == "launch/local.sh"
    done = subprocess.run(
        [sys.executable, "-m", f"nuner_jax.{module}", *flags],
        cwd=clone,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(clone) -> str:
    return launch(clone, "launch/local.sh train --config=configs/quickstart.py")


def test_the_quickstart_reaches_the_figure_that_the_readme_tells(clone, quickstart):
    workdir = clone / "runs" / "quickstart"
    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    start = next(line for line in read_metrics(workdir) if "retrieval/mrr" in line)
    assert start["retrieval/mrr"] < 0.03, "random weights know nothing"
    assert metrics["retrieval/concepts"] == 535
    assert 0.145 < metrics["retrieval/mrr"] < 0.18, "the README says about 0.16"
    assert metrics["retrieval/top1"] > 0.09


def test_the_quickstart_leaves_a_plot_an_export_and_a_way_on(clone, quickstart):
    workdir = clone / "runs" / "quickstart"
    assert (workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "training.png").stat().st_size > 10_000
    assert (workdir / "export" / "model.safetensors").stat().st_size > 1e6
    closing = quickstart.splitlines()[-13:]
    for words in ("Trained to step", "Hugging Face folder:", "best checkpoint:", "ranks its own first", "Next:"):
        assert any(words in line for line in closing), words


def test_the_quickstart_ends_with_what_pre_training_has_gained(clone, quickstart):
    (folder,) = (clone / "runs" / "quickstart" / "fewshot").iterdir()
    cells = json.loads((folder / "results.json").read_text())["cells"]
    means = {
        (c["encoder"], c["minus"], c["k"]): c for c in cells if c["set"] is None and c["metric"] == "token_macro_f1"
    }
    for k in (4, 16):
        assert means["after", "before", k]["n"] == 5
        assert means["after", "before", k]["mean"] > 0.1 and means["after", "before", k]["interval"][0] > 0.05
        shown = f" {100 * means['after', None, k]['mean']:.1f}"
        assert any(line.lstrip().startswith("after ") and shown in line for line in quickstart.splitlines())
    assert 0.30 < means["after", None, 4]["mean"] < 0.39, "the README says about 34 points"
    assert 0.37 < means["after", None, 16]["mean"] < 0.46, "the README says about 42 points"
    table = quickstart.index("Token macro F1\n")
    assert all(name in quickstart[table:] for name in ("travel_desk", "lab_notes", "mean of 2 sets", "… minus before"))


def test_the_speed_of_the_quickstart_is_measured(clone, quickstart):
    printed = launch(clone, "launch/local.sh benchmark --config=configs/quickstart.py --steps=3 --warmup=1")
    figures = json.loads((clone / "runs" / "benchmark_quickstart.json").read_text())
    assert f"{figures['step']['mfu']:.1%} (model FLOP utilisation)" in printed
    assert figures["run"]["steps"] == 617
    logged = [line for line in read_metrics(clone / "runs" / "quickstart") if "train/mfu" in line]
    assert logged and all(line["train/mfu"] > 0 for line in logged)


def test_the_finished_run_is_measured_against_its_start(clone, quickstart):
    command = "launch/local.sh fewshot --config=configs/fewshot.py:runs/quickstart,runs/quickstart@start"
    printed = launch(clone, f"{command} --config.k='(2,)' --config.head.steps=20")
    assert "encoder baseline: random parameters of seed 0" in printed and "… minus baseline" in printed


def test_the_finished_run_is_fine_tuned(clone, quickstart):
    launch(clone, "launch/local.sh train --config=configs/finetune.py:runs/quickstart --config.steps=2")
    metrics = json.loads((clone / "runs" / "finetune" / "result.json").read_text())["metrics"]
    assert 0 <= metrics["test/token_macro_f1"] <= 1


def test_the_closed_set_of_classes_trains_on_the_same_data(clone, quickstart):
    command = "launch/local.sh train --config=configs/ner_bert.py:quickstart.py"
    printed = launch(clone, f"{command} --config.steps=1 --config.transfer.sets='()' --config.export=False")
    assert "Trained to step 1" in printed and "few-shot" not in printed


def test_a_language_model_in_context_is_tried_dry(clone, quickstart):
    printed = launch(
        clone,
        "launch/local.sh fewshot --config=configs/fewshot_llm.py:runs/quickstart "
        "--config.llms.llm.endpoint.model=my-model --config.llms.llm.endpoint.base_url=http://localhost:8000/v1 "
        "--config.llms.llm.endpoint.key_variable= --workdir=runs/in_context --dry_run",
    )
    assert "loyalty_programme" in printed and not (clone / "runs" / "in_context" / "results.jsonl").exists()


def test_evaluate_and_export_take_the_finished_run(clone, quickstart):
    printed = launch(clone, "launch/local.sh evaluate --checkpoint=runs/quickstart")
    best = max(line.get("retrieval/mrr", 0) for line in read_metrics(clone / "runs" / "quickstart"))
    assert json.loads(printed)["retrieval/mrr"] == pytest.approx(best, rel=1e-4)
    launch(clone, "launch/local.sh export --checkpoint=runs/quickstart --out=runs/my_encoder")
    assert (clone / "runs" / "my_encoder" / "config.json").is_file()


def test_shards_are_built_and_trained_on(clone):
    printed = launch(
        clone, "launch/local.sh data.build --input=nuner_jax/data/sample/completions.jsonl.gz --out=shards/sample"
    )
    assert "6,000" in printed
    train = (
        "launch/local.sh train --config=configs/quickstart.py --config.data.sources.sample.path=shards/sample "
        "--config.epochs=0.1 --workdir=runs/shards"
    )
    printed = launch(clone, train)
    assert "5,882 texts" in printed


def test_the_sample_is_annotated_from_its_recorded_completions(clone):
    printed = launch(clone, "launch/local.sh annotate --config=configs/annotate_sample.py")
    assert "34,656" in printed and "train 5,882, validation 118" in printed
    page = (clone / "runs/annotate_sample/report/index.html").read_text()
    assert "34,656" in page and "data:image/png;base64," in page


def test_a_dry_run_on_a_text_of_ones_own(clone):
    printed = launch(
        clone,
        "launch/local.sh annotate --config=configs/annotate_local.py:vllm --config.endpoint.model=my-model "
        "--config.source.paths=\"('nuner_jax/data/sample/travel_desk.jsonl',)\" --workdir=runs/desk --dry_run",
    )
    assert "Label as many entities, concepts, and ideas as possible" in printed and "dry run: nothing" in printed


def test_the_sample_is_selected_in_beam(clone):
    launch(
        clone, "launch/local.sh annotate.beam --config=configs/annotate_sample.py --workdir=runs/beam --stages=select"
    )
    launch(clone, "launch/local.sh annotate --config=configs/annotate_sample.py --workdir=runs/one --stages=select")
    beam, one = (clone / f"runs/{name}/selection/units.jsonl.gz" for name in ("beam", "one"))
    assert beam.read_bytes() == one.read_bytes()
