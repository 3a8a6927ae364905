"""Token-to-concept retrieval: how well a mention's tokens find their concept among all of a split's.

For each token of a mention and each concept it is annotated with, all distinct concepts of the split are
ranked by their dot product with the token's vector. The token's other right concepts are left out of the
ranking, and ties count half. Reported are the share of first places (top-1) and the mean reciprocal rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nuner_jax.data import ragged
from nuner_jax.data.corpus import Corpus
from nuner_jax.sharding import BATCH_AXES


def retrieval_sums(mesh: Mesh, tokens_RxLxD, concepts_NxD, pair_positions_RxP, pair_concepts_RxP):
    """Sums over a batch's positive pairs.

    Args:
      mesh: rows are split over `BATCH_AXES`.
      tokens_RxLxD: token vectors.
      concepts_NxD: the vectors of all concepts, in the order of their ids; the same on every device.
      pair_positions_RxP, pair_concepts_RxP: int32, -1 pads.

    Returns:
      float32 scalars `top1`, `reciprocal_rank` (sums) and `pairs` (their divisor).
    """

    def one_row(row) -> dict[str, jax.Array]:
        tokens_LxD, concepts_NxD, positions_P, ids_P = row
        valid_P = positions_P >= 0
        scores_PxN = jnp.einsum(
            "pd,nd->pn", tokens_LxD[jnp.maximum(positions_P, 0)], concepts_NxD, preferred_element_type=jnp.float32
        )
        own_P = jnp.take_along_axis(scores_PxN, jnp.maximum(ids_P, 0)[:, None], axis=1)[:, 0]
        # right[i, j]: pair j is a right concept of pair i's token; i itself is one.
        right_PxP = (positions_P[:, None] == positions_P[None, :]) & valid_P[None, :]
        # "Not at most", so that vectors that are not numbers rank last and not first.
        greater_P = jnp.sum(~(scores_PxN <= own_P[:, None]), axis=1) - jnp.sum(
            right_PxP & ~(own_P[None, :] <= own_P[:, None]), axis=1
        )
        equal_P = jnp.sum(scores_PxN == own_P[:, None], axis=1) - jnp.sum(
            right_PxP & (own_P[None, :] == own_P[:, None]), axis=1
        )
        rank_P = 1.0 + greater_P + equal_P / 2.0
        return {
            "top1": jnp.sum(valid_P & (rank_P == 1.0), dtype=jnp.float32),
            "reciprocal_rank": jnp.sum(jnp.where(valid_P, 1.0 / rank_P, 0.0)),
            "pairs": jnp.sum(valid_P, dtype=jnp.float32),
        }

    def local(tokens, concepts_NxD, positions, ids):
        # One row at a time: P x N scores are small, R x P x N are not.
        sums = jax.lax.map(lambda row: one_row((row[0], concepts_NxD, row[1], row[2])), (tokens, positions, ids))
        return jax.lax.psum(jax.tree.map(jnp.sum, sums), BATCH_AXES)

    rows = P(BATCH_AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows, rows), out_specs=P())(
        tokens_RxLxD, concepts_NxD, pair_positions_RxP, pair_concepts_RxP
    )


def concept_batches(corpus: Corpus, rows: int, pad_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All concept names of a corpus in the order of their ids, one a row: (tokens, segments) of [rows, width].

    The last batch is filled up with empty rows.
    """
    length_C = np.diff(corpus.concept_offsets_C1)
    width = int(length_C.max(initial=1))
    for start in range(0, length_C.size, rows):
        length_n = length_C[start : start + rows]
        tokens = np.full((rows, width), pad_id, np.int32)
        segments = np.zeros_like(tokens)
        to = ragged.ranges(np.arange(length_n.size) * width, length_n)
        first = int(corpus.concept_offsets_C1[start])
        tokens.reshape(-1)[to] = corpus.concept_tokens_U[first : first + length_n.sum()]
        segments.reshape(-1)[to] = 1
        yield tokens, segments
