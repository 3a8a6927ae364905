"""Contrastive pre-training by this project and by PyTorch/transformers, side by side.

    python tests/benchmarks/pretrain_torch.py [--steps=110] [--rounds=3] [--out=runs/pretrain_torch] --config=FILE \\
        [--config.KEY=VALUE ...]

Both sides train the objective of the config from the same parameters, on the same sentences (windows of the tokenised
corpus, source weights included), with the same number of sentences per update, AdamW, schedule, clipping, dropout and
dtype; pretrain_peer.py is theirs, ours is `python -m nuner_jax.train`. Each is a process of its own, by turns, round
after round, with another seed in each. --steps less --every should be a multiple of --pool: the timed batches of the
peer are then whole pools, with every length as often as it occurs.

Sentences per second: those of all updates after the first `every`, which compile and warm up, over their seconds,
evaluations and checkpoints left out; the median of the rounds. The validation loss after the same number of sentences
is measured by this project's own evaluation for both: the peer's weights are read back as a Hugging Face folder.

On a GPU both sides use the first one that CUDA_VISIBLE_DEVICES leaves. Prints a table, and writes results.json under
--out. What came out is in README.md, beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import sys

from ml_collections import ConfigDict
from processes import ROOT, timed

sys.path.insert(0, str(ROOT))

from nuner_jax.workdir import LIBRARIES, command, read_config, versions
from nuner_jax.writers import read_metrics

OURS, THEIRS = "nuner_jax", "PyTorch/transformers"
OUR_NAMES = {"sentences": "sequences", "tokens": "tokens", "concepts": "concepts"}
"""Amounts of a step by what our metrics call them."""
PEER = pathlib.Path(__file__).with_name("pretrain_peer.py")
NEVER = 10**9
CLOSE = 0.01  # relative difference of the validation losses up to which the two count as trained alike


def main() -> None:
    """Trains both sides in every round, and prints how fast they were and what they reached."""
    options, flags = parse()
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    began = start(options, flags)
    config = read_config(began)
    refuse(config)
    rounds = []
    for number in range(options.rounds):
        seed = config.seed + number
        folder = options.out / f"round{number}"
        ours = run_ours(options, flags, began, folder / "ours", seed)
        theirs = run_theirs(options, flags, began, folder / "theirs", seed, ours)
        rounds.append({"seed": seed, OURS: ours, THEIRS: theirs})
        for name in (OURS, THEIRS):
            losses = ", ".join(f"{loss:.4f} at {step}" for step, loss in rounds[-1][name]["validation_loss"].items())
            rate = rounds[-1][name]["sentences_per_second"]
            print(f"round {number}: {name}: {rate:,.1f} sentences/s; validation loss {losses}", flush=True)
    result = {
        "command": command(),
        "options": {name: str(value) for name, value in vars(options).items()},
        "config": json.loads(config.to_json_best_effort()),
        "data_fingerprint": json.loads((began / "result.json").read_text())["data_fingerprint"],
        "versions": versions((*LIBRARIES, "torch")),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": rounds,
        "summary": summary(rounds),
    }
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    report(options, result)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and those of the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/pretrain_torch"))
    parser.add_argument("--steps", type=int, default=110, help="updates of each side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--every", type=int, default=10, help="updates of warm-up, and between two readings of the clock"
    )
    parser.add_argument("--evaluations", type=int, default=1, help="evenly spaced points of the loss curve")
    parser.add_argument("--pool", type=int, default=50, help="batches within which theirs are sorted by length")
    parser.add_argument("--concept_groups", type=int, default=1, help="parts of their batch's concepts, by length")
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on a GPU"
    )
    options, flags = parser.parse_known_args()
    if not flags or not all(flag.startswith("--config") for flag in flags):
        parser.error(f"--config=FILE is needed, and nothing but --config.KEY=VALUE besides: {' '.join(flags)}")
    if options.steps <= options.every:
        parser.error(f"--steps={options.steps} must be more than the --every={options.every} steps of warm-up")
    return options, flags


def refuse(config: ConfigDict) -> None:
    """Ends where the config asks for what the peer does not do."""
    if config.task != "pretrain":
        sys.exit(f"config.task = {config.task!r}: the peer pre-trains only")
    only = {"optim.accumulate": (config.optim.accumulate, 1), "optim.end_lr": (config.optim.end_lr, 0)}
    only["checkpoint.init_from"] = (config.checkpoint.init_from, None)
    for key, (value, known) in only.items():
        if value != known:
            sys.exit(f"config.{key} = {value!r}: the peer knows {known!r} only")


# --- The two sides -----------------------------------------------------------------------------


def start(options: argparse.Namespace, flags: list[str]) -> pathlib.Path:
    """The workdir of a run of no step: the resolved config, and the parameters that both sides start from."""
    workdir = options.out / "start"
    train(flags, workdir, {"steps": 0, "export": True})
    return workdir


def train(flags: list[str], workdir: pathlib.Path, values: dict) -> None:
    """Our command, with these values of the config; what it printed is in the workdir, its checkpoints are not kept."""
    shutil.rmtree(workdir, ignore_errors=True)
    values = values | {"checkpoint.every": NEVER, "plot": False, "transfer.sets": ()}
    changes = [f"--config.{key}={value}" for key, value in values.items()]
    _, output = timed(["-m", "nuner_jax.train", *flags, *changes, f"--workdir={workdir}"], **first_gpu())
    (workdir / "output.txt").write_text(output)
    shutil.rmtree(workdir / "checkpoints")


def first_gpu() -> dict[str, str]:
    """What leaves a process one GPU, where there are several."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}


def weights(folder: pathlib.Path, tokenizer: pathlib.Path) -> dict:
    """The values of the config that make a run begin with an export, ours or the peer's."""
    logit = json.loads((folder / "nuner.json").read_text())
    return {
        "model.init": "pretrained",
        "model.text": folder,
        "model.concept": folder / "concept",
        "model.tokenizer": tokenizer,
        "loss.scale": math.exp(logit["log_scale"]),
        "loss.bias": logit["bias"],
    }


def run_ours(options, flags: list[str], began: pathlib.Path, workdir: pathlib.Path, seed: int) -> dict:
    """The real command; its figures are those of its metrics.jsonl."""
    values = weights(began / "export", began / "tokenizer") | {
        "seed": seed,
        "steps": options.steps,
        "eval.every": math.ceil(options.steps / options.evaluations),
        "log_every": options.every,
        "export": False,
    }
    train(flags, workdir, values)
    lines, intervals, before = read_metrics(workdir), [], 0
    for line in lines:
        if "train/sequences" in line:
            steps, before = line["step"] - before, line["step"]
            amounts = {name: steps * line[f"train/{ours}"] for name, ours in OUR_NAMES.items()}
            # Of a single step that compiled there is no pace.
            seconds = steps * line.get("train/seconds_per_step", math.nan)
            intervals.append({"step": before, "seconds": seconds, "loss": line["train/loss"]} | amounts)
    device = json.loads((workdir / "result.json").read_text())["devices"]
    return figures(options, intervals) | {"validation_loss": validation_losses(workdir), "device": device}


def validation_losses(workdir: pathlib.Path) -> dict[int, float]:
    """By step."""
    return {line["step"]: line["validation/loss"] for line in read_metrics(workdir) if "validation/loss" in line}


def run_theirs(options, flags: list[str], began: pathlib.Path, workdir: pathlib.Path, seed: int, ours: dict) -> dict:
    """The peer in a process of its own, and then our evaluation of the weights that it saved."""
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    batch = round(ours["sentences"] / options.steps)
    device = "cpu" if ours["device"].endswith("cpu") else "cuda"
    every = math.ceil(options.steps / options.evaluations)
    work = {
        "config": str(began / "config.json"),
        "start": str(began / "export"),
        "data": json.loads((began / "result.json").read_text())["data_fingerprint"],
        "folder": str(workdir),
        "seed": seed,
        "batch": batch,
        "steps": options.steps,
        "every": options.every,
        "pool": options.pool,
        "concept_groups": options.concept_groups,
        "save_at": sorted({*range(every, options.steps, every), options.steps}),
        "compile": options.compile == "on" or (options.compile == "auto" and device == "cuda"),
        "device": device,
    }
    (workdir / "work.json").write_text(json.dumps(work, indent=2))
    # What it takes from this project reads files only; jax must not take memory of the GPU meanwhile.
    timed([str(PEER), str(workdir / "work.json")], JAX_PLATFORMS="cpu", **first_gpu())
    result = json.loads((workdir / "result.json").read_text())
    losses = {}
    for step in work["save_at"]:
        train(flags, workdir / "evaluation", weights(workdir / str(step), began / "tokenizer") | {"steps": 0})
        losses[step] = validation_losses(workdir / "evaluation")[0]
        shutil.rmtree(workdir / str(step))
    return (
        figures(options, result.pop("intervals"))
        | result
        | {"batch": batch, "validation_loss": losses, "torch.compile": work["compile"]}
    )


# --- The figures -------------------------------------------------------------------------------


def figures(options: argparse.Namespace, intervals: list[dict]) -> dict:
    """Sums over a run, and rates over its intervals after the warm-up."""
    steady = [one for one in intervals if one["step"] > options.every]
    seconds = sum(one["seconds"] for one in steady)
    return {
        "sentences": sum(one["sentences"] for one in intervals),
        "sentences_per_second": sum(one["sentences"] for one in steady) / seconds,
        "tokens_per_second": sum(one["tokens"] for one in steady) / seconds,
        "seconds_per_step": seconds / (intervals[-1]["step"] - options.every),
        "intervals": intervals,
    }


def summary(rounds: list[dict]) -> dict:
    """Medians over rounds of both sides, their ratio, and how far apart the losses at the end are (means)."""
    sides = {
        name: {
            "sentences_per_second": statistics.median(one[name]["sentences_per_second"] for one in rounds),
            "tokens_per_second": statistics.median(one[name]["tokens_per_second"] for one in rounds),
            "validation_loss": statistics.mean(list(one[name]["validation_loss"].values())[-1] for one in rounds),
        }
        for name in (OURS, THEIRS)
    }
    ours, theirs = sides[OURS], sides[THEIRS]
    return sides | {
        "ratio": ours["sentences_per_second"] / theirs["sentences_per_second"],
        "ratio_of_tokens": ours["tokens_per_second"] / theirs["tokens_per_second"],
        "loss_difference": ours["validation_loss"] / theirs["validation_loss"] - 1,
    }


def report(options: argparse.Namespace, result: dict) -> None:
    """Prints the table."""
    rounds, found = result["rounds"], result["summary"]
    print(f"\n{result['versions']}\n{result['cores']} cores; {result['command']}\n")
    print("| | device | sentences/s, every round | median | text tokens/s | sentences | validation loss |")
    print("|---|---|---|---|---|---|---|")
    for name in (OURS, THEIRS):
        every = " ".join(f"{one[name]['sentences_per_second']:,.1f}" for one in rounds)
        sentences = statistics.mean(one[name]["sentences"] for one in rounds)
        print(
            f"| {name} | {rounds[0][name]['device']} | {every} | {found[name]['sentences_per_second']:,.1f} | "
            f"{found[name]['tokens_per_second']:,.0f} | {sentences:,.0f} | {found[name]['validation_loss']:.4f} |"
        )
    apart = found["loss_difference"]
    print(f"\nratio of the medians: {found['ratio']:.2f} (of text tokens: {found['ratio_of_tokens']:.2f})")
    within = "within" if abs(apart) <= CLOSE else "NOT within"
    print(f"validation loss, ours against theirs: {apart:+.2%}, {within} the {CLOSE:.0%} that is asked for")
    print(f"written: {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
