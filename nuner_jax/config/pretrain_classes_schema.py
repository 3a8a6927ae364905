"""The schema of pre-training on a closed set of classes: that of contrastive pre-training, but for what differs."""

from __future__ import annotations

import copy

from ml_collections import ConfigDict, config_dict

from nuner_jax.config import pretrain_schema
from nuner_jax.errors import NunerError

_CONTRASTIVE = ("data.concept_row_length", "data.concept_length", "data.row_multiple")
_CONTRASTIVE += ("model.concept", "model.concept_pooling", "model.keep_frozen", "loss")
"""Keys of contrastive pre-training that mean nothing here."""


def _shared(bounds: dict) -> dict:
    return {key: value for key, value in bounds.items() if not key.startswith(_CONTRASTIVE)}


CHOICES = _shared(pretrain_schema.CHOICES) | {
    "classes.others": ("ignore", "outside", "class"),
    "checkpoint.best": ("validation/macro_f1", "validation/accuracy", "validation/loss"),
}
AT_LEAST = _shared(pretrain_schema.AT_LEAST)
AT_LEAST |= {"classes.number": 1, "classes.min_mentions": 1, "optim.head_factor": 0.0}
AT_MOST = pretrain_schema.AT_MOST
FREE_KEYS = pretrain_schema.FREE_KEYS
check = pretrain_schema.check


def pretrain_classes(contrastive: ConfigDict | None = None) -> ConfigDict:
    """Token classification over the most frequent concepts, as in NER-BERT; see `configs/ner_bert.py`.

    Args:
      contrastive: a config of contrastive pre-training whose values are taken over, so that the two compare: data,
        text tower, schedule, steps; None: the defaults.

    Raises:
      NunerError: `contrastive` is a config of another task.
    """
    if contrastive and contrastive.task != "pretrain":
        raise NunerError(
            f"config.task = {contrastive.task!r}: a config of contrastive pre-training (task 'pretrain') is needed, "
            "whose data and schedule are taken over"
        )
    config = copy.deepcopy(contrastive or pretrain_schema.pretrain())  # values that may be None stay so
    with config.unlocked():
        config.task = "pretrain_classes"
        for key in _CONTRASTIVE:
            group, _, name = key.rpartition(".")
            del (config[group] if group else config)[name]
        config.classes = ConfigDict(
            {
                "number": config_dict.placeholder(int),  # the most frequent concepts; None: all with min_mentions
                "min_mentions": 1,  # of a class, in an epoch
                # Tokens of concepts that are no class: "ignore" them in the loss (they are entities, only of no class),
                # call them "outside", as if they were not annotated, or make all of them one more "class"
                "others": "ignore",
            }
        )
        config.classes.number = 315  # types, as many as NER-BERT's
        config.optim.head_factor = 10.0  # the head's learning rate as a multiple of lr: it starts from nothing
        config.checkpoint.best = "validation/macro_f1"
    return config.lock()
