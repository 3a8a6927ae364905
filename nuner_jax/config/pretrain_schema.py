"""The schema of contrastive pre-training: every key, its default, its unit and the reason for it."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict, config_dict

from nuner_jax.config.fewshot_schema import check_k
from nuner_jax.errors import NunerError

SAMPLE_TOKENIZER = str(Path(__file__).parents[1] / "data" / "sample" / "tokenizer")
"""The folder of the embedded sample's own tokenizer, 8,192 entries."""


CHOICES = {
    "model.init": ("pretrained", "scratch"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "plain", "xla", "cudnn", "splash"),
    "model.remat": ("none", "attention", "layers"),
    "loss.normaliser": ("positives", "pairs"),
    "checkpoint.best": ("retrieval/mrr", "validation/loss"),
}
AT_LEAST = {
    "data.rows": 1,
    "data.row_length": 8,
    "data.concept_row_length": 8,
    "data.concept_length": 3,
    "data.row_multiple": 1,
    "data.prefetch": 0,
    "loss.chunk": 1,
    "loss.scale": 1e-9,
    "optim.accumulate": 1,
    "lr": 0.0,
    "optim.clip_norm": 1e-9,
    "epochs": 1e-9,
    "steps": 0,
    "eval.every": 1,
    "eval.rows": 1,
    "eval.batches": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "transfer.seeds": 1,
    "log_every": 1,
}
AT_MOST = {"model.dropout": 0.999, "optim.warmup": 1.0, "data.validation_fraction": 0.5, "data.max_malformed": 1.0}
"""Upper bounds of values that are at least 0."""
FREE_KEYS = ("data.sources.",)


def check(config: ConfigDict) -> None:
    """What no bound on a single key can say.

    Raises:
      NunerError: naming the key and what it needs.
    """
    if not config.data.sources:
        raise NunerError("config.data.sources is empty: name at least one source of training data")
    check_k("transfer.k", config.transfer.k)


def pretrain() -> ConfigDict:
    """The paper's contrastive pre-training; see `configs/nuner_base.py`."""
    return ConfigDict(
        {
            "task": "pretrain",
            "seed": 0,  # of initialisation, data order and dropout
            "epochs": 10.0,  # visits of the training data (paper); a fraction is allowed
            "steps": config_dict.placeholder(int),  # optimizer updates; if set, it overrides epochs
            "lr": 5e-5,  # peak learning rate, after warm-up
            "data": _data(),
            "model": _model(),
            "loss": _loss(),
            "optim": _optim(),
            "mesh": _mesh(),
            "eval": {
                "every": 500,  # steps between evaluations; one at the start and one at the end besides
                "rows": 32,  # text rows of an evaluation batch
                "batches": config_dict.placeholder(int),  # evaluation batches at most; None: the whole split
            },
            "checkpoint": {
                "every": 500,  # steps between checkpoints; one at the end and one at SIGTERM besides
                "keep": 2,  # latest checkpoints kept, beside the best one
                "best": "retrieval/mrr",  # what chooses the best one; or "validation/loss", which overfits first
                "init_from": config_dict.placeholder(str),  # workdir or checkpoint of another run to start from
            },
            "transfer": {  # the few-shot table at the end: the text encoder before and after, as `fewshot` measures it
                "sets": (),  # known data sets (data/ner/named_sets.py), such as ("travel_desk",); (): no table
                "k": (4, 16),  # mentions of each type to learn from
                "seeds": 5,  # samples of every set and k; 5 are the fewest that have an interval
            },
            "log_every": 50,  # steps between lines of metrics
            "plot": True,  # write training.png at the end
            "export": False,  # write the Hugging Face folder WORKDIR/export at the end
        }
    ).lock()


def source(path: str, weight: float = 1.0) -> ConfigDict:
    """One source of training data.

    Args:
      path: a data set built by `python -m nuner_jax.annotate` or `python -m nuner_jax.data.build`, a file that the
        latter can import (built on first use), an annotation config that replays recorded completions (run on first
        use), or "sample", the embedded sample.
      weight: visits per epoch; a fraction is a seeded part of the source.
    """
    return ConfigDict({"path": path, "weight": float(weight)}).lock()


def sources(**named: ConfigDict) -> ConfigDict:
    """The sources of training data, by name: `sources(web=source("shards/web"), more=source("more.jsonl", 2))`."""
    return ConfigDict(named).lock()


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "sources": sources(sample=source("sample")),
            "cache_dir": "~/.cache/nuner_jax",  # imported shards and tokenised corpora
            "validation_fraction": 0.02,  # share of texts, by hash; used when an importable file is built
            "drop_concept": "concept",  # texts with this concept are left out (paper); "" keeps them
            "max_malformed": 0.05,  # share of rows that an importable file may have malformed; they are counted
            "rows": 64,  # packed rows per optimizer update, over all devices
            "row_length": 512,  # tokens per row; longer texts are split into windows at word boundaries
            "concept_row_length": 512,  # tokens per row of packed concept names
            "concept_length": 32,  # tokens per concept name, special tokens included; longer ones are cut, and counted
            "row_multiple": 8,  # concept rows are a multiple of it; a multiple of the mesh's data x fsdp
            "prefetch": 2,  # batches prepared ahead by a thread and put on the device; 0: none
        }
    ).lock()


def _model() -> ConfigDict:
    return ConfigDict(
        {
            "init": "pretrained",  # or "scratch": random weights of the sizes in `encoder`
            "text": "roberta-base",  # Hugging Face folder or hub name (paper)
            "concept": "roberta-base",  # a separate encoder, discarded after pre-training (paper)
            "tokenizer": config_dict.placeholder(str),  # folder or hub name; None: that of `text`
            "encoder": {  # sizes of both towers from scratch, as in a Hugging Face config.json
                "model_type": "roberta",
                "vocab_size": 50265,
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "max_position_embeddings": 514,
                "type_vocab_size": 1,
                "layer_norm_eps": 1e-5,
                "pad_token_id": 1,
            },
            "frozen_layers": 6,  # bottom layers of the text tower, with its embeddings, left as they are (paper)
            "keep_frozen": False,  # compute the frozen layers once, before training, and keep their vectors in
            # data.cache_dir (bfloat16, without dropout in them); False: in every step
            "dropout": 0.1,  # on embeddings and block outputs, the encoders' own rate
            "concept_pooling": "mean",  # of a name's token vectors; or "first"
            "dtype": "bfloat16",  # of the computation; parameters are float32
            "attention": "auto",  # implementation: "plain", "xla", "cudnn" (NVIDIA, bfloat16), "splash" (TPUs); "auto":
            # plain on CPUs, xla elsewhere (models/attention.py)
            "remat": "none",  # what the backward pass computes again so that memory need not hold it (TPUs, GPUs): the
            # weights of "attention" (few operations, and most memory of long rows), or "layers", all but their inputs
        }
    ).lock()


def _loss() -> ConfigDict:
    return ConfigDict(
        {
            "scale": 768**-0.5,  # initial scale of the dot product (the paper's form: 1, fixed)
            "learn_scale": True,  # the paper's form: False
            "bias": -6.0,  # initial bias, the log of the positive rate: calm first steps (the paper's form: 0, fixed)
            "learn_bias": True,  # the paper's form: False
            "normaliser": "positives",  # what the summed loss is divided by: "positives" or "pairs"
            "chunk": 4096,  # concepts scored at once, at most: memory grows with it, not with the batch's; None: all
        }
    ).lock()


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "end_lr": 0.0,  # at the last step
            "schedule": "cosine",  # or "linear", "constant"
            "warmup": 0.1,  # share of all steps with rising learning rate
            "b1": 0.9,
            "b2": 0.98,  # shorter memory than 0.999: runs of some thousand steps
            "eps": 1e-6,
            "weight_decay": 0.01,  # on matrices and embeddings only
            "clip_norm": 1.0,  # global L2 norm of the gradient
            "accumulate": 1,  # micro-batches per update; each has its own concepts as negatives
        }
    ).lock()


def _mesh() -> ConfigDict:
    return ConfigDict(
        {
            "data": -1,  # devices along the batch; -1: all that the other axes leave
            "fsdp": 1,  # devices along the batch that also share out the parameters
            "tensor": 1,  # devices along heads and MLP columns
            "rules": (  # the first regex found in a parameter's path places its dimensions; no match: replicated
                ("attention/qkv/kernel$", ("fsdp", None, "tensor", None)),  # [D, 3, H, K]
                ("attention/qkv/bias$", (None, "tensor", None)),  # [3, H, K]
                ("attention/out/kernel$", ("tensor", None, "fsdp")),  # [H, K, D]
                ("mlp/up/kernel$", ("fsdp", "tensor")),  # [D, F]
                ("mlp/up/bias$", ("tensor",)),  # [F]
                ("mlp/down/kernel$", ("tensor", "fsdp")),  # [F, D]
                ("embedding$", (None, "fsdp")),  # [V, D]: the width divides where a vocabulary does not
            ),
        }
    ).lock()
