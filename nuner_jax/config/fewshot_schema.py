"""The schema of few-shot evaluation: every key, its default, its unit and the reason for it."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict

from nuner_jax.config import llm_schema
from nuner_jax.config.values import check_values
from nuner_jax.errors import NunerError

CHOICES = {
    "rule": ("k~2k", "kw"),
    "layers": ("last", "two"),
    "dtype": ("float32", "bfloat16"),
    "features": ("memory", "file"),
}
AT_LEAST = {
    "seeds": 1,
    "head.width": 1,
    "head.steps": 1,
    "head.lr": 0.0,
    "head.weight_decay": 0.0,
    "head.batch": 1,
    "eval.max_sentences": 1,
}
AT_MOST = {"seed": 2**31, "head.balance": 1.0}
"""Upper bounds of values that are at least 0."""
FREE_KEYS = ("sets.", "encoders.", "llms.")
HEADS = ("linear", "mlp")


def check(config: ConfigDict) -> None:
    """What no bound on a single key can say.

    Raises:
      NunerError: naming the key and what it needs.
    """
    for key, value in {"sets": config.sets, "k": config.k, "head.kinds": config.head.kinds}.items():
        if not value:
            raise NunerError(f"config.{key} is empty: name at least one")
    if not config.encoders and not config.llms:
        raise NunerError("config.encoders is empty, and so is config.llms: name at least one")
    for name, given in config.sets.items():
        if not isinstance(given, ConfigDict):
            raise NunerError(f"config.sets.{name} = {given!r}: give the keys of a data set, such as {{'path': FOLDER}}")
    for name, path in config.encoders.items():
        if not isinstance(path, str) or not path:
            raise NunerError(f"config.encoders.{name} = {path!r}: a folder, a name on the hub, or a workdir")
    for name, llm in config.llms.items():
        if not isinstance(llm, ConfigDict):
            raise NunerError(
                f"config.llms.{name} = {llm!r}: begin with nuner_jax.config.llm(), and change what differs"
            )
        check_values(llm, llm_schema.llm(), llm_schema, f"config.llms.{name}")
        llm_schema.check(llm, name)
        if name in config.encoders:
            raise NunerError(f"config.llms.{name}: an encoder has the same name; give it another one")
    check_k("k", config.k, least=0 if config.llms else 1)
    if config.encoders and not any(config.k):
        raise NunerError(f"config.k = {tuple(config.k)}: an encoder needs mentions to learn from, k of at least 1")
    if unknown := [kind for kind in config.head.kinds if kind not in HEADS]:
        raise NunerError(f"config.head.kinds: no head {unknown[0]!r}; there are {' and '.join(HEADS)}")
    names = [*config.encoders, *config.llms]
    if config.baseline is not None and config.baseline not in names:
        raise NunerError(
            f"config.baseline = {config.baseline!r}: not among config.encoders and config.llms, {', '.join(names)}"
        )


def check_k(key: str, given: Sequence[int], least: int = 1) -> None:
    """Refuses numbers of mentions that cannot be sampled; raises NunerError with their key."""
    if not given or any(type(k) is not int or k < least for k in given) or len(set(given)) < len(given):
        told = "at least 1" if least else "at least 0 (nothing but definitions, for language models)"
        raise NunerError(f"config.{key} = {tuple(given)}: different whole numbers, {told}, one or more of them")


def fewshot() -> ConfigDict:
    """Few-shot transfer of frozen encoders; see `configs/fewshot.py`."""
    return ConfigDict(
        {
            "task": "fewshot",
            "sets": {},  # name -> keys of a data set (`SetSpec` in nuner_jax/data/ner/set_spec.py); {}: a known one;
            # and for language models "definitions": {type: what it means}, or a JSON file with that
            "encoders": {},  # name -> Hugging Face folder or hub name, or workdir or checkpoint of pre-training
            "llms": {},  # name -> `llm()`: language models asked in context, on the same samples
            "baseline": config_dict.placeholder(str),  # name that the others are compared with, in pairs; None: none
            "k": (1, 4, 16, 64),  # mentions (rule kw: words) of each type to learn from; 0 is for language models
            "seeds": 10,  # samples, each with a head of its own, of every set and k
            "seed": 0,  # the first of them, at most 2**31; the others follow
            "rule": "k~2k",  # k to 2k mentions of each type (paper); or "kw": words
            "layers": "last",  # hidden states of a word's vector: "last", or "two" (paper): and that above the frozen
            "dtype": "float32",  # of the encoders' computation; on accelerators "bfloat16" is faster
            "features": "memory",  # where the words' vectors are kept: "memory", or a mapped "file" in the workdir
            "head": {
                "kinds": ("mlp",),  # "mlp" (two layers; paper, for kw), "linear", or both; "linear" wants more steps
                # than these, and scores lower
                "width": 256,  # of the layer between the two
                "steps": 300,  # updates; the rate falls along a cosine
                "lr": 1e-3,  # peak learning rate of AdamW
                "weight_decay": 0.01,
                "batch": 512,  # words per update; a smaller support is one batch
                "balance": 0.75,  # a word of a class of n words weighs n ** -balance: 0 all words alike, 1 all classes
            },
            "eval": {
                "max_sentences": config_dict.placeholder(int),  # of a test split, drawn at random; None: all of it
                "include_other": False,  # whether "outside" is averaged as one more type in token macro F1
            },
            "cache_dir": "~/.cache/nuner_jax",  # compiled programs
        }
    ).lock()
