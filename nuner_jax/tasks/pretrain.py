"""Contrastive pre-training: tokens of a text against the concepts that they instantiate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax import losses, pretrained, sharding
from nuner_jax.data.loader import PackedLoader
from nuner_jax.errors import NunerError
from nuner_jax.models import params as params_lib
from nuner_jax.models.encoder import EncoderConfig
from nuner_jax.models.towers import TwoTower
from nuner_jax.performance import costs
from nuner_jax.tasks import batches, frozen_half, retrieval, text_tower
from nuner_jax.tasks.corpora import open_corpora
from nuner_jax.tasks.protocol import Evaluator, Task

_CONCEPT_ROWS = 256  # concept names encoded at once in evaluation; a multiple of it where the mesh needs more


class Pretrain(Task):
    """The two towers, the contrastive loss, packed batches, and evaluation by loss and retrieval."""

    counts = ("sequences", "tokens", "concepts", "concept_tokens")

    def __init__(self, config: ConfigDict, mesh: Mesh, say: Callable[[str], None]):
        """Opens (or builds) the data and fixes all shapes; no parameter is made yet."""
        self._config, self._mesh = config, mesh
        self.best_metric = config.checkpoint.best
        self.best_is_lower = self.best_metric == "validation/loss"
        text_tower.check_platform(config, mesh, {"config.data.row_multiple": config.data.row_multiple})
        self._keeps_frozen = config.model.get("keep_frozen", False)  # runs of before have no such key
        if self._keeps_frozen:
            frozen_half.check(config.model, mesh)
        self.text_config, self.concept_config = (_encoder_config(config, tower) for tower in ("text", "concept"))
        self._graphdef, self._abstract = params_lib.split(nnx.eval_shape(lambda: self._towers(nnx.Rngs(0))))
        self._open_data(say)

    def _open_data(self, say: Callable[[str], None]) -> None:
        """Opens (or builds) both splits, and measures the static shapes of a batch."""
        config, data = self._config, self._config.data
        self.tokenizer = self._load_tokenizer()
        self.corpus, self.validation = open_corpora(
            data,
            self.tokenizer,
            window=min(data.row_length, self.text_config.max_length),
            concept_length=min(data.concept_length, self.concept_config.max_length),
            say=say,
        )
        make_loader = functools.partial(
            PackedLoader,
            row_length=data.row_length,
            concept_row_length=data.concept_row_length,
            row_multiple=data.row_multiple,
            pad_id=self.text_config.pad_token_id,
        )
        self.loader = make_loader(
            self.corpus,
            rows=data.rows // config.optim.accumulate,
            accumulate=config.optim.accumulate,
            seed=config.seed,
            weights={name: source.weight for name, source in data.sources.items()},
        )
        if self._keeps_frozen:
            self.loader.frozen_TxD = frozen_half.unknown(self.corpus, self.text_config.hidden_size)
        # The same batches for every seed of a run, so that their figures compare.
        self.validation_loader = make_loader(self.validation, rows=config.eval.rows, seed=0, shuffle=False)
        self.batch_rows = _row_counts(self.loader)
        self.steps_per_epoch = self.loader.rows_per_epoch / data.rows

    def _load_tokenizer(self):
        """The one tokenizer of both towers, which must fit the weights of both."""
        model = self._config.model
        folders = {"text": model.text, "concept": model.concept}
        if model.tokenizer:
            folders = {"tokenizer": model.tokenizer}
        files = pretrained.TOKENIZER_FILES if model.tokenizer else pretrained.ALL_FILES
        tokenizers = [pretrained.load_tokenizer(pretrained.resolve(name, files)) for name in folders.values()]
        if len({pretrained.tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) > 1:
            raise NunerError(
                f"config.model: {model.text} and {model.concept} have different tokenizers, and the towers share one: "
                "name it in config.model.tokenizer, or take towers of one family"
            )
        for encoder in (self.text_config, self.concept_config):
            pretrained.check_tokenizer(tokenizers[0], encoder)
        return tokenizers[0]

    def _towers(self, rngs: nnx.Rngs) -> TwoTower:
        model, loss = self._config.model, self._config.loss
        return TwoTower(
            self.text_config,
            self.concept_config,
            frozen_layers=model.frozen_layers,
            concept_pooling=model.concept_pooling,
            scale=loss.scale,
            bias=loss.bias,
            dtype=jnp.dtype(model.dtype),
            attention=text_tower.attention(model, self._mesh),
            remat=text_tower.remat(model),
            activations=sharding.row_sharding(self._mesh),
            rngs=rngs,
        )

    def init_params(self, key: jax.Array) -> dict:
        """Random parameters of both towers and of the logit."""
        return params_lib.split(self._towers(nnx.Rngs(key)))[1]

    def pretrained_params(self, abstract_params: dict) -> dict:
        """Both towers from the weights that the config names."""
        towers = {}
        for tower, encoder in (("text", self.text_config), ("concept", self.concept_config)):
            folder = pretrained.resolve(self._config.model[tower])
            towers[tower] = pretrained.load_encoder(folder, encoder, abstract_params[tower])
        return towers

    def begin(self, params: dict, say: Callable[[str], None]) -> None:
        """Computes what the frozen layers make of the training data, where that is kept and not there yet."""
        if not self._keeps_frozen:
            return
        model, place = self._config.model, sharding.row_sharding(self._mesh)

        @functools.partial(jax.jit, out_shardings=place)
        def encode(params: dict, tokens_RxL: jax.Array, segments_RxL: jax.Array) -> jax.Array:
            towers = params_lib.merge(self._graphdef, params)
            return towers.frozen_vectors(tokens_RxL, segments_RxL).astype(frozen_half.DTYPE)

        bottom = frozen_half.Bottom(
            config=self.text_config,
            layers=model.frozen_layers,
            dtype=model.dtype,
            params=params,
            encode=lambda *rows: encode(params, *jax.device_put(rows, place)),
            rows=self.loader.shapes.rows,
            row_length=self.loader.shapes.row_length,
        )
        cache_dir = Path(self._config.data.cache_dir).expanduser()
        self.loader.frozen_TxD = frozen_half.vectors(bottom, self.corpus, cache_dir, say)

    def is_frozen(self, path: str) -> bool:
        """The bottom of the text tower, and the scale and bias where the config fixes them."""
        learned = {"logit/log_scale": self._config.loss.learn_scale, "logit/bias": self._config.loss.learn_bias}
        return text_tower.is_frozen(path, self._config.model.frozen_layers) or not learned.get(path, True)

    def vectors(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Those of the tokens [R, L, D] and of the concepts [Q, S, D]."""
        towers = params_lib.merge(self._graphdef, params)
        text_key, concept_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        slots = batch["concept_ids"].shape[1]
        return (
            towers.token_vectors(batch["tokens"], batch["segments"], text_key, batch.get("frozen")),
            towers.concept_vectors(batch["concept_tokens"], batch["concept_segments"], slots, concept_key),
        )

    def sums(self, params: dict, batch: dict, dropout_key: jax.Array | None) -> dict[str, jax.Array]:
        """The sums of the contrastive loss, and what the batch held."""
        tokens_RxLxD, concepts_QxSxD = self.vectors(params, batch, dropout_key)
        scale, bias = params_lib.merge(self._graphdef, params).logit()
        sums = losses.contrastive_loss(
            self._mesh,
            tokens_RxLxD,
            batch["scored"],
            concepts_QxSxD,
            batch["concept_ids"],
            batch["pair_positions"],
            batch["pair_concepts"],
            scale,
            bias,
            chunk=self._config.loss.chunk,
        )
        counts = {
            "tokens": batch["segments"] > 0,
            "sequences": (batch["segments"][:, 1:] != batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0),
            "concepts": batch["concept_ids"] >= 0,
            "concept_tokens": batch["concept_segments"] > 0,
            "dropped": batch["dropped_pairs"],
        }
        sums |= {name: jnp.sum(value, dtype=jnp.float32) for name, value in counts.items()}
        sums["sequences"] += jnp.sum(batch["segments"][:, 0] > 0, dtype=jnp.float32)
        # Added up apart: put together first, they would be gathered from all devices.
        sums["dropped"] += jnp.sum(batch["dropped_concepts"], dtype=jnp.float32)
        return sums | {"weight": sums[self._config.loss.normaliser], "scale": scale, "bias": bias, "parts": 1.0}

    def metrics(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Loss per positive pair (or per pair), and what tells how training goes."""
        positives, pairs, parts = (jnp.maximum(sums[name], 1.0) for name in ("positives", "pairs", "parts"))
        return {
            "loss": sums["loss"] / jnp.maximum(sums["weight"], 1.0),
            "positive_logit": sums["positive_logits"] / positives,
            "positive_rate": sums["positives"] / pairs,
            "logit_scale": sums["scale"] / parts,
            "logit_bias": sums["bias"] / parts,
            "tokens": sums["tokens"],
            "sequences": sums["sequences"],
            "concepts": sums["concepts"],
            "concept_tokens": sums["concept_tokens"],
            "dropped": sums["dropped"],
        }

    def train_batch(self, step: int, local_rows: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
        """The micro-batches of a step, stacked."""
        return batches.stacked(_local_batch(self.loader, local_rows), step, self._config.optim.accumulate)

    def costs(self, batch: dict[str, np.ndarray] | None = None) -> dict[str, costs.Part]:
        """Both towers and the loss; without a batch every token is scored against every slot of a concept."""
        model, shapes, passes = self._config.model, self.loader.shapes, self._config.optim.accumulate
        if batch is None:
            text = costs.whole(shapes.rows, shapes.row_length, passes)
            concept = costs.whole(shapes.concept_rows, shapes.concept_row_length, passes)
            scored_A = np.full(passes, shapes.rows * shapes.row_length)
            concepts_A = np.full(passes, shapes.concept_rows * shapes.concepts_per_row)
        else:
            text, concept = costs.within(batch["segments"]), costs.within(batch["concept_segments"])
            scored_A, concepts_A = batch["scored"].sum((1, 2)), (batch["concept_ids"] >= 0).sum((1, 2))
        size = jnp.dtype(model.dtype).itemsize
        pairs, vectors = float(scored_A @ concepts_A), float(np.sum(scored_A + concepts_A))
        text_options = {"frozen_layers": model.frozen_layers, "keeps_frozen": self._keeps_frozen}
        return costs.two_towers(
            costs.encoder(self.text_config, text, **text_options, itemsize=size),
            costs.encoder(self.concept_config, concept, frozen_layers=0, itemsize=size),
            costs.contrastive_loss(pairs, vectors, self.text_config.hidden_size, size),
        )

    def evaluators(self) -> dict[str, Evaluator]:
        """Loss and retrieval on the validation split."""
        return {"validation": self._evaluate_loss, "retrieval": self._evaluate_retrieval}

    def _validation_batches(self) -> Iterable[dict[str, jax.Array]]:
        """The batches of the validation split, one after another, as global arrays."""
        loader = self.validation_loader
        return batches.on_devices(loader, _local_batch, _row_counts(loader), self._mesh, self._config.eval.batches)

    @functools.cached_property
    def _loss_step(self) -> Callable:
        return jax.jit(
            lambda params, batch: self.sums(params, jax.tree.map(lambda x: x[0], batch), None),
            out_shardings=sharding.replicated(self._mesh),
        )

    @functools.cached_property
    def _concept_step(self) -> Callable:
        def encode(params, tokens_1xQxK, segments_1xQxK):
            towers = params_lib.merge(self._graphdef, params)
            return towers.concept_vectors(tokens_1xQxK[0], segments_1xQxK[0], 1)[:, 0]

        return jax.jit(encode, out_shardings=sharding.replicated(self._mesh))

    @functools.cached_property
    def _rank_step(self) -> Callable:
        def rank(params, concepts_NxD, batch):
            towers = params_lib.merge(self._graphdef, params)
            tokens_RxLxD = towers.token_vectors(batch["tokens"][0], batch["segments"][0])
            return retrieval.retrieval_sums(
                self._mesh, tokens_RxLxD, concepts_NxD, batch["pair_positions"][0], batch["pair_concepts"][0]
            )

        return jax.jit(rank, out_shardings=sharding.replicated(self._mesh))

    def _evaluate_loss(self, params: dict) -> Iterable[tuple[str, float]]:
        total = _add_up(self._loss_step(params, batch) for batch in self._validation_batches())
        metrics = self.metrics(total)
        yield from ((name, float(metrics[name])) for name in ("loss", "positive_logit"))
        if metrics["dropped"]:
            yield "dropped", float(metrics["dropped"])

    def _evaluate_retrieval(self, params: dict) -> Iterable[tuple[str, float]]:
        place = sharding.batch_sharding(self._mesh)
        rows = -(-_CONCEPT_ROWS // sharding.batch_devices(self._mesh)) * sharding.batch_devices(self._mesh)
        mine = sharding.local_rows(place, rows)
        vectors = []
        for arrays in retrieval.concept_batches(self.validation, rows, self.concept_config.pad_token_id):
            local = {str(i): array[None, mine] for i, array in enumerate(arrays)}
            vectors.append(
                self._concept_step(params, *sharding.to_global(place, local, {"0": rows, "1": rows}).values())
            )
        count = len(self.validation.concept_names)
        concepts_NxD = jnp.concatenate(vectors)[:count]
        total = _add_up(self._rank_step(params, concepts_NxD, batch) for batch in self._validation_batches())
        pairs = max(float(total["pairs"]), 1.0)
        yield "top1", float(total["top1"]) / pairs
        yield "mrr", float(total["reciprocal_rank"]) / pairs
        yield "concepts", float(count)

    def describe(self) -> Iterable[str]:
        """How the data is packed, and how large the model is."""
        shapes = ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(self.loader.shapes).items())
        yield f"packing: {self.loader.fill:.1%} of text slots filled; batch: {shapes}"
        text, concept = (text_tower.parameters(self._abstract[tower]) for tower in ("text", "concept"))
        yield f"model: text tower {text:,} parameters, concept tower {concept:,}"

    def save_assets(self, workdir: Path) -> None:
        """The tokenizer."""
        pretrained.save_tokenizer(self.tokenizer, self.text_config, workdir / "tokenizer")

    def export_info(self) -> dict:
        """Sizes of the towers, pooling, and the fingerprint of the training data."""
        return {
            "task": "pretrain",
            "text": self.text_config.to_hf(),
            "concept": self.concept_config.to_hf(),
            "concept_pooling": self._config.model.concept_pooling,
            "data": self.corpus.fingerprint,
        }

    def closing_lines(self, metrics: dict[str, float], workdir: Path) -> Iterable[str]:
        """What the retrieval figures mean, and the next commands."""
        if "retrieval/mrr" in metrics:
            concepts = int(metrics["retrieval/concepts"])
            chance_top1, chance_mrr = 1 / concepts, sum(1 / rank for rank in range(1, concepts + 1)) / concepts
            yield f"Among the {concepts:,} concepts of the validation split, a mention's token ranks its own first"
            yield f"  in {metrics['retrieval/top1']:.1%} of cases (chance {chance_top1:.2%});"
            yield f"  the mean reciprocal rank is {metrics['retrieval/mrr']:.3f} (chance {chance_mrr:.3f})."
        yield "Next:"
        yield f"  launch/local.sh evaluate --checkpoint={workdir}"
        yield f"  launch/local.sh export --checkpoint={workdir} --out=my_encoder"
        yield f"  launch/local.sh fewshot --config=configs/fewshot.py:{workdir},{workdir}@start"
        yield "  launch/local.sh data.build --input=YOUR_FILE --out=shards/yours"


def _encoder_config(config: ConfigDict, tower: str) -> EncoderConfig:
    """Sizes of a tower: from its pretrained folder, or from the config where training starts from scratch."""
    if config.model.init == "scratch":
        encoder = EncoderConfig.from_hf(config.model.encoder.to_dict())
    else:
        encoder = pretrained.load_encoder_config(pretrained.resolve(config.model[tower], (pretrained.CONFIG,)))
    return dataclasses.replace(encoder, dropout=config.model.dropout)


def _local_batch(loader: PackedLoader, local_rows: Callable[[int], np.ndarray]) -> Callable[[int], dict]:
    """Gives this process's rows of the batch of a number."""
    shapes = loader.shapes
    text, concepts = local_rows(shapes.rows), local_rows(shapes.concept_rows)
    return lambda number: loader.batch(number, text, concepts)


def _row_counts(loader: PackedLoader) -> dict[str, int]:
    """Rows of the whole batch, for each of its arrays."""
    shapes = loader.shapes
    text = ("tokens", "segments", "scored", "pair_positions", "pair_concepts", "dropped_pairs", "frozen")
    concepts = ("concept_tokens", "concept_segments", "concept_ids", "dropped_concepts")
    return dict.fromkeys(text, shapes.rows) | dict.fromkeys(concepts, shapes.concept_rows)


def _add_up(parts: Iterable[dict[str, jax.Array]]) -> dict[str, float]:
    """Host sums of dicts of scalars."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in jax.device_get(part).items():
            total[name] = total.get(name, 0.0) + float(value)
    return total
