"""The order of units, and which of them nearly repeat an earlier one.

Every function here depends on its arguments alone, so that processes and machines agree. The whole rule: units come
in the order of `rank`, and a unit is a near duplicate if one before it, left out or not, shares one of its `bands`
and has at least the threshold of `similarity` to it. So neither the order of the files nor the way in which the work
is divided matters, and `near_in_group` may be applied to each group of units with a band in common by itself.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nuner_jax.errors import NunerError

RANK_BYTES = 12  # among a billion texts two agree with a chance of 6e-12
PERMUTATIONS = 128  # of a MinHash: the similarity has a standard deviation of 0.035 at 0.8
_NGRAM = 3  # words
_SEED = 1  # of the permutations
_WEIGHTS = (0.1, 0.9)  # of a needless comparison and of a missed pair, when the bands are chosen
_LARGEST_TUNED = 0.95  # above this threshold, the bands are those of this one: the tuning needs two bands
_WORD = re.compile(r"\w+")


def rank(seed: int, text: bytes) -> bytes:
    """The place of a text (UTF-8) in the random order of a seed: smaller comes first.

    The first N in this order are a random sample of N, and the beginning of every larger one.
    """
    return hashlib.blake2b(b"%d\0" % seed + text, digest_size=RANK_BYTES).digest()


def shingles(text: str) -> list[bytes]:
    """The word 3-grams of the case-folded text; all its words as one if there are fewer than three.

    Punctuation and spacing play no part, unless there is nothing else.
    """
    words = _WORD.findall(text.casefold()) or [text]
    return [" ".join(words[at : at + _NGRAM]).encode() for at in range(max(len(words) - _NGRAM + 1, 1))]


def signature(text: str) -> np.ndarray:
    """The MinHash of a text's shingles, uint32 [PERMUTATIONS].

    Raises:
      NunerError: datasketch is missing.
    """
    sketch = _empty_sketch().copy()
    sketch.update_batch(shingles(text))
    return sketch.hashvalues


def bands(signature: np.ndarray, threshold: float) -> list[bytes]:
    """Keys of 8 bytes; texts as similar as the threshold most likely have one in common (87% at 0.8, 99.7% at 0.9)."""
    count, rows = _banding(threshold)
    values, width = signature.tobytes(), rows * signature.itemsize
    return [
        hashlib.blake2b(b"%d\0" % band + values[band * width : (band + 1) * width], digest_size=8).digest()
        for band in range(count)
    ]


def similarity(signatures_NxP: np.ndarray, signature_P: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of each of N texts to one text, [N]."""
    return (signatures_NxP == signature_P).mean(axis=1)


def near_in_group(signatures_NxP: np.ndarray, threshold: float) -> np.ndarray:
    """Which of N texts, in rank order and with a band in common, nearly repeat one before them, bool [N]."""
    near = np.zeros(len(signatures_NxP), bool)
    rest = np.arange(1, len(signatures_NxP))  # not yet known to be near an earlier one
    for earlier in range(len(signatures_NxP) - 1):
        rest = rest[rest > earlier]
        if not rest.size:
            break
        alike = similarity(signatures_NxP[rest], signatures_NxP[earlier]) >= threshold
        near[rest[alike]] = True
        rest = rest[~alike]
    return near


def near_duplicates(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Which of the texts, in rank order, nearly repeat one before them, bool [len(texts)].

    Only the bands of all texts are held (112 bytes each at 0.8); signatures (512) are made again for those that share
    one.

    Raises:
      NunerError: datasketch is missing.
    """
    count, _ = _banding(threshold)
    keys_NxB = np.empty((len(texts), count), np.uint64)
    for at, text in enumerate(texts):
        keys_NxB[at] = np.frombuffer(b"".join(bands(signature(text), threshold)), np.uint64)
    near = np.zeros(len(texts), bool)
    groups = [group for keys in keys_NxB.T for group in _groups(keys)]
    if not groups:
        return near
    members = np.unique(np.concatenate(groups))
    signatures = np.stack([signature(texts[at]) for at in members])
    for group in groups:
        near[group] |= near_in_group(signatures[np.searchsorted(members, group)], threshold)
    return near


def _groups(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices of each key that occurs more than once, ascending."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    ends = np.append(starts[1:], len(keys))
    repeated = ends - starts > 1
    for start, end in zip(starts[repeated], ends[repeated], strict=True):
        yield order[start:end]


@functools.cache
def _banding(threshold: float) -> tuple[int, int]:
    """(bands, values in each) that find pairs above the threshold: what they find besides is compared and let go."""
    index = _datasketch().MinHashLSH(min(threshold, _LARGEST_TUNED), PERMUTATIONS, weights=_WEIGHTS)
    return index.b, index.r


@functools.cache
def _empty_sketch() -> Any:
    return _datasketch().MinHash(PERMUTATIONS, seed=_SEED, scheme="affine32")


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise NunerError(
            "config.source.duplicates = 'near' needs the package datasketch; install the extra: "
            "pip install 'nuner_jax[annotate]', or set it to 'exact'"
        ) from error
    return datasketch
