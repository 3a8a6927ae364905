"""The parts of token classification: words in windows, packed batches of them, the tagger, and its scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nuner_jax import pretrained
from nuner_jax.config import SAMPLE_TOKENIZER
from nuner_jax.data.ner.words import word_spans
from nuner_jax.data.packed_rows import PackedRows
from nuner_jax.data.records import Entity, Record
from nuner_jax.data.tagged import WordLoader, tokenise
from nuner_jax.decoding import Scheme
from nuner_jax.errors import NunerError
from nuner_jax.models.encoder import EncoderConfig
from nuner_jax.models.tagger import Tagger
from nuner_jax.tasks.tagged_split import TaggedSplit, silent_logits

TEXTS = [
    "Zeytoun, on Malcolm Street, pours arak.",
    "",
    "Can you move Dr Visser (seat 14C) to the 9:40 from Lisbon? " * 8,
    "O",
    "$300.",
]


@pytest.fixture(scope="module")
def tokenizer():
    from pathlib import Path

    return pretrained.load_tokenizer(Path(SAMPLE_TOKENIZER))


def corpus_of(texts, tokenizer, window):
    words = [word_spans(text, split_on_space=False) for text in texts]
    return tokenise(texts, words, tokenizer, window), words


@pytest.mark.parametrize("window", [4, 9, 64, 512])
def test_every_word_counts_once_where_its_first_sub_token_stands(tokenizer, window):
    corpus, words = corpus_of(TEXTS, tokenizer, window)
    assert np.diff(corpus.sequence_offsets_S1).max() <= window
    np.testing.assert_array_equal(corpus.word_V, np.arange(corpus.num_words))
    surfaces = [text[start:end] for text, spans in zip(TEXTS, words, strict=True) for start, end in spans]
    sequence_V = np.repeat(np.arange(len(corpus.word_offsets_S1) - 1), np.diff(corpus.word_offsets_S1))
    at_V = corpus.sequence_offsets_S1[sequence_V] + corpus.position_V
    for word, token in zip(corpus.word_V, corpus.tokens_T[at_V], strict=True):
        piece = tokenizer.decode([token]).strip()
        assert surfaces[word].startswith(piece) or piece.startswith(surfaces[word]) or surfaces[word] in piece
    if window == 512:
        assert corpus.texts_split == 0
        whole = [tokenizer(text)["input_ids"] for text in TEXTS if text]
        np.testing.assert_array_equal(corpus.tokens_T, np.concatenate(whole))


def test_a_word_of_a_long_text_has_a_quarter_of_a_window_on_either_side(tokenizer):
    corpus, _ = corpus_of([TEXTS[2]], tokenizer, window := 42)
    lengths = np.diff(corpus.sequence_offsets_S1)
    assert corpus.texts_split == 1 and len(lengths) > 3
    for number in range(len(lengths)):
        positions = corpus.position_V[corpus.word_offsets_S1[number] : corpus.word_offsets_S1[number + 1]]
        if number:
            assert positions.min() > (window - 2) // 4 - 1
        if number < len(lengths) - 1:
            assert positions.max() <= window - 2 - (window - 2) // 4 + 1


def test_words_that_no_token_shows_are_counted_and_in_no_batch(tokenizer):
    class Blind:
        """Leaves out every character that is no letter or digit, as some vocabularies do."""

        def __call__(self, texts, **options):
            encoded = tokenizer(texts, **options)
            kept = [
                [number for number, (start, end) in enumerate(spans) if text[start:end].isalnum()]
                for text, spans in zip(texts, encoded["offset_mapping"], strict=True)
            ]
            return {
                name: [[row[number] for number in numbers] for row, numbers in zip(encoded[name], kept, strict=True)]
                for name in ("input_ids", "offset_mapping")
            }

        cls_token_id, sep_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

    corpus, words = corpus_of(["Ann , Bob !"], Blind(), 16)
    assert (corpus.num_words, corpus.words_without_tokens) == (4, 2)
    assert corpus.word_V.tolist() == [0, 2]


def test_a_batch_is_a_pure_function_of_seed_and_index_and_its_rows_can_be_gathered_apart(tokenizer):
    corpus, _ = corpus_of(TEXTS * 20, tokenizer, 64)

    def loader(seed):
        return WordLoader(corpus, rows=4, row_length=64, seed=seed, pad_id=1)

    first, again, other = loader(3), loader(3), loader(4)
    for index in (7, 0, 31):
        whole = first.batch(index)
        for name, value in again.batch(index, np.array([2, 0])).items():
            np.testing.assert_array_equal(value, whole[name][[2, 0]], err_msg=name)
    assert any(not np.array_equal(first.batch(0)[name], other.batch(0)[name]) for name in ("tokens", "words"))
    batches = range(int(first.packing.batches_per_epoch))
    seen = np.concatenate([first.batch(index)["words"].reshape(-1) for index in batches])
    assert np.bincount(seen[seen >= 0]).max() == 1, "no word twice in an epoch"


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_word_once_and_a_small_set_is_one_batch(tokenizer, shuffle):
    corpus, _ = corpus_of(TEXTS, tokenizer, 64)
    loader = WordLoader(corpus, rows=8, row_length=64, seed=0, pad_id=1, shuffle=shuffle)
    assert loader.packing.rows_per_epoch < 8 and loader.packing.batches_per_epoch == 1
    for index in range(1 + 2 * shuffle):
        words = loader.batch(index)["words"]
        np.testing.assert_array_equal(np.sort(words[words >= 0]), np.arange(corpus.num_words))
    if not shuffle:
        assert (loader.batch(1)["words"] == -1).all(), "evaluation ends with the epoch"


def test_rows_know_the_most_that_any_epoch_can_put_into_them():
    lengths = np.array([5, 5, 5, 3, 3, 2, 7])
    amounts = np.array([1, 4, 2, 9, 0, 1, 1])
    rows = PackedRows(lengths, rows=3, row_length=8, seed=0)
    most = rows.most_per_row(amounts)
    for index in range(60):
        placed = rows.batch(index)
        assert np.bincount(placed.row_N, amounts[placed.sequence_N]).max() <= most


TINY = EncoderConfig.from_hf(
    {
        "model_type": "bert",
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.5,
    }
)


def tagger(**changes):
    options = {"layers": (-1,), "frozen_layers": 0, "kind": "linear", "width": 4, "dropout": 0.5, "standardise": False}
    return Tagger(TINY, classes=3, dtype=jnp.float32, attention="xla", rngs=nnx.Rngs(0), **(options | changes))


TOKENS = jnp.array([[2, 7, 8, 9, 3, 2, 11, 3]])
SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2]])
POSITIONS = jnp.array([[1, 3, 6]])


@pytest.mark.parametrize("layers", [(-1,), (-1, 2), (0, 3), (-4, -2)])
def test_the_head_reads_the_layers_asked_for(layers):
    model = tagger(layers=layers)
    vectors = model.vectors(TOKENS, SEGMENTS, POSITIONS)
    assert vectors.shape == (1, 3, 8 * len(layers))
    for place, layer in enumerate(layers):
        alone = model.text(TOKENS, SEGMENTS, layers=(layer,))[:, POSITIONS[0]]
        np.testing.assert_array_equal(vectors[..., place * 8 : place * 8 + 8], alone)
    assert model(TOKENS, SEGMENTS, POSITIONS).shape == (1, 3, 3)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(NunerError, match=rf"hidden layer {layer}, but the encoder has 3 layers"):
        tagger(layers=(layer,)).vectors(TOKENS, SEGMENTS, POSITIONS)


def test_a_wholly_frozen_encoder_has_no_dropout_and_the_others_have():
    key = jax.random.key(0)
    for frozen, same in ((3, True), (2, False)):
        model = tagger(frozen_layers=frozen)
        vectors = [model.vectors(TOKENS, SEGMENTS, POSITIONS, k) for k in (None, key)]
        assert np.array_equal(*vectors) == same
    with pytest.raises(NunerError, match=r"frozen_layers: 4 of 3"):
        tagger(frozen_layers=4)


def test_scores_of_the_right_labels_are_perfect_and_words_without_a_token_are_outside(tokenizer):
    text = "Ann Lee flew to Oslo"
    records = [Record(text, (Entity(0, 7, "person"), Entity(16, 20, "place"))), Record("Go.")]
    for name in ("io", "bio", "bilou"):
        scheme = Scheme.make(name, 2)
        split = TaggedSplit.make(records, ["person", "place"], scheme, False, tokenizer, 32)
        assert split.types_W.tolist() == [1, 1, 0, 0, 2, 0, 0]
        np.testing.assert_array_equal(scheme.type_C[split.labels_W], split.types_W)
        logits = silent_logits(7, len(scheme.type_C))
        scores = dict(split.scores(scheme, logits, np.ones(len(scheme.type_C))))
        assert scores["entity_f1"] == scores["token_macro_f1"] == scores["string_f1"] == 0
        logits[:] = 9 * np.eye(len(scheme.type_C))[split.labels_W]
        scores = dict(split.scores(scheme, logits, np.ones(len(scheme.type_C))))
        assert scores["entity_f1"] == scores["token_macro_f1"] == scores["string_f1"] == 1
        assert scores["loss"] < 1e-2
