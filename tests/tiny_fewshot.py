"""What few-shot tests measure: encoders of random numbers, and data sets of a few sentences."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nuner_jax import config as config_lib
from nuner_jax import pretrained
from nuner_jax.models.encoder import Encoder, EncoderConfig
from nuner_jax.models.params import split

CITIES = ["Roscoff", "Brest", "Zagreb", "Lima", "Osaka", "Accra", "Turin", "Quito"]
PEOPLE = ["Ann", "Bob", "Zeytoun", "Malcolm", "Ines", "Otto", "Lena", "Juri"]
FRAMES = ["{p} sails to {c} .", "In {c} , {p} and {q} met .", "Nobody knows why it rains .", "{p} left {c} for {d} ."]


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        (p, q), (c, d) = rng.choice(PEOPLE, 2, replace=False), rng.choice(CITIES, 2, replace=False)
        yield rng.choice(FRAMES).format(p=p, q=q, c=c, d=d)


def write_conll(path, count, seed):
    tag = dict.fromkeys(CITIES, "B-city") | dict.fromkeys(PEOPLE, "B-person")
    lines = ["".join(f"{word}\t{tag.get(word, 'O')}\n" for word in text.split()) for text in sentences(count, seed)]
    path.write_text("\n".join(lines))


def make_material(folder):
    """Makes two random encoders, `one` and `two`, and two data sets, `voyages` and `notes`, below a folder."""
    config = EncoderConfig(
        model_type="roberta",
        vocab_size=8192,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        max_positions=66,
        position_offset=2,
        type_vocab_size=1,
        pad_token_id=1,
    )
    tokenizer = pretrained.load_tokenizer(pretrained.resolve(config_lib.SAMPLE_TOKENIZER))
    for seed, name in enumerate(("one", "two")):
        params = split(Encoder(config, dtype=jnp.float32, rngs=nnx.Rngs(seed)))[1]
        # The initial deviation of 0.02 makes all vectors alike.
        pretrained.save_encoder(folder / name, config, jax.tree.map(lambda p: p * 8 if p.ndim > 1 else p, params))
        tokenizer.save_pretrained(str(folder / name))
    for seed, name in enumerate(("voyages", "notes")):
        (folder / name).mkdir()
        write_conll(folder / name / "train.txt", 60, seed)
        write_conll(folder / name / "test.txt", 40, 10 + seed)
    return folder
