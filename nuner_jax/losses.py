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

from nuner_jax.sharding import AXES, BATCH_AXES


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

    Rows are split over `sharding.BATCH_AXES`, and the slots of each concept row over `tensor`, so that each device
    scores its own tokens against 1 / `tensor` of the concepts. Gradients are added up in float32, over devices too,
    and rounded to the dtype of the vectors once.

    Args:
      mesh: the mesh, with the axes of `sharding.AXES`.
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
    missing = -concept_ids_QxS.shape[1] % mesh.shape["tensor"]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(batch, batch, P(BATCH_AXES, "tensor"), batch, batch, batch, P(), P()),
        out_specs=P(),
    )(
        tokens_RxLxD,
        scored_RxL,
        jnp.pad(concepts_QxSxD, ((0, 0), (0, missing), (0, 0))),
        jnp.pad(concept_ids_QxS, ((0, 0), (0, missing)), constant_values=-1),
        pair_positions_RxP,
        pair_concepts_RxP,
        scale,
        bias,
    )


def _local_sums(tokens, scored, concepts_qxsxD, ids_qxS, pair_positions, pair_concepts, scale, bias, *, chunk):
    """One device's tokens against its slots s of all concept rows: the all-gather here is the loss's only one."""
    depth, dtype = tokens.shape[-1], jnp.result_type(tokens, concepts_qxsxD)
    # Widened so that the gradients are added up in float32; the products are those of the narrow vectors.
    tokens = jax.lax.pcast(tokens.astype(jnp.float32), "tensor", to="varying")
    concepts_NxD = _gather_widened(concepts_qxsxD).reshape(-1, depth)
    ids_QxS = jax.lax.all_gather(ids_qxS, BATCH_AXES, tiled=True)
    counted_N, pair_columns = _own_columns(*_first_occurrences(ids_QxS, pair_concepts), concepts_qxsxD.shape[1])

    dense = _dense_softplus(
        tokens.reshape(-1, depth), scored.reshape(-1), concepts_NxD, counted_N, scale, bias, chunk, dtype
    )
    valid_rxP = (pair_positions >= 0) & (pair_columns >= 0)
    pair_tokens = jnp.take_along_axis(tokens, jnp.maximum(pair_positions, 0)[:, :, None], axis=1)
    pair_vectors = concepts_NxD[jnp.maximum(pair_columns, 0)]
    dots_rxP = jnp.einsum("rpd,rpd->rp", pair_tokens, pair_vectors)
    positive_logits = jnp.sum(jnp.where(valid_rxP, scale * dots_rxP + bias, 0.0))
    sums = {
        "loss": dense - positive_logits,
        "positive_logits": positive_logits,
        "positives": jnp.sum(valid_rxP, dtype=jnp.float32),
        "pairs": jnp.sum(scored, dtype=jnp.float32) * jnp.sum(counted_N, dtype=jnp.float32),
    }
    return jax.lax.psum(sums, AXES)


@jax.custom_vjp
def _gather_widened(x_qx):
    """The rows of all devices as float32, sent in their own dtype; gradients are added over devices in float32."""
    return jax.lax.all_gather(x_qx, BATCH_AXES, tiled=True).astype(jnp.float32)


def _gather_widened_forward(x_qx):
    return _gather_widened(x_qx), x_qx[:0]  # what is kept is the dtype


def _gather_widened_backward(like, grad_Qx):
    return (jax.lax.psum_scatter(grad_Qx, BATCH_AXES, tiled=True).astype(like.dtype),)


_gather_widened.defvjp(_gather_widened_forward, _gather_widened_backward)


def _first_occurrences(ids_QxS, pair_concepts):
    """Which columns count (the first of each id) [Q, S], and the column of each pair's concept (-1: not there)."""
    ids_N = ids_QxS.reshape(-1)
    order_N = jnp.argsort(ids_N, stable=True)
    sorted_N = ids_N[order_N]
    first_N = jnp.concatenate([jnp.ones((1,), bool), sorted_N[1:] != sorted_N[:-1]])
    counted_N = jnp.zeros(ids_N.shape, bool).at[order_N].set(first_N & (sorted_N >= 0))
    place = jnp.minimum(jnp.searchsorted(sorted_N, pair_concepts, side="left"), ids_N.size - 1)
    present = (sorted_N[place] == pair_concepts) & (pair_concepts >= 0)
    return counted_N.reshape(ids_QxS.shape), jnp.where(present, order_N[place], -1)


def _own_columns(counted_QxS, columns, own_slots):
    """`_first_occurrences` of this device's slots of the rows alone: [Q * own_slots], and columns of those."""
    start = jax.lax.axis_index("tensor") * own_slots
    row, slot = columns // counted_QxS.shape[1], columns % counted_QxS.shape[1] - start
    own = (columns >= 0) & (slot >= 0) & (slot < own_slots)
    counted_Qxs = jax.lax.dynamic_slice_in_dim(counted_QxS, start, own_slots, axis=1)
    return counted_Qxs.reshape(-1), jnp.where(own, row * own_slots + slot, -1)


def _dense_softplus(tokens_TxD, scored_T, concepts_NxD, counted_N, scale, bias, chunk, dtype):
    """sum_t sum_c softplus(s_tc) over scored tokens and counted concepts, a chunk of concepts at a time."""

    def chunk_sum(concepts_CxD, counted_C):
        softplus_TxC = jax.nn.softplus(scale * _dots(tokens_TxD, concepts_CxD, dtype) + bias)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dots(a_TxD, b_CxD, dtype):
    """All dot products of two sets of float32 vectors, multiplied in `dtype` and added in float32, gradients too."""
    return jnp.einsum("td,cd->tc", a_TxD.astype(dtype), b_CxD.astype(dtype), preferred_element_type=jnp.float32)


def _dots_forward(a_TxD, b_CxD, dtype):
    return _dots(a_TxD, b_CxD, dtype), (a_TxD.astype(dtype), b_CxD.astype(dtype))


def _dots_backward(dtype, vectors, grad_TxC):
    (a_TxD, b_CxD), grad_TxC = vectors, grad_TxC.astype(dtype)
    return (
        jnp.einsum("tc,cd->td", grad_TxC, b_CxD, preferred_element_type=jnp.float32),
        jnp.einsum("tc,td->cd", grad_TxC, a_TxD, preferred_element_type=jnp.float32),
    )


_dots.defvjp(_dots_forward, _dots_backward)
