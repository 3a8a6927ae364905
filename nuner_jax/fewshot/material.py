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
from nuner_jax.errors import NunerError
from nuner_jax.fewshot.sampling import RULES, Sample, pool_counts, sample_sentences, shortages
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
          NunerError: the pool has no mention, a k draws nothing, or the test sentences drawn have no mention.
        """
        counts_SxT = pool_counts(data, rule)
        samples = {(k, seed): sample_sentences(counts_SxT, k, seed, rule) for k in ks for seed in seeds}
        _refuse_empty(samples, counts_SxT, data.name, rule)
        lacking = shortages(samples, counts_SxT, data.types, rule)
        notes = [*_about_types(data), *(f"{data.name}: {line}" for line in lacking)]
        test = _some(data, max_sentences)
        if len(test) < len(data.test):
            notes.append(f"{data.name}: scored on {len(test):,} of the {len(data.test):,} sentences of its test split")
        drawn_P = np.unique(np.concatenate([np.asarray(sample.ids, np.int64) for sample in samples.values()]))
        pool = Sentences.of([data.train[number] for number in drawn_P], data)
        return cls(data, Sentences.of(test, data), samples, drawn_P, pool, tuple(notes))

    def support(self, k: int, seed: int) -> np.ndarray:
        """The words of a sample, numbered as in `pool`."""
        places = np.searchsorted(self.drawn_P, self.samples[k, seed].ids)
        first, stop = self.pool.offsets_S1[places], self.pool.offsets_S1[places + 1]
        return ragged.ranges(first, stop - first)

    def facts(self, k: int, seed: int) -> dict[str, Any]:
        """What the row of a result tells of its sample."""
        sample = self.samples[k, seed]
        short = [name for name, reached in zip(self.data.types, sample.reached, strict=True) if reached < k]
        return {"sample_hash": sample.hash, "sentences": len(sample.ids), "short_types": short}

    def samples_as_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """k → seed → ids, their hash, and how many mentions of each type they have."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (k, seed), sample in self.samples.items():
            reached = dict(zip(self.data.types, sample.reached, strict=True))
            found.setdefault(str(k), {})[str(seed)] = {"hash": sample.hash, "ids": sample.ids, "reached": reached}
        return found


def _refuse_empty(samples: Mapping[tuple[int, int], Sample], counts_SxT: np.ndarray, name: str, rule: str) -> None:
    """Refuses a k of which there is nothing to learn: every sentence by itself lifts a type above 2k."""
    if empty := [k for (k, _), sample in samples.items() if k and not sample.ids]:
        most_S = counts_SxT.max(axis=1)
        least = -(-int(most_S[most_S > 0].min()) // 2)
        raise NunerError(
            f"config.k: k = {empty[0]} draws nothing of {name}, as each sentence of its train split that has a mention "
            f"has more than {2 * empty[0]} {RULES[rule]} of one type; the smallest k that draws any is {least}"
        )


def _some(data: TaggedSet, max_sentences: int | None) -> Sequence[Record]:
    """At most so many sentences of the test split, drawn at random."""
    if max_sentences is None or max_sentences >= len(data.test):
        return data.test
    chosen = np.sort(np.random.default_rng(0).choice(len(data.test), max_sentences, replace=False))
    test = [data.test[number] for number in chosen]
    if not any(record.entities for record in test):
        raise NunerError(
            f"config.eval.max_sentences = {max_sentences}: no sentence that was drawn of the test split of {data.name}"
            " has a mention, so nothing can be scored; raise it"
        )
    return test


def _about_types(data: TaggedSet) -> list[str]:
    if not data.report["types_only_in_test"]:
        return []
    names = ", ".join(data.report["types_only_in_test"])
    return [f"{data.name}: types in test that train lacks: {names}; no head can learn them, and they count with F1 0"]
