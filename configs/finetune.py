"""Fine-tunes an encoder for named-entity recognition, all of its layers, with a linear head.

    python -m nuner_jax.train --config=configs/finetune.py:ENCODER

ENCODER is a Hugging Face folder or hub name, or the workdir of a pre-training run. The data is the embedded travel
desk (162 sentences to learn from, 39 to choose by, 199 to test on); --config.data.set.name=NAME takes another known
set, and --config.data.set.path=FOLDER your own CoNLL or JSONL files, with a name for them.

Cost: 120 steps of about 20 sentences, one minute on two CPU cores. Measured (seed 0, all-MiniLM-L6-v2, test split):
token macro F1 77.6%, entity micro F1 72.4%, string F1 72.6%.

A frozen encoder: --config.model.frozen_layers=-1 --config.head.standardise --config.head.kind=mlp --config.lr=1e-3,
where the head's learning rate is 10 times that (half a minute).
The "two embeddings" of the paper: --config.model.layers="(-1, 7)".
"""

from nuner_jax.config import finetune


def get_config(encoder="roberta-base"):
    config = finetune()
    config.model.text = encoder
    config.model.dtype = "float32"  # CPUs have no fast bfloat16

    config.data.dev_share = 0.1  # the embedded sets have no dev split: a share of the training texts
    config.data.rows = 4  # about 20 sentences
    config.data.row_length = 128

    config.epochs = 15.0
    config.lr = 3e-4  # MiniLM is small; RoBERTa-base wants 5e-5
    config.optim.head_factor = 10.0
    config.eval.every = 40
    config.checkpoint.every = 40
    return config
