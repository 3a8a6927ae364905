"""The contrastive loss between token vectors and concept vectors, sharded, and its plain reference.

For scored tokens t and the *distinct* concepts c of the batch, with the target y_tc = 1 where t lies in
a mention annotated with c, and the logit s_tc = scale * <t, c> + bias, NuNER (Bogdanov et al., EMNLP 2024,
Figure 5) minimises the binary cross-entropy over all pairs:

    BCE(s, y) = softplus(s) - y * s
    L = sum_t sum_c softplus(s_tc)  -  sum over positive pairs of s_tc

The first sum is dense and needs no target; the second runs over the few positive pairs. So no array of tokens x
concepts targets exists. The derivative by the logit is sigmoid(s) - y, as plain as the loss: where gradients are
wanted they are computed together with the value, a chunk of concepts at a time, and no logit is computed twice or kept.

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
      chunk: concepts that a device scores at once, at most (but one slot of every row); memory grows with it, and not
        with N. None is all.

    Returns:
      float32 scalars: `loss` (the sum L above), which alone has a gradient; `positive_logits` (sum of s_tc over
      positives), `positives` (number of positive pairs) and `pairs` (number of pairs scored). The caller divides.
    """
    missing = -concept_ids_QxS.shape[1] % mesh.shape["tensor"]
    sums = _sums(
        mesh,
        chunk,
        (tokens_RxLxD, jnp.pad(concepts_QxSxD, ((0, 0), (0, missing), (0, 0))), scale, bias),
        scored_RxL,
        jnp.pad(concept_ids_QxS, ((0, 0), (0, missing)), constant_values=-1),
        pair_positions_RxP,
        pair_concepts_RxP,
    )
    return {name: value if name == "loss" else jax.lax.stop_gradient(value) for name, value in sums.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(mesh, chunk, inputs, scored_RxL, ids_QxS, pair_positions_RxP, pair_concepts_RxP):
    """The sums; `inputs` are token vectors, concept vectors, scale and bias."""
    return _on_mesh(mesh, chunk, False, inputs, scored_RxL, ids_QxS, pair_positions_RxP, pair_concepts_RxP)[0]


def _sums_forward(mesh, chunk, inputs, scored_RxL, ids_QxS, pair_positions_RxP, pair_concepts_RxP):
    return _on_mesh(mesh, chunk, True, inputs, scored_RxL, ids_QxS, pair_positions_RxP, pair_concepts_RxP)


def _sums_backward(mesh, chunk, gradients, cotangents):
    del mesh, chunk
    times = lambda gradient: (cotangents["loss"] * gradient).astype(gradient.dtype)  # noqa: E731
    return jax.tree.map(times, gradients), None, None, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _on_mesh(mesh, chunk, with_gradients, inputs, *batch):
    """The sums over the global batch, and the gradients of `inputs`, or ()."""
    rows = P(BATCH_AXES)
    places = (rows, P(BATCH_AXES, "tensor"), P(), P())
    return jax.shard_map(
        functools.partial(_on_device, chunk=chunk, with_gradients=with_gradients),
        mesh=mesh,
        in_specs=(places, rows, rows, rows, rows),
        out_specs=(P(), places if with_gradients else ()),
    )(inputs, *batch)


def _on_device(inputs, scored_rxL, ids_qxS, pair_positions_rxP, pair_concepts_rxP, *, chunk, with_gradients):
    """One device's r rows of tokens against its s slots of all Q concept rows, c slots at a time."""
    tokens_rxLxD, concepts_qxsxD, scale, bias = inputs
    (rows, length, depth), own_slots = tokens_rxLxD.shape, concepts_qxsxD.shape[1]
    ids_QxS = jax.lax.all_gather(ids_qxS, BATCH_AXES, tiled=True)
    counted_QxS, columns_rxP = _first_occurrences(ids_QxS, pair_concepts_rxP)
    counted_Qxs, pair_row_rxP, pair_slot_rxP = _own_slots(counted_QxS, columns_rxP, own_slots)
    valid_rxP = (pair_positions_rxP >= 0) & (pair_slot_rxP >= 0)
    pair_token_rxP = jnp.arange(rows)[:, None] * length + pair_positions_rxP
    # Chunks of one size, so that the last one is nearly as full as the others.
    chunks = 1 if chunk is None else min(own_slots, -(-own_slots * len(ids_QxS) // chunk))
    slots = -(-own_slots // chunks)

    def add_chunk(number, totals):
        sums, gradients = totals
        # The last chunk begins early enough to be whole, and leaves out what the one before it has counted.
        fresh = number * slots
        first = jnp.minimum(fresh, own_slots - slots)
        counted_Qxc = jax.lax.dynamic_slice_in_dim(counted_Qxs, first, slots, axis=1)
        counted_Qxc &= first + jnp.arange(slots) >= fresh
        here_rxP = valid_rxP & (pair_slot_rxP >= fresh) & (pair_slot_rxP < first + slots)
        more, more_gradients = _chunk_sums(
            tokens_rxLxD.reshape(-1, depth),
            jax.lax.dynamic_slice_in_dim(concepts_qxsxD, first, slots, axis=1),
            scale,
            bias,
            scored_rxL.reshape(-1)[:, None] & counted_Qxc.reshape(-1),
            jnp.where(here_rxP, pair_token_rxP, -1).reshape(-1),
            jnp.where(here_rxP, pair_row_rxP * slots + pair_slot_rxP - first, -1).reshape(-1),
            with_gradients,
        )
        sums = jax.tree.map(jnp.add, sums, more)
        if with_gradients:
            (tokens_TxD, concepts, *scalars), (more_TxD, more_qxcxD, *more_scalars) = gradients, more_gradients
            there_qxcxD = jax.lax.dynamic_slice_in_dim(concepts, first, slots, axis=1)
            concepts = jax.lax.dynamic_update_slice_in_dim(concepts, there_qxcxD + more_qxcxD, first, axis=1)
            gradients = (tokens_TxD + more_TxD, concepts, *jax.tree.map(jnp.add, scalars, more_scalars))
        return sums, gradients

    gradients = ()
    if with_gradients:
        concepts = jnp.zeros(concepts_qxsxD.shape, concepts_qxsxD.dtype)
        gradients = (jnp.zeros((rows * length, depth)), concepts, jnp.zeros(()), jnp.zeros(()))
    totals = dict.fromkeys(("loss", "positive_logits", "positives"), jnp.zeros(())), gradients
    totals = jax.tree.map(lambda zero: jax.lax.pcast(zero, AXES, to="varying"), totals)
    sums, gradients = jax.lax.fori_loop(0, -(-own_slots // slots), add_chunk, totals)
    sums["pairs"] = jnp.sum(scored_rxL, dtype=jnp.float32) * jnp.sum(counted_Qxs, dtype=jnp.float32)
    sums = jax.lax.psum(sums, AXES)
    if not with_gradients:
        return sums, ()
    tokens_TxD, concepts_qxsxD, *scalars = gradients
    tokens_rxLxD = jax.lax.psum(tokens_TxD, "tensor").astype(tokens_rxLxD.dtype).reshape(tokens_rxLxD.shape)
    return sums, (tokens_rxLxD, concepts_qxsxD, *jax.lax.psum(scalars, AXES))


def _chunk_sums(tokens_TxD, concepts_qxcxD, scale, bias, counted_TxN, pair_token_P, pair_column_P, with_gradients):
    """This device's tokens against N = Q * c concepts, gathered from all rows: the sums, and gradients of the loss.

    Products are of the vectors' dtype, sums float32. A pair of tokens and columns of -1 is none.
    """
    dtype = jnp.result_type(tokens_TxD, concepts_qxcxD)
    tokens_TxD = tokens_TxD.astype(dtype)
    concepts_NxD = jax.lax.all_gather(concepts_qxcxD.astype(dtype), BATCH_AXES, tiled=True)
    concepts_NxD = concepts_NxD.reshape(-1, tokens_TxD.shape[1])
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    dots_TxN = product("td,nd->tn", tokens_TxD, concepts_NxD)
    logits_TxN = scale * dots_TxN + bias
    valid_P = pair_token_P >= 0
    pairs = jnp.maximum(pair_token_P, 0), jnp.maximum(pair_column_P, 0)
    positive_logits = jnp.sum(jnp.where(valid_P, logits_TxN[pairs], 0.0))
    sums = {
        "loss": jnp.sum(jnp.where(counted_TxN, jax.nn.softplus(logits_TxN), 0.0)) - positive_logits,
        "positive_logits": positive_logits,
        "positives": jnp.sum(valid_P, dtype=jnp.float32),
    }
    if not with_gradients:
        return sums, ()
    slope_TxN = jnp.where(counted_TxN, jax.nn.sigmoid(logits_TxN), 0.0).at[pairs].add(-valid_P.astype(jnp.float32))
    scaled_TxN = (scale * slope_TxN).astype(dtype)
    gradient_NxD = product("tn,td->nd", scaled_TxN, tokens_TxD)
    gradient_QxcxD = gradient_NxD.reshape(-1, *concepts_qxcxD.shape[1:])
    gradient_qxcxD = jax.lax.psum_scatter(gradient_QxcxD, BATCH_AXES, tiled=True).astype(concepts_qxcxD.dtype)
    gradient_TxD = product("tn,nd->td", scaled_TxN, concepts_NxD)
    return sums, (gradient_TxD, gradient_qxcxD, jnp.sum(slope_TxN * dots_TxN), jnp.sum(slope_TxN))


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


def _own_slots(counted_QxS, columns, own_slots):
    """`_first_occurrences` of this device's slots of the rows alone: [Q, own_slots], and row and slot of each pair.

    The slot of a pair whose concept another device has, or nobody, is -1.
    """
    start = jax.lax.axis_index("tensor") * own_slots
    row, slot = columns // counted_QxS.shape[1], columns % counted_QxS.shape[1] - start
    own = (columns >= 0) & (slot >= 0) & (slot < own_slots)
    counted_Qxs = jax.lax.dynamic_slice_in_dim(counted_QxS, start, own_slots, axis=1)
    return counted_Qxs, row, jnp.where(own, slot, -1)
