"""Token classification: every word gets a label, and labels become mentions."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import pretrained, sharding, text_encoder
from nuner_jax.data.ner import datasets
from nuner_jax.data.ner.set_spec import resolve
from nuner_jax.data.records import Record
from nuner_jax.data.tagged import WordLoader
from nuner_jax.decoding import Scheme
from nuner_jax.errors import NunerError
from nuner_jax.models import params as params_lib
from nuner_jax.models.tagger import Tagger
from nuner_jax.performance import costs
from nuner_jax.tasks import batches, text_tower
from nuner_jax.tasks.protocol import Evaluator, Task
from nuner_jax.tasks.tagged_split import TaggedSplit, silent_logits

_EPSILON = 1e-5  # added to the variance of a feature, which may be constant in few words


class Tagging(Task):
    """An encoder with a head on the first sub-token of each word, packed batches, and evaluation by F1."""

    counts = ("words", "tokens")

    def __init__(self, config: ConfigDict, mesh: Mesh, say: Callable[[str], None]):
        """Loads the data and fixes all shapes; no parameter is made yet."""
        self._config, self._mesh = config, mesh
        self.best_metric = config.checkpoint.best
        self.best_is_lower = self.best_metric == "dev/loss"
        if config.eval.patience:
            self.patience = config.eval.patience * config.eval.every
        text_tower.check_platform(config, mesh)
        self._encoder = text_encoder.find(config.model.text) if config.model.init == "pretrained" else None
        self.text_config = text_tower.encoder_config(config.model, self._encoder)
        self.tokenizer = text_tower.load_tokenizer(config.model, self._encoder)
        self.data = _load(config.data)
        for line in datasets.report_table(self.data.report).splitlines():
            say(line)
        self.types = sorted({*self.data.types, *(one.concept for record in self.data.dev for one in record.entities)})
        self.scheme = Scheme.make(config.head.scheme, len(self.types))
        self._graphdef, self._abstract = params_lib.split(nnx.eval_shape(lambda: self._tagger(nnx.Rngs(0))))
        splits = {"train": self._training_records(), "dev": self.data.dev, "test": self.data.test}
        self.splits = {name: self._split(records) for name, records in splits.items() if records}
        for name, split in self.splits.items():
            say(f"{name}: {split.describe()}")
        for line in _unlearnt(splits):
            say(line)
        if "dev" not in self.splits and self.patience:
            raise NunerError(
                f"config.eval.patience needs a dev split, and {self.data.name} has none: name one in "
                "config.data.set.dev, or a share of the train texts in config.data.dev_share"
            )
        rows = config.data.rows // config.optim.accumulate
        self.loader = self._loader("train", rows=rows, seed=config.seed)
        self.batch_rows = dict.fromkeys(("tokens", "segments", "positions", "labels"), rows)
        self.steps_per_epoch = self.loader.packing.batches_per_epoch / config.optim.accumulate
        self._weight_C = _class_weights(self.splits["train"].labels_W, len(self.scheme.type_C), config.loss.balance)

    def _tagger(self, rngs: nnx.Rngs) -> Tagger:
        model, head = self._config.model, self._config.head
        return Tagger(
            self.text_config,
            classes=len(self.scheme.type_C),
            layers=model.layers,
            frozen_layers=self._frozen_layers,
            kind=head.kind,
            width=head.width,
            dropout=head.dropout,
            standardise=head.standardise,
            dtype=jnp.dtype(model.dtype),
            attention=text_tower.attention(model, self._mesh),
            remat=text_tower.remat(model),
            activations=sharding.row_sharding(self._mesh),
            rngs=rngs,
        )

    @property
    def _frozen_layers(self) -> int:
        frozen = self._config.model.frozen_layers
        return self.text_config.num_layers if frozen < 0 else frozen

    def _training_records(self) -> tuple[Record, ...]:
        """Those of the train split that the config asks for."""
        train, chosen = self.data.train, self._config.data.sentences
        if missing := [number for number in chosen if not 0 <= number < len(train)]:
            raise NunerError(
                f"config.data.sentences: there is no sentence {missing[0]} among the {len(train):,} of {self.data.name}"
            )
        return tuple(train[number] for number in chosen) if chosen else train

    def _split(self, records: tuple[Record, ...]) -> TaggedSplit:
        window = min(self._config.data.row_length, self.text_config.max_length)
        return TaggedSplit.make(records, self.types, self.scheme, self.data.split_on_space, self.tokenizer, window)

    def _loader(self, split: str, *, rows: int, seed: int, shuffle: bool = True) -> WordLoader:
        return WordLoader(
            self.splits[split].corpus,
            rows=rows,
            row_length=self._config.data.row_length,
            seed=seed,
            pad_id=self.text_config.pad_token_id,
            shuffle=shuffle,
        )

    def init_params(self, key: jax.Array) -> dict:
        """Random parameters of the encoder and the head."""
        return params_lib.split(self._tagger(nnx.Rngs(key)))[1]

    def pretrained_params(self, abstract_params: dict) -> dict:
        """The encoder that the config names, and what the head is to take off its vectors."""
        text = self._encoder.load_params(abstract_params["text"])
        if not self._config.head.standardise:
            return {"text": text}
        return {"text": text, "head": {"standard": self._standard(text)}}

    def _standard(self, text: dict) -> dict[str, np.ndarray]:
        """Mean and inverse deviation of the training words' vectors."""
        place = sharding.replicated(self._mesh)

        @functools.partial(jax.jit, out_shardings=place)
        def vectors(text, batch):
            tagger = params_lib.merge(self._graphdef, self._abstract | {"text": text})
            return tagger.vectors(batch["tokens"], batch["segments"], batch["positions"])

        total = squares = count = 0.0
        for words_RxV, vectors_RxVxD in self._over("train", vectors, jax.device_put(text, place)):
            here = vectors_RxVxD[words_RxV >= 0].astype(np.float64)
            total, squares, count = total + here.sum(0), squares + np.square(here).sum(0), count + len(here)
        mean_D = total / count
        deviation_D = np.sqrt(np.maximum(squares / count - np.square(mean_D), 0) + _EPSILON)
        return {"mean": mean_D.astype(np.float32), "scale": (1 / deviation_D).astype(np.float32)}

    def is_frozen(self, path: str) -> bool:
        """The bottom of the encoder, and what standardises its vectors."""
        return path.startswith("head/standard/") or text_tower.is_frozen(path, self._frozen_layers)

    def learning_rate_share(self, path: str) -> float:
        """That of the head, and of the encoder from the top layer down to the embeddings."""
        if path.startswith("head/"):
            return self._config.optim.head_factor
        return self._config.optim.layer_decay ** (self.text_config.num_layers + 1 - text_tower.depth(path))

    def vectors(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> jax.Array:
        """Of every word: [R, V, D]."""
        tagger = params_lib.merge(self._graphdef, params)
        return tagger.vectors(batch["tokens"], batch["segments"], batch["positions"], dropout_key)

    def sums(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        """The weighted cross-entropy of the words, and what the batch held."""
        tagger = params_lib.merge(self._graphdef, params)
        logits_RxVxC = tagger(batch["tokens"], batch["segments"], batch["positions"], dropout_key)
        valid_RxV, labels_RxV = batch["labels"] >= 0, jnp.maximum(batch["labels"], 0)
        weight_RxV = jnp.where(valid_RxV, jnp.asarray(self._weight_C, jnp.float32)[labels_RxV], 0.0)
        loss_RxV = optax.softmax_cross_entropy_with_integer_labels(logits_RxVxC, labels_RxV)
        return {
            "loss": jnp.sum(weight_RxV * loss_RxV),
            "weight": jnp.sum(weight_RxV),
            "correct": jnp.sum(valid_RxV & (jnp.argmax(logits_RxVxC, axis=-1) == labels_RxV), dtype=jnp.float32),
            "words": jnp.sum(valid_RxV, dtype=jnp.float32),
            "tokens": jnp.sum(batch["segments"] > 0, dtype=jnp.float32),
        }

    def metrics(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Loss and accuracy per word, and amounts."""
        return {
            "loss": sums["loss"] / jnp.maximum(sums["weight"], 1.0),
            "accuracy": sums["correct"] / jnp.maximum(sums["words"], 1.0),
            "words": sums["words"],
            "tokens": sums["tokens"],
        }

    def train_batch(self, step: int, local_rows: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
        """The micro-batches of a step, stacked."""
        rows = local_rows(self.loader.packing.rows)
        batch = batches.stacked(lambda number: self.loader.batch(number, rows), step, self._config.optim.accumulate)
        words = batch.pop("words")
        return batch | {"labels": np.where(words >= 0, self.splits["train"].labels_W[words], -1)}

    def costs(self, batch: dict[str, np.ndarray] | None = None) -> dict[str, costs.Part]:
        """The encoder, and the head, which reads the words."""
        packing, encoder, model = self.loader.packing, self.text_config, self._config.model
        passes = self._config.optim.accumulate
        text = costs.whole(packing.rows, packing.row_length, passes)
        words = costs.whole(packing.rows, self.loader.words_per_row, passes)
        if batch is not None:
            text = costs.within(batch["segments"])
            words = costs.Load(float(np.sum(batch["labels"] >= 0)), 0.0, passes)
        inputs, classes = len(model.layers) * encoder.hidden_size, len(self.scheme.type_C)
        widths = [inputs, *([self._config.head.width] if self._config.head.kind == "mlp" else []), classes]
        size = jnp.dtype(model.dtype).itemsize
        return costs.tagger(
            costs.encoder(encoder, text, frozen_layers=self._frozen_layers, itemsize=size),
            costs.head(words, list(itertools.pairwise(widths)), self._frozen_layers < encoder.num_layers),
        )

    def evaluators(self) -> dict[str, Evaluator]:
        """F1 on the dev split, if there is one."""
        return {"dev": functools.partial(self._evaluate, "dev")} if "dev" in self.splits else {}

    def final_evaluators(self) -> dict[str, Evaluator]:
        """F1 on the test split."""
        return {"test": functools.partial(self._evaluate, "test")}

    def _evaluate(self, name: str, params: dict) -> Iterator[tuple[str, float]]:
        yield from self.splits[name].scores(self.scheme, self.logits(name, params), self._weight_C)

    def logits(self, name: str, params: dict) -> np.ndarray:
        """The logits [W, C] of all words of a split: "train", "dev" or "test"."""
        logits_WxC = silent_logits(self.splits[name].corpus.num_words, len(self.scheme.type_C))
        for words_RxV, logits_RxVxC in self._over(name, self._logits_step, params):
            logits_WxC[words_RxV[words_RxV >= 0]] = logits_RxVxC[words_RxV >= 0]
        return logits_WxC

    @functools.cached_property
    def _logits_step(self) -> Callable:
        def logits(params, batch):
            return params_lib.merge(self._graphdef, params)(batch["tokens"], batch["segments"], batch["positions"])

        return jax.jit(logits, out_shardings=sharding.replicated(self._mesh))

    def _over(self, split: str, step: Callable, params: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(words [R, V], what `step(params, batch)` makes of them) of all batches of a split, as host arrays."""
        rows = self._config.eval.rows
        loader = self._loader(split, rows=rows, seed=0, shuffle=False)
        place = sharding.row_sharding(self._mesh)
        mine = sharding.local_rows(sharding.batch_sharding(self._mesh), rows)
        for index in range(math.ceil(loader.packing.batches_per_epoch)):
            batch = loader.batch(index)
            words_RxV = batch.pop("words")
            inputs = {
                name: jax.make_array_from_process_local_data(place, value[mine], value.shape)
                for name, value in batch.items()
            }
            yield words_RxV, np.asarray(step(params, inputs))

    def describe(self) -> Iterable[str]:
        """How the data is packed, and how large the model is."""
        packing = self.loader.packing
        yield (
            f"packing: {packing.fill:.1%} of token slots filled; batch: {packing.rows} rows of {packing.row_length}; "
            f"{packing.rows_per_epoch:,} rows an epoch"
        )
        text, head = (text_tower.parameters(self._abstract[part]) for part in ("text", "head"))
        yield (
            f"model: encoder {text:,} parameters, {self._frozen_layers} of {self.text_config.num_layers} "
            f"layers frozen; head {head:,}, {len(self.scheme.type_C)} labels of {len(self.types)} types"
        )

    def save_assets(self, workdir: Path) -> None:
        """The tokenizer."""
        pretrained.save_tokenizer(self.tokenizer, self.text_config, workdir / "tokenizer")

    def export_info(self) -> dict:
        """Sizes of the encoder, the head, its labels, and the fingerprint of the training data."""
        config = self._config
        chosen = json.dumps([self.data.fingerprint, list(config.data.sentences)])
        return {
            "task": "finetune",
            "text": self.text_config.to_hf(),
            "layers": list(config.model.layers),
            "head": config.head.to_dict(),
            "types": self.types,
            "labels": self.scheme.names(self.types),
            "data": hashlib.sha256(chosen.encode()).hexdigest(),
        }

    def closing_lines(self, metrics: dict[str, float], workdir: Path) -> Iterable[str]:
        """What was reached on the test split."""
        yield f"On the {len(self.splits['test'].texts):,} sentences of the test split of {self.data.name}:"
        yield f"  token macro F1        {metrics['test/token_macro_f1']:.1%}"
        yield (
            f"  entity micro F1       {metrics['test/entity_f1']:.1%} (precision "
            f"{metrics['test/entity_precision']:.1%}, recall {metrics['test/entity_recall']:.1%})"
        )
        yield f"  string F1             {metrics['test/string_f1']:.1%}"
        if "dev" not in self.splits:
            yield "There was no dev split, so this is the last checkpoint, and nothing was chosen."


def _load(data: ConfigDict) -> datasets.TaggedSet:
    """The data set of `config.data.set`, with a share of its train split as the dev split if it has none."""
    given = data.set.to_dict()
    given |= {split: _share(given[split]) for split in ("test", "dev")}
    try:
        if data.dev_share and not resolve(given).dev:
            given["dev"] = data.dev_share
        return datasets.load(given)
    except NunerError as error:  # which names the keys as few-shot configs do, that have several sets
        said = str(error).replace(f"config.sets.{given['name']}", "config.data.set")
        said = said.replace(f"config.data.set.dev = {data.dev_share}", f"config.data.dev_share = {data.dev_share}")
        raise NunerError(said) from error


def _share(split: str | None) -> str | float | None:
    """What a config says of a split: "0.1" is a share, all else a name."""
    try:
        return float(split)
    except (TypeError, ValueError):
        return split


def _unlearnt(splits: Mapping[str, Sequence[Record]]) -> Iterator[str]:
    """Says which types of dev and test the training sentences lack, and how many mentions that costs."""
    mentions = {
        name: Counter(one.concept for record in split for one in record.entities) for name, split in splits.items()
    }
    for name in ("dev", "test"):
        lost = {kind: count for kind, count in sorted(mentions[name].items()) if kind not in mentions["train"]}
        if lost:
            shown = ", ".join(f"{kind} ({count:,})" for kind, count in lost.items())
            yield (
                f"{name}: {sum(lost.values()):,} of {mentions[name].total():,} mentions are of types that no training "
                f"sentence has, and cannot be found: {shown}"
            )


def _class_weights(labels_W: np.ndarray, classes: int, balance: float) -> np.ndarray:
    """The weight of a word of each class: n ** -balance where there are n, on average over words 1: float64 [C]."""
    count_C = np.bincount(labels_W, minlength=classes)
    weight_C = np.maximum(count_C, 1.0) ** -balance
    return weight_C * labels_W.size / np.sum(weight_C * count_C)
