"""A tagger of seconds for the tests: a small encoder from scratch, on the first 16 training sentences of a set."""

from nuner_jax.config import SAMPLE_TOKENIZER, finetune


def get_config():
    config = finetune()
    config.steps, config.lr, config.optim.schedule, config.optim.warmup = 6, 2e-3, "constant", 0.0
    config.data.dev_share = 0.1
    config.data.sentences = tuple(range(16))
    config.data.rows = 8
    config.data.row_length = 64

    config.model.init = "scratch"
    config.model.tokenizer = SAMPLE_TOKENIZER
    config.model.encoder.update(
        vocab_size=8192,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=130,
    )
    config.model.dtype = "float32"
    config.eval.rows = 8
    config.eval.every = config.checkpoint.every = 2
    config.log_every = 1
    config.plot = False
    return config
