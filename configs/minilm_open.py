"""Real weights, real text, two CPU cores: MiniLM towers on four sources of open-type annotation.

python -m nuner_jax.train --config=configs/minilm_open.py:FOLDER_OF_MINILM
"""

from nuner_jax.config import pretrain, source, sources


def get_config(weights="sentence-transformers/all-MiniLM-L6-v2"):
    config = pretrain()
    config.epochs = 2.0
    config.lr = 2e-4

    config.data.sources = sources(
        sample=source("sample", weight=2),  # the broadest concepts for its size: twice
        hotpot=source("data/open/hotpot.jsonl.gz"),
        medquad=source("data/open/medquad.jsonl.gz", weight=0.33),  # long passages of few concepts: a third
        semcor=source("data/open/semcor.jsonl.gz", weight=0.33),  # dictionary senses, not LLM style: a third
    )
    config.data.cache_dir = "runs/cache"
    config.data.rows = 8  # about 50 sentences
    config.data.row_length = 256
    config.data.concept_row_length = 256

    config.model.text = weights
    config.model.concept = weights
    config.model.frozen_layers = 3  # of 6: the bottom half, as in the paper
    config.model.dtype = "float32"  # CPUs have no fast bfloat16
    config.loss.scale = 384**-0.5

    config.eval.every = 100
    config.eval.rows = 8
    config.checkpoint.every = 100
    config.log_every = 20
    config.export = True
    return config
