"""NuNER with BERT-base towers, for comparison with NER-BERT and with few-shot work that builds on BERT.

    python -m nuner_jax.train --config=configs/nuner_bert.py

Cost: that of nuner_base. Expect: not yet measured at full size.
"""

import runpy
from pathlib import Path


def get_config():
    config = runpy.run_path(Path(__file__).with_name("nuner_base.py"))["get_config"]()
    config.model.text = "bert-base-cased"  # case tells names
    config.model.concept = "bert-base-cased"
    return config
