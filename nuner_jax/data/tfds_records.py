"""The TFDS builder of record shards. Only `builder.py` imports it: it needs tensorflow_datasets.

Building and reading ArrayRecord shards loads no TensorFlow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class NunerRecords(tfds.core.GeneratorBasedBuilder):
    """Texts with their entities: character spans, concepts and descriptions.

    The examples come from `spool`, a file of one JSON record per line; `split_of` tells the split
    of a text by a hash, which is also the key by which TFDS orders a split.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Where TFDS looks for download checksums, through a package that it does not require
    # (importlib_resources); nothing is downloaded here.
    code_path = None

    def __init__(
        self,
        *,
        spool: Path | None = None,
        splits: tuple[str, ...] = (),
        split_of: Callable[[str], tuple[str, int]] | None = None,
        **kwargs: Any,
    ):
        self._spool, self._splits, self._split_of = spool, splits, split_of
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "entities": tfds.features.Sequence(
                        {
                            "start": np.int32,
                            "end": np.int32,
                            "concept": tfds.features.Text(),
                            "description": tfds.features.Text(),
                        }
                    ),
                }
            ),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        with open(self._spool, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                own_split, key = self._split_of(row["text"])
                if own_split == split:
                    yield key, row
