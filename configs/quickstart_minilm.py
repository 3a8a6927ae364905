"""The quickstart with real weights: both towers from a local folder, on the embedded sample.

    python -m nuner_jax.train --config=configs/quickstart_minilm.py:FOLDER

FOLDER is a Hugging Face folder of a small encoder, such as that of sentence-transformers/all-MiniLM-L6-v2. It ends with
the few-shot table of the two embedded sets: the weights as they were, and pre-trained.

Cost: 300 steps of about 50 passages, 5 to 10 minutes on two CPU cores. Measured (seed 0, all-MiniLM-L6-v2, token macro
F1, mean of both sets, 5 samples each): 41.2 at k = 4 and 51.9 at k = 16 before; 57.6 and 64.4 after, which is +16.4
[+14.6, +18.4] and +12.5 [+11.6, +13.7], paired. On eight other sets: tests/benchmarks/README.md.
"""

from nuner_jax.config import pretrain, source, sources


def get_config(weights="sentence-transformers/all-MiniLM-L6-v2"):
    config = pretrain()
    config.epochs = 3.0
    config.lr = 4e-4

    config.data.sources = sources(sample=source("sample"))
    config.data.cache_dir = "runs/cache"
    config.data.rows = 8  # about 50 sentences
    config.data.row_length = 256
    config.data.concept_row_length = 256

    config.model.text = weights
    config.model.concept = weights
    config.model.frozen_layers = 3  # of 6: the bottom half, as in the paper
    config.model.dropout = 0.0  # three epochs leave nothing to hold back
    config.model.dtype = "float32"  # CPUs have no fast bfloat16
    config.loss.scale = 384**-0.5

    config.eval.every = 100
    config.eval.rows = 8
    config.checkpoint.every = 100
    config.log_every = 20
    config.export = True
    config.transfer.sets = ("travel_desk", "lab_notes")  # both are in the project, and no text of them in the sample
    return config
