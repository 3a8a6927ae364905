"""NuNER with XLM-R towers; `nuner_multilingual.py:bert-base-multilingual-cased` takes mBERT.

    python -m nuner_jax.train --config=configs/nuner_multilingual.py

English annotation reaches the other languages through the shared vocabulary; better, add annotated text of
theirs as a further source. Cost: that of nuner_base, and the larger embedding tables (2 x 192M parameters, frozen
in the text tower). Expect: not yet measured at full size.
"""

import runpy
from pathlib import Path


def get_config(encoder="xlm-roberta-base"):
    config = runpy.run_path(Path(__file__).with_name("nuner_base.py"))["get_config"]()
    config.model.text = encoder
    config.model.concept = encoder
    return config
