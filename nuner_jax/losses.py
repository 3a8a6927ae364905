"""The contrastive loss between token vectors and concept vectors, sharded, and its plain reference.

For scored tokens t and the *distinct* concepts c of the batch, with the target y_tc = 1 where t lies in
a mention annotated with c, and the logit s_tc = scale * <t, c> + bias, NuNER (Bogdanov et al., EMNLP 2024,
Figure 5) minimises the binary cross-entropy over all pairs:

    BCE(s, y) = softplus(s) - y * s
    L = sum_t sum_c softplus(s_tc)  -  sum over positive pairs of s_tc

The first sum is dense and needs no target; the second runs over the few positive pairs. So no array of
tokens x concepts targets exists, and the dense sum can be computed a chunk of concepts at a time.

A concept that occurs more than once (on two devices, say) counts once: its first occurrence stands for
it, in the order of the global batch. Shapes: R rows of L tokens, D wide; P positive pairs a row; N
concepts in all (N = Q rows x S slots).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nuner_jax.sharding import BATCH_AXES


def contrastive_loss_reference(
    tokens_RxLxD,
    scored_RxL,
    concepts_NxD,
    concept_ids_N,
    pair_positions_RxP,
    pair_concepts_RxP,
    scale,
    bias,
) -> dict[str, jax.Array]:
    """The loss with its full target tensor, on one device: slow, plain, and what the tests hold to.

    Args and result are those of `contrastive_loss`, with the concepts flat (N = Q x S).
    """
    rows, length, _ = tokens_RxLxD.shape
    same_NxN = concept_ids_N[:, None] == concept_ids_N[None, :]
    repeated_N = jnp.tril(same_NxN, k=-1).any(axis=1)
    counted_N = (concept_ids_N >= 0) & ~repeated_N

    # target[r, l, n] = 1 where some positive pair of row r names position l and the concept of column n.
    at_position_RxPxL = pair_positions_RxP[:, :, None] == jnp.arange(length)
    is_concept_RxPxN = (pair_concepts_RxP[:, :, None] == concept_ids_N) & counted_N
    targets_RxLxN = jnp.einsum(
        "rpl,rpn->rln", at_position_RxPxL.astype(jnp.float32), is_concept_RxPxN.astype(jnp.float32)
    )
    targets_RxLxN = jnp.minimum(targets_RxLxN, 1.0)

    logits_RxLxN = scale * jnp.einsum("rld,nd->rln", tokens_RxLxD, concepts_NxD) + bias
    weights_RxLxN = (scored_RxL[:, :, None] & counted_N).astype(jnp.float32)
    bce_RxLxN = jax.nn.softplus(logits_RxLxN) - targets_RxLxN * logits_RxLxN
    return {
        "loss": jnp.sum(weights_RxLxN * bce_RxLxN),
        "positive_logits": jnp.sum(weights_RxLxN * targets_RxLxN * logits_RxLxN),
        "positives": jnp.sum(weights_RxLxN * targets_RxLxN),
        "pairs": jnp.sum(weights_RxLxN),
    }


def contrastive_loss(
    mesh: Mesh,
    tokens_RxLxD,
    scored_RxL,
    concepts_QxSxD,
    concept_ids_QxS,
    pair_positions_RxP,
    pair_concepts_RxP,
    scale,
    bias,
    *,
    chunk: int | None = None,
) -> dict[str, jax.Array]:
    """Sums of the contrastive loss over the global batch; neither value nor gradient depends on the mesh.

    Args:
      mesh: the mesh, with the axes of `sharding.AXES`; rows are split over `sharding.BATCH_AXES`.
      tokens_RxLxD: token vectors, any float dtype; logits are accumulated in float32.
      scored_RxL: bool, the tokens that take part (no padding, no special tokens).
      concepts_QxSxD: concept vectors, Q rows of S slots.
      concept_ids_QxS: int32, the identity of each concept; -1 marks an empty slot.
      pair_positions_RxP: int32, for each positive pair the token's position in its row; -1 is padding.
        A pair names a scored token, and no pair is named twice.
      pair_concepts_RxP: int32, the concept id of the pair; one that is not in the batch is left out.
      scale, bias: float32 scalars of the logit.
      chunk: concepts per chunk of the dense sum (memory grows with it, not with N); None is all at once.

    Returns:
      float32 scalars: `loss` (the sum L above), `positive_logits` (sum of s_tc over positives),
      `positives` (number of positive pairs) and `pairs` (number of pairs scored). The caller divides.
    """
    batch = P(BATCH_AXES)
    local = functools.partial(_local_sums, chunk=chunk)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(batch, batch, batch, batch, batch, batch, P(), P()),
        out_specs=P(),
    )(
        tokens_RxLxD,
        scored_RxL,
        concepts_QxSxD,
        concept_ids_QxS,
        pair_positions_RxP,
        pair_concepts_RxP,
        scale,
        bias,
    )


def _local_sums(tokens, scored, concepts_qxSxD, ids_qxS, pair_positions, pair_concepts, scale, bias, *, chunk):
    """One device's tokens against the concepts of all devices: the all-gather here is the loss's only one."""
    depth = tokens.shape[-1]
    concepts_NxD = jax.lax.all_gather(concepts_qxSxD.reshape(-1, depth), BATCH_AXES, tiled=True)
    ids_N = jax.lax.all_gather(ids_qxS.reshape(-1), BATCH_AXES, tiled=True)
    counted_N, pair_columns = _first_occurrences(ids_N, pair_concepts)

    dense = _dense_softplus(tokens.reshape(-1, depth), scored.reshape(-1), concepts_NxD, counted_N, scale, bias, chunk)
    valid_rxP = (pair_positions >= 0) & (pair_columns >= 0)
    pair_tokens = jnp.take_along_axis(tokens, jnp.maximum(pair_positions, 0)[:, :, None], axis=1)
    pair_vectors = concepts_NxD[jnp.maximum(pair_columns, 0)]
    dots_rxP = jnp.einsum("rpd,rpd->rp", pair_tokens, pair_vectors, preferred_element_type=jnp.float32)
    positive_logits = jnp.sum(jnp.where(valid_rxP, scale * dots_rxP + bias, 0.0))
    sums = {
        "loss": dense - positive_logits,
        "positive_logits": positive_logits,
        "positives": jnp.sum(valid_rxP, dtype=jnp.float32),
        "pairs": jnp.sum(scored, dtype=jnp.float32) * jnp.sum(counted_N, dtype=jnp.float32),
    }
    return jax.lax.psum(sums, BATCH_AXES)


def _first_occurrences(ids_N, pair_concepts):
    """Which columns count (the first of each id), and the column of each pair's concept (-1: not there)."""
    order_N = jnp.argsort(ids_N, stable=True)
    sorted_N = ids_N[order_N]
    first_N = jnp.concatenate([jnp.ones((1,), bool), sorted_N[1:] != sorted_N[:-1]])
    counted_N = jnp.zeros(ids_N.shape, bool).at[order_N].set(first_N & (sorted_N >= 0))
    place = jnp.minimum(jnp.searchsorted(sorted_N, pair_concepts, side="left"), ids_N.size - 1)
    present = (sorted_N[place] == pair_concepts) & (pair_concepts >= 0)
    return counted_N, jnp.where(present, order_N[place], -1)


def _dense_softplus(tokens_TxD, scored_T, concepts_NxD, counted_N, scale, bias, chunk):
    """sum_t sum_c softplus(s_tc) over scored tokens and counted concepts, a chunk of concepts at a time."""

    def chunk_sum(concepts_CxD, counted_C):
        dots_TxC = jnp.einsum("td,cd->tc", tokens_TxD, concepts_CxD, preferred_element_type=jnp.float32)
        softplus_TxC = jax.nn.softplus(scale * dots_TxC + bias)
        return jnp.sum(jnp.where(scored_T[:, None] & counted_C[None, :], softplus_TxC, 0.0))

    num_concepts, depth = concepts_NxD.shape
    if chunk is None or chunk >= num_concepts:
        return chunk_sum(concepts_NxD, counted_N)
    missing = -num_concepts % chunk
    chunks = (
        jnp.pad(concepts_NxD, ((0, missing), (0, 0))).reshape(-1, chunk, depth),
        jnp.pad(counted_N, (0, missing)).reshape(-1, chunk),
    )

    # Checkpointed, so that the backward pass recomputes a chunk's logits instead of keeping all of them.
    @jax.checkpoint
    def body(total, one):
        return total + chunk_sum(*one), None

    # A zero that varies over the mesh as the chunk sums do: shard_map's types ask for it.
    zero = jnp.sum(tokens_TxD[:0], dtype=jnp.float32)
    return jax.lax.scan(body, zero, chunks)[0]
