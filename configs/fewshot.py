"""Few-shot transfer of a frozen encoder on the two embedded sets, beside a baseline.

    python -m nuner_jax.fewshot --config=configs/fewshot.py:ENCODER,BASELINE

ENCODER and BASELINE are Hugging Face folders, hub names, or workdirs of pre-training; the baseline may be left out.
Sets of your own: `config.sets = {"mine": {"train": "train.txt", "test": "test.txt"}}` in a copy of this file.
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
    config.k = (4, 16)
    config.seeds = 5
    return config
