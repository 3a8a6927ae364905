"""Tokenizers of Hugging Face folders: which are taken, which fit an encoder, and what tells them apart."""

import pytest

from nuner_jax import pretrained
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder_config import EncoderConfig
from tests.goldens import tiny

CONFIG = EncoderConfig.from_hf(tiny.HF_CONFIGS["bert"])
SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}


def make_tokenizer(folder, words=("anna", "saw", "bob"), special=SPECIAL):
    """Writes and loads a tokenizer of whole words; [PAD] has id 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    backend = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return pretrained.load_tokenizer(folder)


def test_a_tokenizer_is_loaded_and_fits_its_encoder(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert tokenizer("anna saw bob", add_special_tokens=False)["input_ids"] == [4, 5, 6]
    pretrained.check_tokenizer(tokenizer, CONFIG)


def test_the_tokenizer_of_the_real_minilm_fits_it(minilm_folder):
    tokenizer = pretrained.load_tokenizer(minilm_folder)
    assert tokenizer.is_fast
    pretrained.check_tokenizer(tokenizer, pretrained.load_encoder_config(minilm_folder))


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    tiny.write_folder(tmp_path, tiny.HF_CONFIGS["bert"], {})  # AutoTokenizer would make one of five words of it
    (tmp_path / "vocab.json").write_text("{}")  # half of a pair
    with pytest.raises(
        NunerError, match="has no tokenizer: tokenizer.json, or vocab.txt, or vocab.json and merges.txt"
    ):
        pretrained.load_tokenizer(tmp_path)


def test_a_corrupt_tokenizer_is_named(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(NunerError, match=f"the tokenizer in {tmp_path} cannot be loaded"):
        pretrained.load_tokenizer(tmp_path)


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    with pytest.raises(NunerError, match=r"has only a slow tokenizer \(CanineTokenizer\)"):
        pretrained.load_tokenizer(tmp_path)


def test_a_tokenizer_with_more_entries_than_word_vectors_is_refused(tmp_path):
    words = [f"word{number}" for number in range(77)]
    with pytest.raises(NunerError, match="largest token id is 80, but the encoder has 80 word vectors"):
        pretrained.check_tokenizer(make_tokenizer(tmp_path, words), CONFIG)
    pretrained.check_tokenizer(make_tokenizer(tmp_path, words[:-1]), CONFIG)


def test_a_tokenizer_with_another_pad_token_is_refused(tmp_path):
    roberta = EncoderConfig.from_hf(tiny.HF_CONFIGS["roberta"])
    with pytest.raises(NunerError, match=f"{tmp_path} does not fit .*\n.*pads with id 0, but the encoder with 1"):
        pretrained.check_tokenizer(make_tokenizer(tmp_path), roberta)


@pytest.mark.parametrize(("absent", "role"), [("cls_token", "start"), ("sep_token", "end"), ("pad_token", "pad")])
def test_a_tokenizer_without_a_special_token_is_refused(absent, role, tmp_path):
    special = {name: token for name, token in SPECIAL.items() if name != absent}
    with pytest.raises(NunerError, match=f"it has no {role}"):
        pretrained.check_tokenizer(make_tokenizer(tmp_path, special=special), CONFIG)


def test_bos_and_eos_serve_as_well_as_cls_and_sep(tmp_path):
    special = {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    pretrained.check_tokenizer(make_tokenizer(tmp_path, special=special), CONFIG)


def test_a_fingerprint_tells_tokenizers_apart_and_nothing_else(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "a")
    fingerprint = pretrained.tokenizer_fingerprint(tokenizer)
    assert len(fingerprint) == 64 and int(fingerprint, 16)
    tokenizer(["anna", "saw bob"], padding="max_length", truncation=True, max_length=3)  # changes its state
    assert pretrained.tokenizer_fingerprint(tokenizer) == fingerprint
    assert pretrained.tokenizer_fingerprint(pretrained.load_tokenizer(tmp_path / "a")) == fingerprint
    other = make_tokenizer(tmp_path / "b", words=("anna", "bob", "saw"))
    assert pretrained.tokenizer_fingerprint(other) != fingerprint
