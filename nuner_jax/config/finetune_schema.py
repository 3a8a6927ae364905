"""The schema of fine-tuning (token classification): every key, its default, its unit and the reason for it."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from nuner_jax.config.pretrain_schema import pretrain
from nuner_jax.errors import NunerError

CHOICES = {
    "model.init": ("pretrained", "scratch"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "plain", "xla", "cudnn", "splash"),
    "model.remat": ("none", "attention", "layers"),
    "head.kind": ("linear", "mlp"),
    "head.scheme": ("io", "bio", "bilou"),
    "checkpoint.best": ("dev/entity_f1", "dev/token_macro_f1", "dev/string_f1", "dev/loss"),
}
AT_LEAST = {
    "data.rows": 1,
    "data.row_length": 8,
    "data.prefetch": 0,
    "model.frozen_layers": -1,
    "head.width": 1,
    "loss.balance": 0.0,
    "lr": 0.0,
    "optim.accumulate": 1,
    "optim.head_factor": 0.0,
    "optim.clip_norm": 1e-9,
    "epochs": 1e-9,
    "steps": 0,
    "eval.every": 1,
    "eval.rows": 1,
    "eval.patience": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "log_every": 1,
}
AT_MOST = {
    "data.dev_share": 0.9,
    "model.dropout": 0.999,
    "head.dropout": 0.999,
    "optim.warmup": 1.0,
    "optim.layer_decay": 1.0,
}
"""Upper bounds of values that are at least 0."""
FREE_KEYS = ()


def check(config: ConfigDict) -> None:
    """What no bound on a single key can say.

    Raises:
      NunerError: naming the key and what it needs.
    """
    if not config.model.layers:
        raise NunerError("config.model.layers is empty: name at least one hidden layer, such as (-1,)")
    if config.head.standardise and config.model.init == "scratch" and not config.checkpoint.init_from:
        raise NunerError(
            "config.head.standardise needs a pretrained encoder: mean and deviation are those of its vectors before "
            "training; set config.model.init = 'pretrained', or standardise = False"
        )
    if config.eval.patience and config.eval.every % config.checkpoint.every:
        raise NunerError(
            f"config.eval.patience counts from the best checkpoint, so every evaluation needs one: choose an "
            f"eval.every ({config.eval.every}) that is a multiple of checkpoint.every ({config.checkpoint.every})"
        )
    if config.export and (config.head.kind != "linear" or tuple(config.model.layers) != (-1,)):
        raise NunerError(
            "config.export: transformers has no class for such a tagger, only for a linear head on the last layer: "
            "set config.head.kind = 'linear' and config.model.layers = (-1,), or export = False"
        )


def finetune() -> ConfigDict:
    """Token classification; see `configs/finetune.py`."""
    shared = pretrain()
    return ConfigDict(
        {
            "task": "finetune",
            "seed": 0,  # of the head's initialisation, data order and dropout
            "epochs": 10.0,  # visits of the training data; a fraction is allowed
            "steps": config_dict.placeholder(int),  # optimizer updates; if set, it overrides epochs
            "lr": 5e-5,  # peak learning rate, after warm-up; a head on a frozen encoder wants 1e-3
            "data": _data(),
            "model": _model(shared.model.encoder),
            "head": {
                "kind": "linear",  # or "mlp": two layers with a GELU between (paper, for kw samples)
                "width": 256,  # of the layer between
                "dropout": 0.1,  # on the input of each layer
                "standardise": False,  # features less their mean over the training words, by their deviation
                "scheme": "bio",  # labels of words: "io", "bio" or "bilou", decoded over valid sequences
            },
            "loss": {
                "balance": 0.0,  # a word of a class of n words weighs n ** -balance: 0 all words alike, 1 all classes
            },
            "optim": _optim(),
            "mesh": shared.mesh,
            "eval": _eval(),
            "checkpoint": _checkpoint(),
            "log_every": 20,  # steps between lines of metrics
            "plot": True,  # write training.png at the end
            "export": False,  # write the Hugging Face folder WORKDIR/export at the end
        }
    ).lock()


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "set": {  # keys of `SetSpec` in data/ner/set_spec.py; None: as it is known, or told from the files
                "name": "travel_desk",  # one that is known (named_sets.py), or your own name with the files below
                "path": config_dict.placeholder(str),  # folder with the files of the splits
                "train": config_dict.placeholder(str),  # or each split by itself: a file, or hf:org/data_set:part
                "test": config_dict.placeholder(str),  # or a share of the train texts, such as "0.2", by their hash
                "dev": config_dict.placeholder(str),  # likewise; chooses the best checkpoint, and when to stop
                "format": config_dict.placeholder(str),  # "conll", "tokens", "gliner" or "spans"
                "words": config_dict.placeholder(str),  # "space": words joined by one space each; "text": running text
                "word_column": config_dict.placeholder(int),  # of CoNLL files, from 0; -1: the last
                "tag_column": config_dict.placeholder(int),
                "comment": config_dict.placeholder(str),  # lines of CoNLL files that begin so are passed over
                "tag_key": config_dict.placeholder(str),  # of rows of tokens
                "labels": config_dict.placeholder(str),  # JSON file with the tags' numbers, where tags are numbers
                "invalid_tags": config_dict.placeholder(str),  # "repair" and count them, or "refuse" the file
                "malformed": config_dict.placeholder(str),  # rows: "refuse" the file, or "skip" and count them
                "version": config_dict.placeholder(str),  # of the data, for the record
            },
            "dev_share": 0.0,  # of the train texts, by their hash: the dev split of a set without one of its own
            "sentences": (),  # of the train split, the numbers of those to train on, such as a sample's; (): all
            "cache_dir": "~/.cache/nuner_jax",  # compiled programs
            "rows": 4,  # packed rows per optimizer update, over all devices; fewer hold data where an epoch has fewer
            "row_length": 256,  # tokens per row; longer texts are read in windows that overlap by half
            "prefetch": 2,  # batches prepared ahead by a thread and put on the device; 0: none
        }
    ).lock()


def _model(encoder: ConfigDict) -> ConfigDict:
    return ConfigDict(
        {
            "init": "pretrained",  # or "scratch": random weights of the sizes in `encoder`
            "text": "roberta-base",  # Hugging Face folder or hub name, or a workdir or checkpoint of pre-training
            "tokenizer": config_dict.placeholder(str),  # folder or hub name; None: that of `text`
            "encoder": encoder,  # sizes from scratch, as in a Hugging Face config.json
            "layers": (-1,),  # hidden layers that the head reads, joined; -1: the last; "two embeddings" (paper):
            # the last, and the one just above the frozen ones, such as (-1, 7) after a freeze of 6
            "frozen_layers": 0,  # bottom layers left as they are, with the embeddings; 0: none, -1: all of them
            "dropout": 0.1,  # on embeddings and block outputs; a wholly frozen encoder has none
            "dtype": "bfloat16",  # of the encoder's computation; parameters and the head are float32
            "attention": "auto",  # implementation: "plain", "xla", "cudnn" (NVIDIA, bfloat16), "splash" (TPUs); "auto":
            # plain on CPUs, xla elsewhere (models/attention.py)
            "remat": "none",  # what the backward pass computes again so that memory need not hold it (TPUs, GPUs): the
            # weights of "attention" (few operations, and most memory of long rows), or "layers", all but their inputs
        }
    ).lock()


def _optim() -> ConfigDict:
    return ConfigDict(
        {
            "end_lr": 0.0,  # at the last step
            "schedule": "linear",  # or "cosine", "constant"
            "warmup": 0.1,  # share of all steps with rising learning rate
            "head_factor": 1.0,  # the head's learning rate as a multiple of lr: it starts from nothing
            "layer_decay": 1.0,  # the learning rate falls by this factor from each layer to the one below
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,  # on matrices and embeddings only
            "clip_norm": 1.0,  # global L2 norm of the gradient
            "accumulate": 1,  # micro-batches per update
        }
    ).lock()


def _eval() -> ConfigDict:
    return ConfigDict(
        {
            "every": 100,  # steps between evaluations on the dev split; one at the start and one at the end besides
            "rows": 32,  # rows of an evaluation batch
            "patience": config_dict.placeholder(int),  # evaluations without a better one that end training
        }
    ).lock()


def _checkpoint() -> ConfigDict:
    return ConfigDict(
        {
            "every": 100,  # steps between checkpoints; one at the end and one at SIGTERM besides
            "keep": 1,  # latest checkpoints kept, beside the best one
            "best": "dev/entity_f1",  # what chooses the best one; or dev/token_macro_f1, dev/string_f1, dev/loss
            "init_from": config_dict.placeholder(str),  # workdir or checkpoint of another fine-tuning to start from
        }
    ).lock()
