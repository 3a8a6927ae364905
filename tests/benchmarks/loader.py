"""How fast the loader of pre-training is, with a million sentences: tokenising, planning and gathering, each alone.

    python tests/benchmarks/loader.py [--data=sample] [--tokenizer=FOLDER] [--sentences=1000000] [--out=runs/loader]

Tokenising is that of --data (what `python -m nuner_jax.data.build` imports): its training texts, from shards to a
corpus on disk, from cold. Planning and gathering have --sentences synthetic ones, a corpus of memory-mapped files: the
lengths of texts, mentions and concept names are drawn from those of --data, mentions are --mentions a sentence
(Poisson), and their concepts are of --concepts names, the n-th most frequent one with weight 1 / (n + 2). The batches
are those of --config.

Planning is done once (which lengths share a row) and for every epoch (which sentence goes where); gathering makes the
batches. "At an epoch's end" is the slowest of the batches around it, one after another without a pause, so with what
is left of planning the next epoch. All figures are medians over --repeats, wall time and CPU time: on a machine that
has other work, the latter tells more. Prints a table and writes result.json below --out.

What came out is in README.md, beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nuner_jax import pretrained  # noqa: E402
from nuner_jax.data import builder, ragged  # noqa: E402
from nuner_jax.data.corpus import Corpus, load_corpus  # noqa: E402
from nuner_jax.data.loader import PackedLoader, concept_tokens  # noqa: E402
from nuner_jax.data.packed_rows import RowStream  # noqa: E402
from nuner_jax.workdir import LIBRARIES, command, versions  # noqa: E402

Seconds = tuple[float, float]  # wall, CPU


def main() -> None:
    """Measures the three, prints and writes the figures."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    data = runpy.run_path(str(options.config))["get_config"]().data
    with tempfile.TemporaryDirectory(dir=options.out) as temporary:
        folder = pathlib.Path(temporary)
        real, tokenising = measure_tokenising(options, data, folder)
        corpus = synthetic(real, options, folder)
        figures = {"tokenising": tokenising, **measure_planning(corpus, data, options.repeats)}
        loader, figures["shapes"] = timed(lambda: make_loader(corpus, data))
        figures |= measure_gathering(loader, options)
        batch = loader.batch(0)
    sentences, texts = count_sentences(batch), real.report["texts"]
    result = {
        "figures": {name: dict(zip(("seconds", "cpu_seconds"), value, strict=True)) for name, value in figures.items()},
        "texts_per_second": texts / figures["tokenising"][0],
        "sentences_per_second": sentences / figures["batch"][0],
        "sentences_per_cpu_second": sentences / figures["batch"][1],
        "batch": {
            "sentences": sentences,
            "tokens": int((batch["segments"] > 0).sum()),
            "pairs": int((batch["pair_positions"] >= 0).sum()),
            "concepts": int((batch["concept_ids"] >= 0).sum()),
        },
        "corpus": {
            "sentences": corpus.source_W.size,
            "tokens_per_sentence": float(corpus.length_W.mean()),
            "mentions": int(corpus.concept_mentions_C.sum()),
            "concepts": int((corpus.concept_mentions_C > 0).sum()),
            "rows_per_epoch": loader.rows_per_epoch,
        },
        "texts_tokenised": texts,
        "options": {name: str(value) for name, value in vars(options).items()},
        "command": command(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(LIBRARIES),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    report(result, options)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sample = ROOT / "nuner_jax" / "data" / "sample"
    parser.add_argument("--data", default="sample", help="a file, 'sample', or an hf: name")
    parser.add_argument("--tokenizer", default=str(sample / "tokenizer"), help="folder, or a name on the hub")
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "configs" / "nuner_base.py")
    parser.add_argument("--sentences", type=int, default=1_000_000)
    parser.add_argument("--mentions", type=float, default=4.4, help="of a sentence, in the mean")
    parser.add_argument("--concepts", type=int, default=200_000, help="names")
    parser.add_argument("--batches", type=int, default=200, help="gathered in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/loader"))
    return parser.parse_args()


# --- What is measured --------------------------------------------------------------------------


def measure_tokenising(options: argparse.Namespace, data: Any, folder: pathlib.Path) -> tuple[Corpus, Seconds]:
    """The corpus of --data, and how long it takes to make it from the shards."""
    tokenizer = pretrained.load_tokenizer(pretrained.resolve(options.tokenizer, pretrained.TOKENIZER_FILES))
    shards = builder.ensure_built(options.data, folder / "shards", validation_fraction=0)
    seconds = []
    for repeat in range(options.repeats):

        def make(cache_dir: pathlib.Path = folder / f"cache{repeat}") -> Corpus:
            sizes = {"window": data.row_length, "concept_length": data.concept_length}
            return load_corpus({"data": shards}, "train", tokenizer, **sizes, cache_dir=cache_dir)

        corpus, taken = timed(make)
        seconds.append(taken)
    return corpus, medians(seconds)


def measure_planning(corpus: Corpus, data: Any, repeats: int) -> dict[str, Seconds]:
    """The packing of the lengths, and the plan of an epoch, each epoch asked for as soon as the one before is there."""
    packing, epochs = [], []
    for _ in range(repeats):
        stream, taken = timed(
            lambda: RowStream(
                corpus.length_W,
                row_length=data.row_length,
                seed=0,
                strata=data.rows,
                load_S=concept_tokens(corpus),
            )
        )
        packing.append(taken)
    stream.placed(np.array([0]))
    for epoch in range(1, repeats + 1):
        first_row = np.array([epoch * stream.rows_per_epoch])
        epochs.append(timed(lambda row=first_row: stream.placed(row))[1])
    return {"packing": medians(packing), "epoch": medians(epochs)}


def measure_gathering(loader: PackedLoader, options: argparse.Namespace) -> dict[str, Seconds]:
    """A batch in the middle of an epoch, and the slowest one where an epoch ends."""
    per_epoch = loader.rows_per_epoch // loader.shapes.rows
    batches, ends = [], []
    for repeat in range(options.repeats):
        first = repeat * per_epoch + per_epoch // 4
        wall, cpu = timed(lambda start=first: [loader.batch(start + place) for place in range(options.batches)])[1]
        batches.append((wall / options.batches, cpu / options.batches))
        around = range((repeat + 1) * per_epoch - 20, (repeat + 1) * per_epoch + 20)
        ends.append(max(timed(lambda index=index: loader.batch(index))[1] for index in around))
    return {"batch": medians(batches), "at an epoch's end": medians(ends)}


def make_loader(corpus: Corpus, data: Any) -> PackedLoader:
    """The loader of the config, over this corpus."""
    return PackedLoader(
        corpus,
        rows=data.rows,
        row_length=data.row_length,
        concept_row_length=data.concept_row_length,
        row_multiple=data.row_multiple,
        seed=0,
        pad_id=1,
    )


def count_sentences(batch: dict[str, np.ndarray]) -> int:
    """Sentences of a batch."""
    return int(batch["segments"].max(axis=1).sum())


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    """What `work` returns, and how long it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


def medians(seconds: list[Seconds]) -> Seconds:
    """The medians of wall and of CPU time."""
    wall, cpu = zip(*seconds, strict=True)
    return statistics.median(wall), statistics.median(cpu)


# --- The synthetic corpus ----------------------------------------------------------------------


def synthetic(real: Corpus, options: argparse.Namespace, folder: pathlib.Path) -> Corpus:
    """A corpus whose lengths are drawn from those of `real`, in memory-mapped files."""
    random = np.random.default_rng(0)
    count, ids = options.sentences, int(real.tokens_T.max()) + 1
    length_W = random.choice(real.length_W, count)
    # A sentence is cut into as many equal parts as it has mentions; each begins with its part, and ends in it.
    mentions_W = np.minimum(random.poisson(options.mentions, count), length_W - 2)
    sequence_M = np.repeat(np.arange(count), mentions_W)
    number_M = ragged.ranges(np.zeros(count), mentions_W)
    begin_M, end_M = ((number_M + step) * (length_W - 2)[sequence_M] // mentions_W[sequence_M] for step in (0, 1))
    longest = real.pair_concepts_P.size / real.concept_mentions_C.sum()  # tokens of a mention, in the mean
    length_M = np.minimum(random.geometric(1 / longest, begin_M.size), end_M - begin_M)
    weight_C = 1 / (np.arange(options.concepts) + 3.0)
    concept_M = random.choice(options.concepts, begin_M.size, p=weight_C / weight_C.sum())
    concept_length_C = random.choice(np.diff(real.concept_offsets_C1), options.concepts)
    arrays = {
        "tokens_T": random.integers(0, ids, length_W.sum(), np.int32),
        "sequence_offsets_W1": ragged.offsets(length_W),
        "source_W": np.zeros(count, np.uint8),
        "pair_positions_P": (1 + ragged.ranges(begin_M, length_M)).astype(np.uint16),
        "pair_concepts_P": np.repeat(concept_M, length_M).astype(np.int32),
        "pair_offsets_W1": ragged.offsets(np.bincount(sequence_M, length_M, count)),
        "concept_tokens_U": random.integers(0, ids, concept_length_C.sum(), np.int32),
        "concept_offsets_C1": ragged.offsets(concept_length_C),
        "concept_mentions_C": np.bincount(concept_M, minlength=options.concepts),
    }
    for name, array in arrays.items():
        array.tofile(folder / name)
        arrays[name] = np.memmap(folder / name, array.dtype, "r")
    names = [f"concept {number}" for number in range(options.concepts)]
    return Corpus(**arrays, concept_names=names, source_names=["synthetic"], report={}, fingerprint="synthetic")


# --- The table ---------------------------------------------------------------------------------


def report(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the figures."""
    corpus, batch, figures = result["corpus"], result["batch"], result["figures"]
    print(
        f"\n{corpus['sentences']:,} sentences of {corpus['tokens_per_sentence']:.1f} tokens in the mean (special tokens"
        f" included), {corpus['mentions']:,} mentions of {corpus['concepts']:,} concepts; a batch has"
        f" {batch['sentences']:,} sentences, {batch['tokens']:,} tokens, {batch['pairs']:,} pairs and"
        f" {batch['concepts']:,} concepts; {result['cores']} cores\n"
    )
    print("| | seconds | CPU seconds |")
    print("|---|---|---|")
    for name, what in (
        ("tokenising", f"tokenising {result['texts_tokenised']:,} texts"),
        ("packing", "packing, once"),
        ("shapes", "the loader's start (packing, and 256 batches for its shapes)"),
        ("epoch", "the plan of an epoch"),
        ("batch", "a batch"),
        ("at an epoch's end", "the slowest batch at an epoch's end"),
    ):
        print(f"| {what} | {figures[name]['seconds']:.4f} | {figures[name]['cpu_seconds']:.4f} |")
    print(f"\ntokenising: {result['texts_per_second']:,.0f} texts a second")
    print(
        f"gathering: {result['sentences_per_second']:,.0f} sentences a second, in one thread"
        f" ({result['sentences_per_cpu_second']:,.0f} a CPU second)"
    )
    print(f"written: {options.out / 'result.json'}")


if __name__ == "__main__":
    main()
