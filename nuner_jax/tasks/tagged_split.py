"""A split of a data set as token classification sees it: words with labels, and what was predicted, scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from nuner_jax import metrics
from nuner_jax.data import ragged
from nuner_jax.data.ner.words import label_words, word_spans
from nuner_jax.data.records import Record
from nuner_jax.data.tagged import WordCorpus, tokenise
from nuner_jax.decoding import Scheme

_SURE = 1e4  # logit by which a word that no token shows is outside


@dataclasses.dataclass(frozen=True, eq=False)
class TaggedSplit:
    """Texts, their words (numbered over all texts) and their mentions.

    texts: of the sentences.
    characters_Wx2, sentence_offsets_S1: where each word stands in its text; the first word of each sentence.
    labels_W: of the scheme, what is learnt. types_W: 0 outside, 1 … T, what token F1 compares.
    mentions: in characters, what entity F1 compares.
    corpus: the texts in tokens.
    """

    texts: tuple[str, ...]
    characters_Wx2: np.ndarray
    sentence_offsets_S1: np.ndarray
    labels_W: np.ndarray
    types_W: np.ndarray
    mentions: metrics.Spans
    corpus: WordCorpus

    @classmethod
    def make(
        cls,
        records: Sequence[Record],
        types: Sequence[str],
        scheme: Scheme,
        split_on_space: bool,
        tokenizer,
        window: int,
    ) -> TaggedSplit:
        """Divides texts into words and tokens, and labels the words.

        Args:
          records: whose mentions do not overlap.
          types: of all mentions; the first is type 1.
          scheme: of the labels.
          split_on_space: how texts divide into words, as `word_spans` takes it.
          tokenizer, window: as `tokenise` takes them.
        """
        texts = tuple(record.text for record in records)
        words = [word_spans(text, split_on_space) for text in texts]
        numbers = {name: number for number, name in enumerate(types, start=1)}
        sentence_offsets_S1 = ragged.offsets([len(spans) for spans in words])
        empty = np.zeros(0, np.int32)
        labelled = (label_words(record, spans, numbers) for record, spans in zip(records, words, strict=True))
        return cls(
            texts=texts,
            characters_Wx2=np.concatenate([empty.reshape(0, 2), *words]),
            sentence_offsets_S1=sentence_offsets_S1,
            labels_W=scheme.labels(metrics.Spans.of(_in_words(records, words, numbers)), sentence_offsets_S1),
            types_W=np.concatenate([empty, *labelled]),
            mentions=metrics.Spans.of(
                (sentence, entity.start, entity.end, numbers[entity.concept])
                for sentence, record in enumerate(records)
                for entity in record.entities
            ),
            corpus=tokenise(texts, words, tokenizer, window),
        )

    def describe(self) -> str:
        """What is in it, in a line."""
        corpus = self.corpus
        parts = [f"{len(self.texts):,} sentences", f"{corpus.num_words:,} words", f"{corpus.tokens_T.size:,} tokens"]
        parts += [f"{corpus.texts_split:,} texts in several windows"] if corpus.texts_split else []
        missing = corpus.words_without_tokens
        return ", ".join(parts + ([f"{missing:,} words without a token, taken as outside"] if missing else []))

    def scores(self, scheme: Scheme, logits_WxC: np.ndarray, weight_C: np.ndarray) -> Iterator[tuple[str, float]]:
        """The metrics of `nuner_jax/metrics.py`, and the loss.

        Args:
          scheme: of the labels.
          logits_WxC: of all words; those without a token: `silent_logits`.
          weight_C: of the classes in the loss.
        """
        num_types, offsets_S1 = scheme.num_types, self.sentence_offsets_S1
        labels_W = scheme.viterbi(logits_WxC, offsets_S1)
        found = scheme.spans(labels_W, offsets_S1).in_characters(self.characters_Wx2, offsets_S1)
        token = metrics.token_macro_f1(self.types_W, scheme.type_C[labels_W], num_types)
        entity = metrics.entity_micro_f1(self.mentions, found, num_types)
        yield "loss", self._loss(logits_WxC, weight_C)
        yield "token_macro_f1", float(token.f1_H[0])
        yield "entity_f1", float(entity.f1_H[0])
        yield "entity_precision", float(entity.precision_H[0])
        yield "entity_recall", float(entity.recall_H[0])
        yield "string_f1", float(metrics.string_f1(self.mentions, found, self.texts, num_types).f1_H[0])

    def _loss(self, logits_WxC: np.ndarray, weight_C: np.ndarray) -> float:
        """The weighted mean of the cross-entropy over the words that have a token."""
        words_V = self.corpus.word_V
        logits_VxC, labels_V = logits_WxC[words_V], self.labels_W[words_V]
        losses_V = np.logaddexp.reduce(logits_VxC, axis=1) - np.take_along_axis(logits_VxC, labels_V[:, None], 1)[:, 0]
        return float(np.average(losses_V, weights=weight_C[labels_V]))


def silent_logits(words: int, classes: int) -> np.ndarray:
    """Logits [W, C] of words that no token shows: they are outside."""
    logits_WxC = np.full((words, classes), -_SURE, np.float32)
    logits_WxC[:, 0] = 0
    return logits_WxC


def _in_words(records, words, numbers) -> Iterator[tuple[int, int, int, int]]:
    """Every mention as (sentence, first word, word after the last, type); a word that it covers in part is its own."""
    for sentence, (record, spans_Wx2) in enumerate(zip(records, words, strict=True)):
        for entity in record.entities:
            first = np.searchsorted(spans_Wx2[:, 1], entity.start, side="right")
            after = np.searchsorted(spans_Wx2[:, 0], entity.end, side="left")
            if first < after:  # else it is of white space alone
                yield sentence, first, after, numbers[entity.concept]
