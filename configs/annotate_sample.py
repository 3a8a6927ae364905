"""The embedded sample from its recorded completions: the whole of annotation, with no network and no cost.

    launch/local.sh annotate --config=configs/annotate_sample.py

Cost: 10 seconds. Expect: 6,000 passages, all done; over 99.9% of their 34,657 lines aligned; a report to read in
`runs/annotate_sample/report/index.html`. `configs/quickstart.py` trains on this.
"""

from nuner_jax.config import annotate


def get_config():
    config = annotate()
    config.source.paths = ("sample",)
    config.source.unit = "row"  # the passages that the completions were recorded for, as they are
    config.source.min_chars = 1
    config.source.min_words = 0
    config.source.script = ""
    config.source.duplicates = "exact"

    config.endpoint.kind = "replay"
    config.endpoint.replay = "sample"
    config.request.pilot = 0  # nothing to measure
    return config
