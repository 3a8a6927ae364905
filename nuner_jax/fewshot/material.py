"""What is measured on: a data set's query sentences, and the samples of its pool that heads learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nuner_jax.data import ragged
from nuner_jax.data.ner.datasets import TaggedSet
from nuner_jax.data.ner.words import label_words, word_spans
from nuner_jax.data.records import Record
from nuner_jax.fewshot.sampling import Sample, pool_counts, sample_sentences, shortages
from nuner_jax.metrics import Spans


@dataclass(frozen=True, eq=False)
class Sentences:
    """Texts, their words (numbered over all texts) and their mentions.

    spans: of each text, its words as character offsets. labels_W: of each word, 0 outside, 1 … T.
    mentions: in characters.
    """

    texts: tuple[str, ...]
    spans: tuple[np.ndarray, ...]
    offsets_S1: np.ndarray
    labels_W: np.ndarray
    mentions: Spans

    @classmethod
    def of(cls, records: Sequence[Record], data: TaggedSet) -> Sentences:
        """Those of some records of a data set."""
        numbers = {name: number for number, name in enumerate(data.types, start=1)}
        spans = tuple(word_spans(record.text, data.split_on_space) for record in records)
        labels = [label_words(record, words, numbers) for record, words in zip(records, spans, strict=True)]
        return cls(
            texts=tuple(record.text for record in records),
            spans=spans,
            offsets_S1=ragged.offsets([len(words) for words in spans]),
            labels_W=np.concatenate([np.zeros(0, np.int32), *labels]),
            mentions=Spans.of(
                (sentence, entity.start, entity.end, numbers[entity.concept])
                for sentence, record in enumerate(records)
                for entity in record.entities
            ),
        )


@dataclass(frozen=True, eq=False)
class Material:
    """All that is measured on one data set.

    query: sentences of the test split.
    samples: by (k, seed); the same for every encoder and head.
    pool: the sentences of the train split that are in any sample, numbered as in `drawn_P`.
    """

    data: TaggedSet
    query: Sentences
    samples: Mapping[tuple[int, int], Sample]
    drawn_P: np.ndarray
    pool: Sentences
    notes: tuple[str, ...]

    @classmethod
    def of(cls, data: TaggedSet, ks: Sequence[int], seeds: Sequence[int], rule: str, max_sentences: int | None):
        """Draws the samples, and of the test split `max_sentences` at random where it has more.

        Raises:
          NunerError: the pool has no mention.
        """
        counts_SxT = pool_counts(data, rule)
        samples = {(k, seed): sample_sentences(counts_SxT, k, seed, rule) for k in ks for seed in seeds}
        notes = []
        for k in ks:
            lacking = [seed for seed in seeds if samples[k, seed].short or samples[k, seed].blocked]
            for line in shortages(samples[k, lacking[0]], counts_SxT, data.types, k, rule) if lacking else ():
                notes.append(f"{data.name}, seed {lacking[0]} ({len(lacking)} of {len(seeds)} are alike): {line}")
        test = data.test
        if max_sentences and max_sentences < len(test):
            chosen = np.sort(np.random.default_rng(0).choice(len(test), max_sentences, replace=False))
            test = [test[number] for number in chosen]
            notes.append(f"{data.name}: scored on {len(test):,} of the {len(data.test):,} sentences of its test split")
        drawn_P = np.unique(np.concatenate([np.asarray(sample.ids, np.int64) for sample in samples.values()]))
        pool = Sentences.of([data.train[number] for number in drawn_P], data)
        return cls(data, Sentences.of(test, data), samples, drawn_P, pool, tuple(notes))

    def support(self, k: int, seed: int) -> np.ndarray:
        """The words of a sample, numbered as in `pool`."""
        places = np.searchsorted(self.drawn_P, self.samples[k, seed].ids)
        first, stop = self.pool.offsets_S1[places], self.pool.offsets_S1[places + 1]
        return ragged.ranges(first, stop - first)

    def samples_as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """k → seed → ids, their hash, and how many mentions of each type they have."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (k, seed), sample in self.samples.items():
            reached = dict(zip(self.data.types, sample.reached, strict=True))
            found.setdefault(str(k), {})[str(seed)] = {"hash": sample.hash, "ids": sample.ids, "reached": reached}
        return found
