"""NuNER with RoBERTa-large towers: the paper's model-size study.

    python -m nuner_jax.train --config=configs/nuner_large.py

Cost: about 3.5 times that of nuner_base. Expect: not yet measured at full size.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(Path(__file__).with_name("nuner_base.py"))["get_config"]()
    config.model.text = "roberta-large"
    config.model.concept = "roberta-large"
    config.model.encoder.update(  # roberta-large's sizes, for a start from scratch
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    config.model.frozen_layers = 12  # of 24: the bottom half, as in base
    config.loss.scale = 1024**-0.5
    config.lr = 2e-5  # larger models want smaller steps
    config.mesh.fsdp = -1  # 2 x 355M parameters with Adam's moments take 8.5 GB in float32: shared out
    config.mesh.data = 1
    return config
