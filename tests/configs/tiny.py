"""A model of seconds for the tests: `tiny.py:FILE` trains on the rows of that file."""

from nuner_jax.config import SAMPLE_TOKENIZER, pretrain, source, sources


def get_config(path="sample"):
    config = pretrain()
    config.steps = 20
    config.data.sources = sources(rows=source(path))
    config.data.cache_dir = "runs/test-cache"
    config.data.validation_fraction = 0.1
    config.data.rows = 8
    config.data.row_length = 64
    config.data.concept_row_length = 64

    config.model.init = "scratch"
    config.model.tokenizer = SAMPLE_TOKENIZER
    config.model.encoder.update(
        vocab_size=8192,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=66,
    )
    config.model.frozen_layers = 1
    config.model.dtype = "float32"
    config.loss.scale = 64**-0.5
    config.lr = 1e-3
    config.eval.every = 10
    config.eval.rows = 8
    config.checkpoint.every = 5
    config.log_every = 1
    config.plot = False
    return config
