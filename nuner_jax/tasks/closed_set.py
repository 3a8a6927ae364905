"""Pre-training on a closed set: the most frequent concepts as the classes of ordinary token classification.

This is how NER-BERT was pre-trained (Liu et al. 2021, arXiv 2112.00405: cross-entropy over 315 types), and a baseline
of NuNER: same texts, same annotation, same packing and schedule, but a head of fixed classes in place of the concept
tower, and so nothing to learn from the long tail of concepts.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import pretrained, sharding, text_encoder
from nuner_jax.data import classes as classes_lib
from nuner_jax.data.corpus import Corpus
from nuner_jax.data.loader import PackedLoader, concept_tokens, visits
from nuner_jax.models import params as params_lib
from nuner_jax.models.tagger import Tagger
from nuner_jax.performance import costs
from nuner_jax.tasks import batches, text_tower
from nuner_jax.tasks.corpora import open_corpora
from nuner_jax.tasks.protocol import Evaluator, Task

CLASSES_FILE = "classes.json"
"""In the workdir: name and mentions of each class, in the order of their labels, from 1."""

_CONCEPT_LENGTH = 32  # names are tokenised with the texts; as in contrastive pre-training, whose cache this shares


class ClosedSet(Task):
    """An encoder with a linear head on every token, packed batches, and evaluation by loss and F1 of the classes."""

    counts = ("sequences", "tokens")

    def __init__(self, config: ConfigDict, mesh: Mesh, say: Callable[[str], None]):
        """Opens (or builds) the data, chooses the classes and fixes all shapes; no parameter is made yet."""
        self._config, self._mesh = config, mesh
        self.best_metric = config.checkpoint.best
        self.best_is_lower = self.best_metric == "validation/loss"
        text_tower.check_platform(config, mesh)
        self._encoder = text_encoder.find(config.model.text) if config.model.init == "pretrained" else None
        self.text_config = text_tower.encoder_config(config.model, self._encoder)
        self.tokenizer = text_tower.load_tokenizer(config.model, self._encoder)
        data = config.data
        train, validation = open_corpora(
            data,
            self.tokenizer,
            window=min(data.row_length, self.text_config.max_length),
            concept_length=min(_CONCEPT_LENGTH, self.text_config.max_length),
            say=say,
        )
        weights = {name: source.weight for name, source in data.sources.items()}
        self._visits_W = np.bincount(visits(train, weights, config.seed), minlength=train.source_W.size)
        self.classes = classes_lib.choose(train, self._visits_W, config.classes.number, config.classes.min_mentions)
        self.corpus, self.validation = (
            classes_lib.labelled(corpus, self.classes.names, config.classes.others) for corpus in (train, validation)
        )
        more = config.classes.others == "class"
        self._count_C = classes_lib.label_counts(self.corpus, self._visits_W, 1 + len(self.classes.names) + more)
        self._graphdef, self._abstract = params_lib.split(nnx.eval_shape(lambda: self._tagger(nnx.Rngs(0))))
        # With the load of all concepts, not of the classes alone, these are the batches of contrastive pre-training.
        self.loader = self._loader(
            self.corpus,
            rows=data.rows // config.optim.accumulate,
            accumulate=config.optim.accumulate,
            seed=config.seed,
            weights=weights,
            load_W=concept_tokens(train),
        )
        # The same batches for every seed of a run, so that their figures compare.
        self.validation_loader = self._loader(
            self.validation, rows=config.eval.rows, seed=0, shuffle=False, load_W=concept_tokens(validation)
        )
        self.batch_rows = _row_counts(self.loader)
        self.steps_per_epoch = self.loader.rows_per_epoch / data.rows

    def _loader(self, corpus: Corpus, **options) -> PackedLoader:
        row_length, pad_id = self._config.data.row_length, self.text_config.pad_token_id
        return PackedLoader(corpus, row_length=row_length, concept_row_length=None, pad_id=pad_id, **options)

    def _tagger(self, rngs: nnx.Rngs) -> Tagger:
        model = self._config.model
        return Tagger(
            self.text_config,
            classes=len(self._count_C),
            layers=(-1,),
            frozen_layers=model.frozen_layers,
            kind="linear",
            width=0,
            dropout=model.dropout,
            standardise=False,
            dtype=jnp.dtype(model.dtype),
            attention=text_tower.attention(model, self._mesh),
            remat=text_tower.remat(model),
            activations=sharding.row_sharding(self._mesh),
            rngs=rngs,
        )

    def init_params(self, key: jax.Array) -> dict:
        """Random parameters of the encoder; a head that says how frequent each label is, whatever it reads.

        So the first steps need not learn the frequencies, which differ by three orders of magnitude; it is what the
        bias is in contrastive pre-training.
        """
        params = params_lib.split(self._tagger(nnx.Rngs(key)))[1]
        share_C = (self._count_C + 1) / np.sum(self._count_C + 1)
        kernel = jnp.zeros_like(params["head"]["out"]["kernel"])
        params["head"]["out"] = {"kernel": kernel, "bias": jnp.log(share_C.astype(np.float32))}
        return params

    def pretrained_params(self, abstract_params: dict) -> dict:
        """The encoder that the config names."""
        return {"text": self._encoder.load_params(abstract_params["text"])}

    def is_frozen(self, path: str) -> bool:
        """The bottom of the encoder."""
        return text_tower.is_frozen(path, self._config.model.frozen_layers)

    def learning_rate_share(self, path: str) -> float:
        """More for the head, which starts from nothing."""
        return self._config.optim.head_factor if path.startswith("head/") else 1.0

    def _logits(self, params: dict, batch: dict, dropout_key: jax.Array | None = None) -> jax.Array:
        """Of every token: [R, L, C] float32."""
        return params_lib.merge(self._graphdef, params)(batch["tokens"], batch["segments"], None, dropout_key)

    def vectors(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> jax.Array:
        """Of every token: [R, L, D]."""
        tagger = params_lib.merge(self._graphdef, params)
        return tagger.vectors(batch["tokens"], batch["segments"], None, dropout_key)

    def sums(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        """The cross-entropy of the tokens that have a label, and what the batch held."""
        return self._loss_sums(self._logits(params, batch, dropout_key), batch)

    def _loss_sums(self, logits_RxLxC: jax.Array, batch: dict) -> dict[str, jax.Array]:
        labels_RxL = batch["labels"]
        loss_RxL = optax.softmax_cross_entropy_with_integer_labels(logits_RxLxC, jnp.maximum(labels_RxL, 0))
        of_class_RxL = (labels_RxL > 0) & (labels_RxL <= len(self.classes.names))
        parts = {
            "loss": jnp.where(labels_RxL >= 0, loss_RxL, 0.0),
            "weight": labels_RxL >= 0,
            "correct": of_class_RxL & (jnp.argmax(logits_RxLxC, axis=-1) == labels_RxL),
            "classed": of_class_RxL,
            "tokens": batch["segments"] > 0,
            "sequences": jnp.max(batch["segments"], axis=1),  # they are numbered from 1 in each row
            "dropped": batch["dropped"],
        }
        return {name: jnp.sum(part, dtype=jnp.float32) for name, part in parts.items()}

    def metrics(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Loss per token with a label, accuracy over the tokens of a class, and amounts."""
        return {
            "loss": sums["loss"] / jnp.maximum(sums["weight"], 1.0),
            "accuracy": sums["correct"] / jnp.maximum(sums["classed"], 1.0),
            "classed_tokens": sums["classed"],
            "tokens": sums["tokens"],
            "sequences": sums["sequences"],
            "dropped": sums["dropped"],
        }

    def train_batch(self, step: int, local_rows: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
        """The micro-batches of a step, stacked."""
        return batches.stacked(_local_batch(self.loader, local_rows), step, self._config.optim.accumulate)

    def costs(self, batch: dict[str, np.ndarray] | None = None) -> dict[str, costs.Part]:
        """The encoder and the head, which reads every token."""
        shapes, encoder, model = self.loader.shapes, self.text_config, self._config.model
        text = costs.whole(shapes.rows, shapes.row_length, self._config.optim.accumulate)
        if batch is not None:
            text = costs.within(batch["segments"])
        return costs.tagger(
            costs.encoder(encoder, text, frozen_layers=model.frozen_layers, itemsize=jnp.dtype(model.dtype).itemsize),
            costs.head(text, [(encoder.hidden_size, len(self._count_C))], model.frozen_layers < encoder.num_layers),
        )

    def evaluators(self) -> dict[str, Evaluator]:
        """Loss, accuracy and F1 on the validation split."""
        return {"validation": self._evaluate}

    def _validation_batches(self) -> Iterator[dict[str, jax.Array]]:
        """The batches of the validation split, one after another, as global arrays."""
        loader = self.validation_loader
        return batches.on_devices(loader, _local_batch, _row_counts(loader), self._mesh, self._config.eval.batches)

    @functools.cached_property
    def _evaluation_step(self) -> Callable:
        def evaluate(params, batch):
            batch = jax.tree.map(lambda x: x[0], batch)
            logits_RxLxC = self._logits(params, batch)
            return self._loss_sums(logits_RxLxC, batch) | {"counts": _counts(logits_RxLxC, batch["labels"])}

        return jax.jit(evaluate, out_shardings=sharding.replicated(self._mesh))

    def _evaluate(self, params: dict) -> Iterator[tuple[str, float]]:
        parts = [jax.device_get(self._evaluation_step(params, batch)) for batch in self._validation_batches()]
        total = jax.tree.map(lambda *values: np.sum(np.array(values, np.float64), axis=0), *parts)
        metrics = self.metrics(total)
        yield "loss", float(metrics["loss"])
        yield "accuracy", float(metrics["accuracy"])
        gold_C, predicted_C, correct_C = total["counts"][:, 1 : 1 + len(self.classes.names)]
        f1_C = 2 * correct_C / np.maximum(gold_C + predicted_C, 1)
        yield "macro_f1", float(f1_C[gold_C > 0].mean()) if gold_C.any() else 0.0
        yield "classes", float(np.sum(gold_C > 0))
        if metrics["dropped"]:
            yield "dropped", float(metrics["dropped"])

    def describe(self) -> Iterable[str]:
        """What the classes are and cover, how the data is packed, and how large the model is."""
        names, mentions = self.classes.names, self.classes.mentions
        yield (
            f"classes: {len(names):,} of {self.classes.num_concepts:,} concepts, with {self.classes.share:.1%} of all "
            f"mentions: from {names[0]!r} ({mentions[0]:,} an epoch) to {names[-1]!r} ({mentions[-1]:,})"
        )
        classed = self._count_C[1 : 1 + len(names)].sum()
        annotated = np.sum(self._visits_W * np.diff(self.corpus.pair_offsets_W1))
        tokens = np.sum(self._visits_W * (self.corpus.length_W - 2))
        others = {"ignore": "left out of the loss", "outside": "taken as outside", "class": "one class more"}
        yield (
            f"tokens: {classed / tokens:.1%} of a class, {(annotated - classed) / tokens:.1%} of other concepts "
            f"({others[self._config.classes.others]}), {1 - annotated / tokens:.1%} outside"
        )
        shapes = self.loader.shapes
        yield f"packing: {self.loader.fill:.1%} of slots filled; batch: {shapes.rows} rows of {shapes.row_length}"
        text, head = (text_tower.parameters(self._abstract[part]) for part in ("text", "head"))
        yield f"model: text tower {text:,} parameters, head {head:,}"

    def save_assets(self, workdir: Path) -> None:
        """The tokenizer and the list of classes."""
        pretrained.save_tokenizer(self.tokenizer, self.text_config, workdir / "tokenizer")
        rows = zip(self.classes.names, self.classes.mentions, strict=True)
        lines = [json.dumps({"name": name, "mentions": mentions}, ensure_ascii=False) for name, mentions in rows]
        (workdir / CLASSES_FILE).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")

    def export_info(self) -> dict:
        """Sizes of the encoder, the classes, and the fingerprint of the training data with its labels."""
        names, others = list(self.classes.names), self._config.classes.others
        labels = json.dumps([self.corpus.fingerprint, names, others])
        return {
            "task": "pretrain_classes",
            "text": self.text_config.to_hf(),
            "classes": names,
            "others": others,
            "data": hashlib.sha256(labels.encode()).hexdigest(),
        }

    def closing_lines(self, metrics: dict[str, float], workdir: Path) -> Iterable[str]:
        """What the figures mean, and the next commands."""
        if (f1 := metrics.get("validation/macro_f1")) is not None:
            found, classes = metrics["validation/accuracy"], int(metrics["validation/classes"])
            yield f"On the validation split, {found:.1%} of the tokens of a class are given it;"
            yield f"  the mean F1 of the {classes:,} classes that occur there is {f1:.1%}."
        yield "Next:"
        yield f"  launch/local.sh evaluate --checkpoint={workdir}"
        yield f"  launch/local.sh fewshot --config=configs/fewshot.py:CONTRASTIVE_WORKDIR,{workdir}"


def _local_batch(loader: PackedLoader, local_rows: Callable[[int], np.ndarray]) -> Callable[[int], dict]:
    """Gives what the model reads of this process's rows of the batch of a number, and the labels."""
    rows = local_rows(loader.shapes.rows)

    def local_batch(number: int) -> dict[str, np.ndarray]:
        batch = loader.batch(number, rows)
        return {
            "tokens": batch["tokens"],
            "segments": batch["segments"],
            "labels": classes_lib.batch_labels(batch),
            "dropped": batch["dropped_pairs"],
        }

    return local_batch


def _row_counts(loader: PackedLoader) -> dict[str, int]:
    """Rows of the whole batch, for each of its arrays."""
    return dict.fromkeys(("tokens", "segments", "labels", "dropped"), loader.shapes.rows)


def _counts(logits_RxLxC: jax.Array, labels_RxL: jax.Array) -> jax.Array:
    """Of each class the tokens that have it, that are given it, and both: float32 [3, C]."""
    valid_RxL, predicted_RxL = labels_RxL >= 0, jnp.argmax(logits_RxLxC, axis=-1)
    gold_RxL = jnp.maximum(labels_RxL, 0)

    def count(of_RxL, where_RxL):
        return jnp.zeros(logits_RxLxC.shape[-1], jnp.float32).at[of_RxL].add(where_RxL)

    correct_RxL = valid_RxL & (predicted_RxL == gold_RxL)
    return jnp.stack([count(gold_RxL, valid_RxL), count(predicted_RxL, valid_RxL), count(gold_RxL, correct_RxL)])
