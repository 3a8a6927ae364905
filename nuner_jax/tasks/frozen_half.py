"""The frozen half, once: what the text tower's embeddings and frozen layers make of every token, kept in a file.

Training never changes them, so that without dropout in them their vectors of a sentence are always the same. The file
CACHE_DIR/frozen/KEY.bfloat16 has those of all tokens of a corpus, [T, D], each where its token stands in
`Corpus.tokens_T`; its name tells of what data and parameters they are, and it is there only when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nuner_jax.data.corpus import Corpus
from nuner_jax.data.packed_rows import PackedRows
from nuner_jax.data.prefetch import Prefetch
from nuner_jax.errors import NunerError
from nuner_jax.folders import check_free, locked, told_size, writing
from nuner_jax.models.encoder import EncoderConfig
from nuner_jax.models.params import flatten
from nuner_jax.tasks import text_tower

DTYPE = np.dtype(jnp.bfloat16)
_FORMAT = 1  # raise it when the vectors change meaning: older files are then left alone
_TOKENS_AT_ONCE = 2**19  # in memory before they are written, in the order of the corpus; packed together
_AHEAD = 2  # batches that the devices compute while the host puts another one in order


@dataclasses.dataclass(frozen=True)
class Bottom:
    """The part of a text tower that is computed once.

    config: sizes of the tower.
    layers: those that are frozen, from the bottom.
    dtype: of the computation, by its name.
    params: the tower's parameters at least, as the task has them.
    encode: packed rows, tokens and segments int32 [R, L], to vectors of DTYPE [R, L, D].
    rows, row_length: R and L.
    """

    config: EncoderConfig
    layers: int
    dtype: str
    params: dict
    encode: Callable[[np.ndarray, np.ndarray], jax.Array]
    rows: int
    row_length: int


def check(model: ConfigDict, mesh: Mesh) -> None:
    """Whether there is something to keep, and a process that can; raises NunerError that names the keys."""
    if not model.frozen_layers:
        raise NunerError(
            "config.model.keep_frozen = True with config.model.frozen_layers = 0: no layer is frozen, and nothing can "
            "be kept; freeze some, or set config.model.keep_frozen to False"
        )
    processes = len({device.process_index for device in mesh.devices.flat})
    if processes > 1:
        raise NunerError(
            f"config.model.keep_frozen = True needs one process, and these are {processes}: set it to False"
        )


def unknown(corpus: Corpus, width: int) -> np.ndarray:
    """What stands for the vectors [T, D] until they are there, without memory: NaN, so that no step goes unnoticed."""
    return np.broadcast_to(np.array(np.nan, DTYPE), (corpus.tokens_T.size, width))


def vectors(bottom: Bottom, corpus: Corpus, cache_dir: Path, say: Callable[[str], None]) -> np.ndarray:
    """The vectors of all tokens of a corpus [T, D], of DTYPE, memory-mapped; where they are not there yet, computed.

    Args:
      bottom: what makes them.
      corpus: the tokens, in sequences that fit a row.
      cache_dir: of whose folder `frozen` the file is one.
      say: is told what is kept where, and how long it took.

    Raises:
      NunerError: too little free space, or the file cannot be written.
    """
    shape = (corpus.tokens_T.size, bottom.config.hidden_size)
    path = cache_dir / "frozen" / f"{_key(bottom, corpus)}.bfloat16"
    size = math.prod(shape) * DTYPE.itemsize
    found, began = "found there", time.monotonic()
    if not _is_whole(path, size):
        with locked(path):  # of several processes on a machine, one computes
            if not _is_whole(path, size):
                _write(path, size, bottom, corpus)
                found = f"computed in {time.monotonic() - began:,.1f} s"
    say(f"frozen layers: the vectors of {shape[0]:,} tokens, {told_size(size)} in {path}, {found}")
    return np.memmap(path, DTYPE, "r", shape=shape)


def _key(bottom: Bottom, corpus: Corpus) -> str:
    """The name of the vectors: a digest of all that decides them."""
    sizes = dataclasses.replace(bottom.config, dropout=0.0).to_hf()  # there is none in them, whatever its rate
    facts = [_FORMAT, corpus.fingerprint, sizes, bottom.layers, bottom.dtype]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path, leaf in sorted(flatten(bottom.params).items()):
        if text_tower.is_frozen(path, bottom.layers):
            digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _is_whole(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _write(path: Path, size: int, bottom: Bottom, corpus: Corpus) -> None:
    """Computes the vectors into a file of another name, which is renamed when it is whole."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    way_on = "move config.data.cache_dir to another disk, or set config.model.keep_frozen to False"
    check_free(path.parent, size, "what config.model.keep_frozen keeps", way_on)
    with writing(path):
        try:
            with partial.open("wb") as file:
                for first, stop in _pieces(corpus.sequence_offsets_W1):
                    # Not through a memory map: a disk that is full would end the process without a word.
                    file.write(_piece(bottom, corpus, first, stop).view(np.uint16))
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def _pieces(offsets_W1: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring sequences, first and exclusive last, of about _TOKENS_AT_ONCE tokens."""
    borders = np.searchsorted(offsets_W1, np.arange(0, offsets_W1[-1], _TOKENS_AT_ONCE))
    return itertools.pairwise(np.unique([*borders, len(offsets_W1) - 1]).tolist())


def _piece(bottom: Bottom, corpus: Corpus, first: int, stop: int) -> np.ndarray:
    """The vectors of the tokens of these sequences, one sequence after another."""
    offsets_S1 = np.asarray(corpus.sequence_offsets_W1[first : stop + 1])
    packed = PackedRows(np.diff(offsets_S1), rows=bottom.rows, row_length=bottom.row_length, seed=0, shuffle=False)

    def batch(index: int):
        placed = packed.batch(index)
        return placed, bottom.encode(*placed.gather(corpus.tokens_T, offsets_S1, bottom.config.pad_token_id))

    count = math.ceil(packed.batches_per_epoch)
    vectors_TxD = np.empty((offsets_S1[-1] - offsets_S1[0], bottom.config.hidden_size), DTYPE)
    with contextlib.closing(Prefetch(batch, 0, count, _AHEAD)) as batches:
        for _ in range(count):
            placed, vectors_RxLxD = batches.get()
            found_NxD = np.asarray(vectors_RxLxD).reshape(-1, vectors_TxD.shape[1])[placed.places()]
            vectors_TxD[placed.origins(offsets_S1 - offsets_S1[0])] = found_NxD
    return vectors_TxD
