"""Few-shot transfer of a frozen encoder on the two embedded sets, beside a baseline.

    python -m nuner_jax.fewshot --config=configs/fewshot.py:ENCODER,BASELINE

ENCODER and BASELINE are Hugging Face folders, hub names, or workdirs of pre-training; the baseline may be left out.
Sets of your own: `config.sets = {"mine": {"train": "train.txt", "test": "test.txt"}}` in a copy of this file.

Cost: 27 s on two CPU cores shared with other work, for encoders of MiniLM's size. Measured (token macro F1, mean of
both sets, 5 seeds): plain MiniLM 41.2 at k = 4 and 51.1 at k = 16; pre-trained by `configs/minilm_open.py` 58.4 and
64.3, which is +17.3 [+15.9, +19.1] and +13.2 [+12.1, +14.1], paired.
"""

from nuner_jax.config import fewshot


def get_config(encoders):
    config = fewshot()
    encoder, _, baseline = encoders.partition(",")
    config.encoders = {"encoder": encoder}
    if baseline:
        config.encoders = {"encoder": encoder, "baseline": baseline}
        config.baseline = "baseline"
    config.sets = {"travel_desk": {}, "lab_notes": {}}
    config.k = (4, 16)  # mentions of each type
    config.seeds = 5  # the fewest that have an interval
    return config
