"""The configuration: every key, its default, and the unit or reason of each.

A config file starts from `pretrain()` and changes what it needs to; the keys here are all there are, so a
misspelt one is refused, in a file as on the command line, with the nearest name. "(paper)" marks what
Bogdanov et al. (EMNLP 2024) tell; everything else is our choice.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_dict

from nuner_jax.errors import NunerError

SAMPLE_TOKENIZER = str(Path(__file__).parent / "data" / "sample" / "tokenizer")
"""The folder of the embedded sample's own tokenizer, 8,192 entries."""


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
            "log_every": 50,  # steps between lines of metrics
            "plot": True,  # write training.png at the end
            "export": False,  # write the Hugging Face folder WORKDIR/export at the end
        }
    ).lock()


def source(path: str, weight: float = 1.0) -> ConfigDict:
    """One source of training data.

    Args:
      path: a data set built by `python -m nuner_jax.data.build`, a file that it can import (built on first
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
            "dropout": 0.1,  # on embeddings and block outputs, the encoders' own rate
            "concept_pooling": "mean",  # of a name's token vectors; or "first"
            "dtype": "bfloat16",  # of the computation; parameters are float32
            "attention": "xla",  # implementation, as jax.nn.dot_product_attention takes it: "xla" or "cudnn"
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
            "chunk": config_dict.placeholder(int),  # concepts scored at once; None: all (fast while they fit)
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


def parse_flags(argv: Sequence[str]) -> Sequence[str]:
    """Parses absl flags; before that, looks whether the config file and the overrides of its keys are sound.

    Raises:
      NunerError: a config file that is missing or wrong, with its line; an unknown key, with the nearest one.
    """
    name = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            name = following if match[1] is None else match[1]
    if name:
        known = [key for key, _ in _leaves(load_file(name))]
        for argument in argv:
            override = re.fullmatch(r"--?config\.([^=]+)(=.*)?", argument)
            if override and override[1] not in known:
                raise NunerError(f"--config.{override[1]}: no such key{_nearest(override[1], known)}")
    return flags.FLAGS(list(argv))


def load_file(name: str) -> ConfigDict:
    """The config of "FILE" or "FILE:ARGUMENT".

    Raises:
      NunerError: whatever goes wrong in the file, with its line.
    """
    file, _, argument = name.partition(":")
    try:
        return runpy.run_path(file)["get_config"](*([argument] if argument else []))
    except FileNotFoundError as error:
        raise NunerError(f"--config={name}: {error.strerror}") from error
    except Exception as error:  # a config file is a program: anything can go wrong in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f"{file}, line {lines[-1]}" if lines else file
        unknown = re.search(r'Key "(\w+)" does not exist', str(error))
        reason = f"{type(error).__name__}: {error}"
        if unknown:
            reason = f"no such key {unknown[1]!r}{_nearest(unknown[1], [key for key, _ in _leaves(pretrain())])}"
        raise NunerError(f"--config={name}: {place}: {reason}") from error


def _nearest(key: str, known: Sequence[str]) -> str:
    """The keys most like this one, by their last part or a word of it."""

    def likeness(name: str) -> float:
        last = name.rpartition(".")[2]
        words = [last, *last.split("_")]
        return max(difflib.SequenceMatcher(None, key.rpartition(".")[2], word).ratio() for word in words)

    close = sorted((name for name in known if likeness(name) > 0.7), key=likeness, reverse=True)[:3]
    return f"; did you mean {' or '.join(close)}?" if close else f"; the keys are {', '.join(known)}"


def check(config: ConfigDict) -> None:
    """Refuses values that no run could use, by name, before any work.

    Raises:
      NunerError: naming the key, its value and what it may be.
    """
    choices = {
        "model.init": ("pretrained", "scratch"),
        "model.dtype": ("float32", "bfloat16"),
        "model.attention": ("xla", "cudnn"),
        "loss.normaliser": ("positives", "pairs"),
        "checkpoint.best": ("retrieval/mrr", "validation/loss"),
    }
    flat, known = dict(_leaves(config)), dict(_leaves(pretrain()))
    for key in flat:
        if key not in known and not key.startswith("data.sources."):
            raise NunerError(f"config.{key}: no such key{_nearest(key, list(known))}")
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise NunerError(f"config.{key} = {flat[key]!r}: choose one of {', '.join(map(repr, allowed))}")
    at_least = {
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
        "log_every": 1,
    }
    at_most = {"model.dropout": 0.999, "optim.warmup": 1.0, "data.validation_fraction": 0.5, "data.max_malformed": 1.0}
    for key, least in at_least.items():
        if flat[key] is not None and not flat[key] >= least:  # so that NaN is refused too
            raise NunerError(f"config.{key} = {flat[key]}: at least {least} is needed")
    for key, most in at_most.items():
        if not 0 <= flat[key] <= most:
            raise NunerError(f"config.{key} = {flat[key]}: between 0 and {most} is needed")
    if not config.data.sources:
        raise NunerError("config.data.sources is empty: name at least one source of training data")


def _leaves(config: ConfigDict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def save(config: ConfigDict, path: Path) -> None:
    """Writes the resolved config as JSON: wholly, or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
    os.replace(partial, path)


def read(path: Path) -> ConfigDict:
    """The config that `save` wrote.

    Raises:
      NunerError: there is none, or it cannot be read.
    """
    try:
        return ConfigDict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise NunerError(f"{path} cannot be read as a config: {error}") from error


def difference(config: ConfigDict, path: Path) -> list[str]:
    """What differs between this config and one that `save` wrote: lines "key: there -> here".

    Args:
      config: the config at hand.
      path: the saved one.
    """
    there = dict(_leaves(read(path)))
    here = dict(_leaves(ConfigDict(json.loads(config.to_json_best_effort()))))
    keys = [key for key in here | there if here.get(key) != there.get(key)]
    return [f"{key}: {there.get(key)!r} -> {here.get(key)!r}" for key in keys]
