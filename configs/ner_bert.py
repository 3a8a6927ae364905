"""The baseline in the manner of NER-BERT: the most frequent concepts as fixed classes, on the data of another config.

    python -m nuner_jax.train --config=configs/ner_bert.py:minilm_open.py:FOLDER_OF_MINILM

The argument is a config of contrastive pre-training, a file beside this one or an absolute path, with its own argument
if it has one: data, text encoder, frozen layers, batches, steps and schedule are taken from it, so that only what is
learnt differs. Without one it is `nuner_base.py`, the paper's size. Then
`python -m nuner_jax.fewshot --config=configs/fewshot.py:CONTRASTIVE_WORKDIR,WORKDIR` compares the two.

Cost: less than the contrastive run of the same steps, which has a second encoder. Expect: not yet measured at full
size. 120 steps of 4 rows of 128 tokens (60,000 tokens, of the 1.7 million that `minilm_open.py` reads) lifted token
macro F1 on the two embedded sets from 41.2 to 51.1 at k = 4, and from 51.1 to 58.8 at k = 16 (5 seeds). What the other
concepts are made no difference there: 50.5 and 58.5 with "class", 51.5 and 59.0 with "outside", within the spread over
seeds. On that data 315 classes have 40% of the mentions of an epoch.
"""

from pathlib import Path

from nuner_jax.config import load_file, pretrain_classes


def get_config(contrastive="nuner_base.py"):
    config = pretrain_classes(load_file(str(Path(__file__).parent / contrastive)))
    config.classes.number = 315  # NER-BERT's number of types
    config.classes.min_mentions = 1  # so the number alone decides
    config.classes.others = "ignore"  # unlabelled is not negative; "outside" is as if nobody had annotated the others
    config.optim.head_factor = 10.0  # with 1 and the same 120 steps no token was given a class yet
    return config
