"""The scores of labelled words: every metric of `nuner_jax.metrics`, as the plain data of a row of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nuner_jax import metrics
from nuner_jax.fewshot.material import Sentences


def mentions_of(query: Sentences, predicted_HxW: np.ndarray) -> metrics.Spans:
    """What heads found, in characters: words in a row with the same type are one mention."""
    spans_Wx2 = np.concatenate([np.zeros((0, 2), np.int32), *query.spans])
    return metrics.io_spans(predicted_HxW, query.offsets_S1).in_characters(spans_Wx2, query.offsets_S1)


def score(
    query: Sentences, types: Sequence[str], predicted_HxW: np.ndarray, found: metrics.Spans, include_other: bool
) -> list[dict[str, Any]]:
    """The scores of each head: those keys of a row that results.py calls metrics, with precision, recall and types.

    Args:
      query: what was labelled.
      types: names of the types 1 … T.
      predicted_HxW: the type that each of H heads gives each word; 0 for outside.
      found: the mentions of the H heads, in characters.
      include_other: whether "outside" is averaged as one more type in token macro F1.

    Raises:
      NunerError: the query sentences have no mention.
    """
    heads = len(predicted_HxW)
    of_metric = {
        "token_macro": metrics.token_macro_f1(query.labels_W, predicted_HxW, len(types), include_other),
        "entity": metrics.entity_micro_f1(query.mentions, found, len(types), heads),
        "string": metrics.string_f1(query.mentions, found, query.texts, len(types), heads),
    }
    rows: list[dict[str, Any]] = [{} for _ in range(heads)]
    for name, scores in of_metric.items():
        for head, row in enumerate(rows):
            row[f"{name}_f1"] = float(scores.f1_H[head])
            row[f"{name}_precision"] = float(scores.precision_H[head])
            row[f"{name}_recall"] = float(scores.recall_H[head])
            row.setdefault("per_type", {})[f"{name}_f1"] = scores.per_type(head, types)
    return rows
