"""The configuration: one module per kind of config, and files.py, which reads, checks and writes them.

A config file starts from `pretrain()`, `pretrain_classes()`, `finetune()`, `fewshot()` or `annotate()` and changes what
it needs to; the keys there are all there are, so a misspelt one is refused, in a file as on the command line, with the
nearest name.
"(paper)" marks what Bogdanov et al. (EMNLP 2024) tell; everything else is our choice.
"""

from nuner_jax.config.annotate_schema import annotate
from nuner_jax.config.fewshot_schema import fewshot
from nuner_jax.config.files import check, difference, load_file, parse_flags, read, save
from nuner_jax.config.finetune_schema import finetune
from nuner_jax.config.llm_schema import llm
from nuner_jax.config.pretrain_classes_schema import pretrain_classes
from nuner_jax.config.pretrain_schema import SAMPLE_TOKENIZER, pretrain, source, sources

__all__ = [
    "SAMPLE_TOKENIZER",
    "annotate",
    "check",
    "difference",
    "fewshot",
    "finetune",
    "llm",
    "load_file",
    "parse_flags",
    "pretrain",
    "pretrain_classes",
    "read",
    "save",
    "source",
    "sources",
]
