"""Frozen features: one vector per word from an encoder that is not trained, computed once and used by every head.

A word's vector is that of its first sub-token. Sentences are packed into rows, short ones into short rows, and a text
that is longer than the encoder reads goes through in overlapping windows: nothing is cut off.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nuner_jax import pretrained, sharding, text_encoder
from nuner_jax.data import ragged
from nuner_jax.data.tagged import WordCorpus, WordLoader, tokenise
from nuner_jax.models import params as params_lib
from nuner_jax.models.attention import fastest
from nuner_jax.models.encoder import Encoder, EncoderConfig

_SHORTEST_ROW = 64  # tokens; rows are this long, or a power of two times it
# Tokens that a device encodes at once. A CPU is fastest while the activations stay in its cache.
_TOKENS_ON_CPU, _TOKENS_ON_ACCELERATOR = 1024, 65536


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An encoder whose parameters do not change.

    origin: where its parameters are from, in words.
    frozen_layers: as `TextEncoder` has it.
    fingerprint: sha256 of sizes, parameters, tokenizer and dtype: all that decides a vector.
    """

    origin: str
    config: EncoderConfig
    params: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    dtype: str
    frozen_layers: int
    fingerprint: str

    def hidden_layers(self, which: str) -> tuple[int, ...]:
        """The layers whose vectors make a word's: the "last", or "two" of them, joined.

        The second is the one just above the frozen layers (Bogdanov et al. 2024, the "two embeddings" trick).
        """
        last = self.config.num_layers
        return (last,) if which == "last" else (last, min(self.frozen_layers + 1, last))


class WordFeatures(NamedTuple):
    """The vectors of all words of some texts, float32 [W, D]; words of text s are offsets[s] to offsets[s + 1].

    silent_V: the words that the tokenizer leaves out (control characters, say); their vectors are zero.
    """

    features_WxD: np.ndarray
    sentence_offsets_S1: np.ndarray
    silent_V: np.ndarray


# --- The encoder -------------------------------------------------------------------------------


def load_frozen(encoder: str, dtype: str = "float32") -> Frozen:
    """Reads an encoder.

    Args:
      encoder: its name, as `text_encoder.find` takes it.
      dtype: of the computation, "float32" or "bfloat16"; the vectors are float32 whatever it is.

    Raises:
      NunerError: there is none, or what is there is damaged or of another kind.
    """
    found = text_encoder.find(encoder)
    tokenizer, params = found.load_tokenizer(), found.load_params(_abstract(found.config, dtype)[1])
    digest = hashlib.sha256(repr((found.config, dtype, pretrained.tokenizer_fingerprint(tokenizer))).encode())
    for path, leaf in sorted(params_lib.flatten(params).items()):
        digest.update(path.encode() + np.ascontiguousarray(leaf).tobytes())
    return Frozen(found.origin, found.config, params, tokenizer, dtype, found.frozen_layers, digest.hexdigest())


@functools.cache
def _abstract(config: EncoderConfig, dtype: str) -> tuple[nnx.GraphDef, dict]:
    """The structure of an encoder and the shapes of its parameters; encoders of one size share their programs."""
    options = {"dtype": jnp.dtype(dtype), "attention_implementation": fastest(jax.default_backend())}
    return params_lib.split(nnx.eval_shape(lambda: Encoder(config, **options, rngs=nnx.Rngs(0))))


# --- The vectors -------------------------------------------------------------------------------


def word_features(
    frozen: Frozen,
    texts: Sequence[str],
    words: Sequence[np.ndarray],
    layers: Sequence[int] = (-1,),
    *,
    file: Path | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> WordFeatures:
    """One vector per word, for all words of all texts.

    Args:
      frozen: the encoder.
      texts: of any length.
      words: of each text, the character offsets of its words: int [W, 2], start and exclusive end.
      layers: whose vectors are joined, as `Encoder` numbers them.
      file: where the vectors go, as a memory-mapped .npy file; None keeps them in memory.
      advance: told the share that is done, after every batch.

    Raises:
      NunerError: a layer that the encoder does not have.
    """
    corpus = tokenise(texts, words, frozen.tokenizer, frozen.config.max_length)
    shape = (corpus.num_words, len(layers) * frozen.config.hidden_size)
    if file is None or not corpus.num_words:
        features_WxD = np.zeros(shape, np.float32)
    else:
        features_WxD = np.lib.format.open_memmap(file, "w+", np.float32, shape)  # a new file reads as zeros
    for words_V, vectors_VxD, share in _vectors(frozen, corpus, tuple(layers)):
        features_WxD[words_V] = vectors_VxD
        advance(share)
    silent_V = np.setdiff1d(np.arange(corpus.num_words), corpus.word_V)
    return WordFeatures(features_WxD, ragged.offsets([len(spans) for spans in words]), silent_V)


def _vectors(
    frozen: Frozen, corpus: WordCorpus, layers: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """Yields (words, their vectors [V, D], share of all tokens done), batch after batch."""
    mesh = sharding.local_mesh()
    params = jax.device_put(frozen.params, sharding.replicated(mesh))
    graphdef = _abstract(frozen.config, frozen.dtype)[0]
    per_device = _TOKENS_ON_CPU if jax.default_backend() == "cpu" else _TOKENS_ON_ACCELERATOR
    done = 0
    for row_length, part in _by_row_length(corpus, frozen.config.max_length):
        rows = max(1, per_device // row_length) * sharding.batch_devices(mesh)
        pad_id = frozen.config.pad_token_id
        loader = WordLoader(part, rows=rows, row_length=row_length, seed=0, pad_id=pad_id, shuffle=False)
        for index in range(math.ceil(loader.packing.batches_per_epoch)):
            batch = loader.batch(index)
            arrays = jax.device_put((batch["tokens"], batch["segments"]), sharding.row_sharding(mesh))
            # Words are picked on the host: how many a row has differs, and would need a program each.
            hidden_RxLxD = np.asarray(_encode(params, *arrays, graphdef=graphdef, layers=layers))
            row_V, column_V = np.nonzero(batch["words"] >= 0)
            done += np.count_nonzero(batch["segments"])
            vectors_VxD = hidden_RxLxD[row_V, batch["positions"][row_V, column_V]]
            yield batch["words"][row_V, column_V], vectors_VxD, done / corpus.tokens_T.size


@functools.partial(jax.jit, static_argnames=("graphdef", "layers"))
def _encode(params: dict, tokens_RxL, segments_RxL, *, graphdef: nnx.GraphDef, layers: tuple[int, ...]) -> jax.Array:
    """The vectors of the layers asked for, side by side: float32 [R, L, D]."""
    return params_lib.merge(graphdef, params)(tokens_RxL, segments_RxL, layers=layers).astype(jnp.float32)


def _by_row_length(corpus: WordCorpus, longest: int) -> Iterator[tuple[int, WordCorpus]]:
    """(row length, the sequences that go into such rows): the attention of a row costs the square of its length."""
    length_S = np.diff(corpus.sequence_offsets_S1)
    below, row_length = 0, min(_SHORTEST_ROW, longest)
    while below < longest:
        chosen = np.flatnonzero((length_S > below) & (length_S <= row_length))
        if chosen.size:
            yield row_length, _part(corpus, chosen)
        below, row_length = row_length, min(2 * row_length, longest)


def _part(corpus: WordCorpus, chosen: np.ndarray) -> WordCorpus:
    """Some sequences of a corpus; their words keep their numbers."""
    length, count = np.diff(corpus.sequence_offsets_S1)[chosen], np.diff(corpus.word_offsets_S1)[chosen]
    words = ragged.ranges(corpus.word_offsets_S1[chosen], count)
    return dataclasses.replace(
        corpus,
        tokens_T=corpus.tokens_T[ragged.ranges(corpus.sequence_offsets_S1[chosen], length)],
        sequence_offsets_S1=ragged.offsets(length),
        word_V=corpus.word_V[words],
        position_V=corpus.position_V[words],
        word_offsets_S1=ragged.offsets(count),
    )
