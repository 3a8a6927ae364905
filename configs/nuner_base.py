"""NuNER base, as in the paper: two RoBERTa-base towers, ten epochs over a million annotated sentences.

    python -m nuner_jax.train --config=configs/nuner_base.py

Cost: about 1.6e17 floating-point operations. Expect: not yet measured at full size (no accelerator was at hand);
the paper's few-shot figures are the aim. `--config.data.sources.nuner.path=DATA` reads any data that
`python -m nuner_jax.data.build` imports.
"""

from nuner_jax.config import pretrain, source, sources


def get_config():
    config = pretrain()
    # (paper): two separate roberta-base towers, the bottom 6 text layers frozen, 10 epochs of 1M sentences.
    # All of these are the defaults of nuner_jax/config/pretrain_schema.py, where every key has its unit and reason.
    config.data.sources = sources(nuner=source("hf:numind/NuNER:full"))

    # Our choices, where the paper tells nothing:
    config.data.rows = 64  # x 512 tokens: about 1,000 sentences an update, 10,000 updates
    config.data.row_length = 512  # the longest that RoBERTa reads
    config.data.row_multiple = 64  # rows of any kind split over up to 64 devices
    config.eval.rows = 64
    config.eval.batches = 8  # about 8,000 of the 20,000 held-out sentences
    config.lr = 5e-5
    config.loss.chunk = 2048  # concepts scored at once: about 3,000 distinct ones in a batch
    return config
