"""A full fine-tune of one encoder on one data set, by this project and by PyTorch/transformers, side by side.

    python tests/benchmarks/finetune_torch.py --encoder=FOLDER --data=FOLDER [--seeds=3] [--out=runs/finetune_torch]

Both sides have the same data and splits, labels (BIO), learning rate, schedule, warm-up, weight decay, clipping,
dropout and epochs, and about as many sentences per update; both keep the last step, and both are scored by the metrics
of nuner_jax/metrics.py on the best valid labelling (of PyTorch, the plain argmax is shown too). Ours is the real
command, theirs the usual loop around AutoModelForTokenClassification; each runs in a process of its own, by turns,
seed after seed. Prints a table, and writes results.json under --out. --split=dev shows the dev share alone, to choose
by.

What came out is in README.md, beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import numpy as np
from processes import ROOT, timed

sys.path.insert(0, str(ROOT))

from nuner_jax import metrics, pretrained, text_encoder
from nuner_jax.data.ner import datasets
from nuner_jax.data.packed_rows import PackedRows
from nuner_jax.decoding import Scheme
from nuner_jax.tasks.tagged_split import TaggedSplit, silent_logits
from nuner_jax.workdir import LIBRARIES, command, versions

OURS, THEIRS, ARGMAX = "nuner_jax", "PyTorch/transformers", "PyTorch/transformers, argmax"
SCORES = ("entity_f1", "entity_precision", "entity_recall", "token_macro_f1", "string_f1")


def main() -> None:
    """Trains both sides on every seed, and prints what they reached."""
    options = parse()
    if options.torch_seed is not None:
        print(json.dumps(train_torch(options, options.torch_seed)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    data, splits, _, _ = load(options)
    rows = rows_per_update(options, splits["train"])
    rounds = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        ours, theirs = run_ours(options, seed, rows), run_theirs(options, seed)
        argmax = {split: found["argmax"] for split, found in theirs["scores"].items()}
        rounds.append({"seed": seed, OURS: ours, THEIRS: theirs})
        for name, side in ((OURS, ours), (THEIRS, theirs)):
            shown = ", ".join(f"{split} {one['entity_f1']:.1%}" for split, one in visible(options, side["scores"]))
            print(f"seed {seed}: {name}: entity F1 {shown}; {side['steps']} steps, {side['seconds']:.0f} s", flush=True)
        print(f"seed {seed}: {ARGMAX}: " + ", ".join(f"{s} {f:.1%}" for s, f in visible(options, argmax)), flush=True)
    result = {
        "command": command(),
        "options": {name: str(value) for name, value in vars(options).items()},
        "rows": rows,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "sentences": sizes(splits)},
        "versions": versions((*LIBRARIES, "torch")),
        "cores": os.cpu_count(),
        "rounds": rounds,
    }
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    report(options, result)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="Hugging Face folder, for both sides")
    parser.add_argument("--data", required=True, help="folder of CoNLL files: train.txt, test.txt")
    parser.add_argument("--name", default="wnut17", help="what the data set is called")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/finetune_torch"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--split", choices=("both", "dev"), default="both", help="whose scores are shown")
    parser.add_argument("--dev_share", type=float, default=0.1, help="of the training sentences, by their hash")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=32, help="sentences per update; ours is rows of about as many")
    parser.add_argument("--row_length", type=int, default=128, help="tokens, of our packed rows")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--head_factor", type=float, default=10.0, help="the head's learning rate, as a multiple")
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the encoder's blocks and of the head's input")
    parser.add_argument(
        "--attention_dropout", type=float, default=0.1, help="theirs alone, as transformers has it; ours has none"
    )
    parser.add_argument("--torch_seed", type=int, help=argparse.SUPPRESS)  # the process of their side
    return parser.parse_args()


def load(options: argparse.Namespace):
    """(the data set, its splits as words with labels, the scheme, the tokenizer): the same for both sides."""
    given = {"name": options.name, "path": options.data} | ({"dev": options.dev_share} if options.dev_share else {})
    data = datasets.load(given)
    scheme, tokenizer = Scheme.make("bio", len(data.types)), text_encoder.find(options.encoder).load_tokenizer()
    records = {"train": data.train, "dev": data.dev, "test": data.test}
    splits = {
        name: TaggedSplit.make(part, data.types, scheme, data.split_on_space, tokenizer, options.row_length)
        for name, part in records.items()
        if part
    }
    return data, splits, scheme, tokenizer


def rows_per_update(options: argparse.Namespace, train: TaggedSplit) -> int:
    """Our packed rows that hold about as many sentences as a batch of theirs."""
    lengths = np.diff(train.corpus.sequence_offsets_S1)
    packing = PackedRows(lengths, rows=1, row_length=options.row_length, seed=0)
    return max(1, round(options.batch * packing.rows_per_epoch / len(train.texts)))


def sizes(splits: dict[str, TaggedSplit]) -> dict[str, int]:
    """Sentences of each split."""
    return {name: len(split.texts) for name, split in splits.items()}


# --- The two sides -----------------------------------------------------------------------------


def run_ours(options: argparse.Namespace, seed: int, rows: int) -> dict:
    """The real command, with the scores that it printed into result.json."""
    workdir = options.out / f"ours_{seed}_{time.time_ns()}"
    never = 10**9
    values = {
        "data.set.name": options.name,
        "data.set.path": options.data,
        "data.dev_share": options.dev_share,
        "data.rows": rows,
        "data.row_length": options.row_length,
        "seed": seed,
        "epochs": options.epochs,
        "lr": options.lr,
        "optim.warmup": options.warmup,
        "optim.weight_decay": options.weight_decay,
        "optim.head_factor": options.head_factor,
        "model.dropout": options.dropout,
        "head.dropout": options.dropout,
        "eval.every": never,
        "checkpoint.every": never,
        "plot": False,
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    config = f"--config=configs/finetune.py:{options.encoder}"
    seconds, output = timed(["-m", "nuner_jax.train", config, f"--workdir={workdir.absolute()}", *flags])
    (workdir / "output.txt").write_text(output)
    result = json.loads((workdir / "result.json").read_text())
    found: dict[str, dict[str, float]] = {}
    for name, value in result["metrics"].items():
        split, _, score = name.partition("/")
        if score in SCORES:
            found.setdefault(split, {})[score] = value
    return {"scores": found, "steps": result["step"], "seconds": seconds, "workdir": str(workdir)}


def run_theirs(options: argparse.Namespace, seed: int) -> dict:
    """The side of PyTorch, in a process of its own."""
    seconds, output = timed([str(pathlib.Path(__file__).resolve()), *sys.argv[1:], f"--torch_seed={seed}"])
    return json.loads(output.splitlines()[-1]) | {"seconds": seconds}


def train_torch(options: argparse.Namespace, seed: int) -> dict:
    """The usual fine-tune: padded batches, AdamW, a linear schedule, the label of a word on its first sub-token."""
    import torch
    from transformers import AutoModelForTokenClassification, get_linear_schedule_with_warmup

    data, splits, scheme, tokenizer = load(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(
        pretrained.resolve(options.encoder),
        num_labels=len(scheme.type_C),
        hidden_dropout_prob=options.dropout,
        classifier_dropout=options.dropout,
        attention_probs_dropout_prob=options.attention_dropout,
    ).to(device)
    sentences = encoded(splits["train"], tokenizer)
    updates = int(np.ceil(options.epochs * len(sentences) / options.batch))
    optimizer = torch.optim.AdamW(parameter_groups(model, options))
    schedule = get_linear_schedule_with_warmup(optimizer, round(options.warmup * updates), updates)
    order = np.random.default_rng(seed)
    queue: list[int] = []
    model.train()
    for _ in range(updates):
        queue = queue or order.permutation(len(sentences)).tolist()
        batch, queue = queue[: options.batch], queue[options.batch :]
        loss = model(**padded([sentences[number] for number in batch], tokenizer, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    scored = {name: score(splits[name], scheme, model, tokenizer, device) for name in splits if name != "train"}
    return {"scores": scored, "steps": updates}


def parameter_groups(model, options: argparse.Namespace) -> list[dict]:
    """As transformers' Trainer divides them (no decay of biases and layer norms), the head's with its learning rate."""
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        factor = options.head_factor if name.startswith("classifier") else 1.0
        decay = 0.0 if name.endswith("bias") or "LayerNorm" in name else options.weight_decay
        groups.setdefault((options.lr * factor, decay), []).append(parameter)
    return [{"params": those, "lr": lr, "weight_decay": decay} for (lr, decay), those in groups.items()]


def encoded(split: TaggedSplit, tokenizer) -> list[dict]:
    """Each sentence's token ids, the place of each word's first one (-1: it has none), and its labels."""
    sentences = []
    for at, text in enumerate(split.texts):
        encoding = tokenizer(text.split(" "), is_split_into_words=True, truncation=False, verbose=False)
        first, after = split.sentence_offsets_S1[at : at + 2]
        place_W = np.full(after - first, -1)
        for token, word in reversed(list(enumerate(encoding.word_ids()))):
            if word is not None:
                place_W[word] = token
        sentences.append({"ids": encoding["input_ids"], "places": place_W, "labels": split.labels_W[first:after]})
    return sentences


def padded(sentences: list[dict], tokenizer, device) -> dict:
    """A batch, padded to its longest sentence; tokens that are no word's first one have no label (-100)."""
    import torch

    shape = len(sentences), max(len(one["ids"]) for one in sentences)
    ids, mask = np.full(shape, tokenizer.pad_token_id), np.zeros(shape, np.int64)
    labels = np.full(shape, -100)
    for row, one in enumerate(sentences):
        ids[row, : len(one["ids"])], mask[row, : len(one["ids"])] = one["ids"], 1
        there_W = one["places"] >= 0
        labels[row, one["places"][there_W]] = one["labels"][there_W]
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(value, device=device) for name, value in arrays.items()}


def score(split: TaggedSplit, scheme: Scheme, model, tokenizer, device) -> dict:
    """The scores of a split, by our metrics: of the best valid labelling, and of the largest logits."""
    import torch

    model.eval()
    logits_WxC = silent_logits(split.corpus.num_words, len(scheme.type_C))
    sentences = encoded(split, tokenizer)
    with torch.no_grad():
        for start in range(0, len(sentences), 64):
            block = sentences[start : start + 64]
            logits = model(**padded(block, tokenizer, device)).logits.cpu().numpy()
            for row, one in enumerate(block):
                first, there_W = split.sentence_offsets_S1[start + row], one["places"] >= 0
                logits_WxC[first + np.flatnonzero(there_W)] = logits[row, one["places"][there_W]]
    found = dict(split.scores(scheme, logits_WxC, np.ones(len(scheme.type_C))))
    spans = scheme.spans(logits_WxC.argmax(1), split.sentence_offsets_S1)
    largest = spans.in_characters(split.characters_Wx2, split.sentence_offsets_S1)
    argmax = metrics.entity_micro_f1(split.mentions, largest, scheme.num_types)
    return {name: found[name] for name in SCORES} | {"argmax": float(argmax.f1_H[0])}


# --- The table ---------------------------------------------------------------------------------


def visible(options: argparse.Namespace, scores: dict) -> list[tuple[str, object]]:
    """The splits whose scores are shown."""
    return [(split, one) for split, one in sorted(scores.items()) if options.split == "both" or split == "dev"]


def report(options: argparse.Namespace, result: dict) -> None:
    """Prints mean, standard deviation and every seed, and how far apart the two sides are."""
    rounds = result["rounds"]
    print(f"\n{result['data']['name']} {result['data']['fingerprint'][:12]}, {result['data']['sentences']} sentences")
    print(f"{result['versions']}\n{result['command']}\n")
    for split, _ in visible(options, rounds[0][OURS]["scores"]):
        values = {
            OURS: [one[OURS]["scores"][split]["entity_f1"] for one in rounds],
            THEIRS: [one[THEIRS]["scores"][split]["entity_f1"] for one in rounds],
            ARGMAX: [one[THEIRS]["scores"][split]["argmax"] for one in rounds],
        }
        print(f"| entity F1, {split} | mean | standard deviation | every seed | seconds |")
        print("|---|---|---|---|---|")
        for name, found in values.items():
            seconds = " ".join(f"{one[name]['seconds']:.0f}" for one in rounds) if name in rounds[0] else ""
            every = " ".join(f"{100 * value:.1f}" for value in found)
            print(
                f"| {name} | {100 * statistics.mean(found):.1f} | {100 * deviation(found):.1f} | {every} | {seconds} |"
            )
        apart = 100 * (statistics.mean(values[OURS]) - statistics.mean(values[THEIRS]))
        print(f"ours less theirs: {apart:+.1f} points\n")
    print(f"written: {options.out / 'results.json'}")


def deviation(values: list[float]) -> float:
    """The standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
