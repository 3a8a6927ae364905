"""The few-shot table made the usual way, with transformers' Trainer, and ours: how long each takes, what each finds.

    python tests/benchmarks/fewshot_trainer.py --encoder=FOLDER --set=wnut17=FOLDER --set=crossner_ai=FOLDER --out=DIR

Needs torch, transformers and accelerate. Both sides are processes from cold, by turns (ours, Trainer, ours), and make
the same table: the same samples, test sentences, updates, and head (first sub-tokens, standardised features, two
layers, weighted loss, AdamW, cosine), on an encoder that is not trained. Trainer runs it at every update, and over the
test sentences for every head, as one would write it: dynamic padding, test sentences sorted by length, the whole
support as one batch where it has at most 512 words, no checkpoints, no reports, no gradient through the encoder. Its
time is that of its process, without the reading of the sets; ours is everything, tables and page included.

--out gets result.json: seconds of both, their ratio, token macro F1 of every set, k and seed on both sides, versions,
command.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

EVALUATION_BATCH = 64  # sentences
TORCH_SEED = 1  # of the order of the batches; the heads' own seeds are those of the samples


def main() -> None:
    """Measures both sides, or, called by itself with --work, is the Trainer's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="Hugging Face folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--k", default="4,16")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max_sentences", type=int, default=400, help="of each test split")
    parser.add_argument("--steps", type=int, default=300, help="updates of every head")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        make_table(json.loads(options.work.read_text()), options.work.with_name("trainer.json"))
    elif not (options.encoder and options.set and options.out):
        parser.error("--encoder, --set and --out are needed")
    else:
        compare(options)


# --- Both sides --------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> None:
    """Runs ours, Trainer, ours; prints and writes what came of it."""
    from nuner_jax.workdir import LIBRARIES, command, versions  # here, so that Trainer's process imports no JAX

    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    config_file = out / "table.py"
    config_file.write_text(config_text(options))
    write_work(config_file, out / "work.json")
    seconds = {"ours": [], "trainer": []}
    trainer = [sys.executable, __file__, f"--work={out / 'work.json'}"]
    for turn, side in enumerate(("ours", "trainer", "ours")):
        run = out / f"run{turn}"
        ours = [sys.executable, "-m", "nuner_jax.fewshot", f"--config={config_file}", f"--workdir={run}"]
        ours.append(f"--config.cache_dir={run}/cache")  # nothing is compiled before
        seconds[side].append(timed(ours if side == "ours" else trainer, out / f"{turn}_{side}.log"))
        print(f"{side}: {seconds[side][-1]:.1f} s", flush=True)
    rows = [json.loads(line) for line in (out / "run0" / "results.jsonl").read_text().splitlines()]
    cells = paired_cells(rows, json.loads((out / "trainer.json").read_text()))
    result = {
        "seconds": {side: [round(value, 1) for value in values] for side, values in seconds.items()},
        "ratio": round(statistics.mean(seconds["trainer"]) / statistics.mean(seconds["ours"]), 1),
        "token_macro_f1": cells,
        "mean_difference": round(statistics.mean(cell["ours"] - cell["trainer"] for cell in cells), 4),
        "command": command(),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "versions": versions((*LIBRARIES, "torch", "accelerate")),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print_result(result)


def config_text(options: argparse.Namespace) -> str:
    """The config of our side."""
    sets = {
        name: {"path": str(pathlib.Path(path).absolute())} for name, _, path in (s.partition("=") for s in options.set)
    }
    k = tuple(int(number) for number in options.k.split(","))
    return f"""from nuner_jax.config import fewshot


def get_config():
    config = fewshot()
    config.encoders = {{"encoder": {str(pathlib.Path(options.encoder).absolute())!r}}}
    config.sets = {sets!r}
    config.k, config.seeds = {k!r}, {options.seeds}
    config.head.steps = {options.steps}
    config.eval.max_sentences = {options.max_sentences}
    return config
"""


def write_work(config_file: pathlib.Path, path: pathlib.Path) -> None:
    """What the Trainer's side reads: sentences with words and labels, those of each sample, and the head."""
    from nuner_jax import config as config_lib
    from nuner_jax.data.ner import datasets
    from nuner_jax.fewshot.material import Material, Sentences

    config = config_lib.load_file(str(config_file))

    def plain(sentences: Sentences) -> list[dict]:
        labels = np.split(sentences.labels_W, sentences.offsets_S1[1:-1])
        triples = zip(sentences.texts, sentences.spans, labels, strict=True)
        return [{"text": text, "starts": spans[:, 0].tolist(), "labels": one.tolist()} for text, spans, one in triples]

    sets = {}
    for name in config.sets:
        data = datasets.load({**config.sets[name].to_dict(), "name": name})
        of_set = Material.of(data, config.k, range(config.seeds), config.rule, config.eval.max_sentences)
        pool, places = plain(of_set.pool), {number: at for at, number in enumerate(of_set.drawn_P.tolist())}
        samples = [
            {"k": k, "seed": seed, "hash": one.hash, "sentences": [pool[places[number]] for number in one.ids]}
            for (k, seed), one in of_set.samples.items()
        ]
        sets[name] = {"classes": len(data.types) + 1, "test": plain(of_set.query), "samples": samples}
    work = {"encoder": config.encoders.encoder, "head": config.head.to_dict(), "sets": sets}
    path.write_text(json.dumps(work))


def timed(arguments: list[str], log: pathlib.Path) -> float:
    """Seconds of a process from its start to its end; what it printed is in `log`."""
    began = time.perf_counter()
    with open(log, "w") as file:
        subprocess.run(
            arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=file, stderr=file, check=True
        )
    return time.perf_counter() - began


def paired_cells(rows: list[dict], theirs: list[dict]) -> list[dict]:
    """Both sides' figures of every set, k and seed; they must come from the same sentences."""
    found = {(row["set"], row["k"], row["seed"]): row for row in rows}
    cells = []
    for cell in theirs:
        row = found.pop((cell["set"], cell["k"], cell["seed"]))
        assert row["sample_hash"] == cell["hash"], cell
        cells.append(
            {key: cell[key] for key in ("set", "k", "seed")} | {"ours": row["token_macro_f1"], "trainer": cell["f1"]}
        )
    assert not found, found.keys()
    return cells


def print_result(result: dict) -> None:
    """The figures, and the JSON on one line."""
    print(f"{'set':<20}{'k':>4}{'seed':>6}{'ours':>8}{'Trainer':>9}   token macro F1, points")
    for cell in result["token_macro_f1"]:
        points = f"{100 * cell['ours']:8.1f}{100 * cell['trainer']:9.1f}"
        print(f"{cell['set']:<20}{cell['k']:>4}{cell['seed']:>6}{points}")
    print(f"mean difference: {100 * result['mean_difference']:+.2f} points")
    print(f"Trainer takes {result['ratio']} times as long as ours")
    print(json.dumps(result))


# --- The usual way -----------------------------------------------------------------------------


def make_table(work: dict, path: pathlib.Path) -> None:
    """A Trainer for every set, k and seed; writes token macro F1 of each."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work["encoder"])
    encoder = AutoModel.from_pretrained(work["encoder"]).eval().requires_grad_(False)
    cells = []
    for name, one in work["sets"].items():
        test = sorted(tokenised(one["test"], tokenizer), key=lambda example: len(example["input_ids"]))
        for sample in one["samples"]:
            support = tokenised(sample["sentences"], tokenizer)
            trainer = make_trainer(
                encoder, tokenizer, support, one["classes"], work["head"], sample["seed"], path.parent
            )
            trainer.train()
            predictions, labels, _ = trainer.predict(test)
            f1 = token_macro_f1(labels, predictions, one["classes"])
            cells.append({"set": name, "k": sample["k"], "seed": sample["seed"], "hash": sample["hash"], "f1": f1})
            print(cells[-1], flush=True)
    path.write_text(json.dumps(cells))


def tokenised(sentences: list[dict], tokenizer) -> list[dict]:
    """Token ids, and labels on the first sub-token of each word; -100 elsewhere."""
    examples = []
    for sentence in sentences:
        encoding = tokenizer(sentence["text"], truncation=True)
        labels = [-100] * len(encoding["input_ids"])
        for start, label in zip(sentence["starts"], sentence["labels"], strict=True):
            token = encoding.char_to_token(start)
            if token is not None:
                labels[token] = label
        examples.append({"input_ids": encoding["input_ids"], "labels": labels})
    return examples


def make_trainer(encoder, tokenizer, support: list[dict], classes: int, head: dict, seed: int, folder: pathlib.Path):
    """The Trainer of one head."""
    import torch
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    words = sum(label >= 0 for example in support for label in example["labels"])
    batch = len(support) if words <= head["batch"] else max(1, round(len(support) * head["batch"] / words))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=head["steps"],
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=EVALUATION_BATCH,
        learning_rate=head["lr"],
        weight_decay=head["weight_decay"],  # not on biases, as ours
        lr_scheduler_type="cosine",
        warmup_steps=0,
        max_grad_norm=0.0,  # no clipping, as ours
        seed=TORCH_SEED,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    return Trainer(
        model=make_model(encoder, support, classes, head, seed),
        args=arguments,
        train_dataset=support,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


def make_model(encoder, support: list[dict], classes: int, head: dict, seed: int):
    """The frozen encoder, features standardised over the support, and a head of two layers."""
    import torch
    from torch import nn

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder
            mean_D, deviation_D, counts_C = self._of_support()
            self.register_buffer("mean_D", mean_D)
            self.register_buffer("deviation_D", deviation_D)
            self.loss = nn.CrossEntropyLoss(weight=counts_C.clamp(min=1) ** -head["balance"], ignore_index=-100)
            generator = torch.Generator().manual_seed(seed)
            width = mean_D.numel()
            inner, last = nn.Linear(width, head["width"]), nn.Linear(head["width"], classes)
            nn.init.normal_(inner.weight, std=width**-0.5, generator=generator)
            for zeros in (inner.bias, last.weight, last.bias):
                nn.init.zeros_(zeros)
            self.head = nn.Sequential(inner, nn.GELU(), last)

        def train(self, mode: bool = True):
            super().train(mode)
            self.encoder.eval()  # without dropout, as ours
            return self

        @torch.no_grad()
        def _of_support(self):
            """Mean and deviation of each feature, and the words of each class."""
            vectors, labels = [], []
            for example in support:
                hidden_LxD = self.encoder(input_ids=torch.tensor([example["input_ids"]])).last_hidden_state[0]
                label_L = torch.tensor(example["labels"])
                vectors.append(hidden_LxD[label_L >= 0])
                labels.append(label_L[label_L >= 0])
            words_WxD = torch.cat(vectors)
            deviation_D = (words_WxD.var(0, unbiased=False) + 1e-5).sqrt()
            return words_WxD.mean(0), deviation_D, torch.bincount(torch.cat(labels), minlength=classes).float()

        def forward(self, input_ids, attention_mask, labels=None, **unused):
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.head((hidden - self.mean_D) / self.deviation_D)
            return {"loss": self.loss(logits.view(-1, classes), labels.view(-1)), "logits": logits}

    return Tagger()


def token_macro_f1(labels_SxL: np.ndarray, predicted_SxL: np.ndarray, classes: int) -> float:
    """Mean F1 over the types that the test sentences have; outside is no type."""
    kept = labels_SxL >= 0
    labels, predicted = labels_SxL[kept], predicted_SxL[kept]
    scores = []
    for type_ in range(1, classes):
        hits = np.sum((labels == type_) & (predicted == type_))
        if np.any(labels == type_):
            scores.append(2 * hits / (np.sum(labels == type_) + np.sum(predicted == type_)))
    return float(np.mean(scores))


if __name__ == "__main__":
    main()
