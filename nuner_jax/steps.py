"""The jitted train step, made from a Task.

A *step* is one optimizer update on one batch. A batch is a dict of arrays [A, rows, ...]: A micro-batches,
whose gradients are added before the update (A = 1: none).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nuner_jax.sharding import batch_sharding, replicated
from nuner_jax.state import TrainState, combine, partition
from nuner_jax.tasks.protocol import Task


def new_state(task: Task, optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """The state before the first step: optimizer memory for the trained parameters alone."""
    trained, _ = partition(params, task.is_frozen)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(trained))


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: TrainState,
    mesh: Mesh,
    seed: int,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted update: (state, batch) -> (state, metrics), the state donated.

    The metrics are the task's (see `Task.metrics`), and `grad_norm`, `param_norm` (of the trained parameters) and
    `learning_rate`.
    """

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        trained, frozen = partition(state.params, task.is_frozen)
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss(trained, micro_batch, micro_step):
            key = jax.random.fold_in(step_key, micro_step)
            sums = task.sums(combine(trained, frozen), micro_batch, key)
            return sums["loss"], sums

        def one(micro_step):
            micro_batch = jax.tree.map(lambda x: x[micro_step], batch)
            grads, sums = jax.grad(loss, has_aux=True)(trained, micro_batch, micro_step)
            return grads, sums

        grads, sums = _accumulate(one, jax.tree.leaves(batch)[0].shape[0])
        # Sums of the loss were differentiated; its normaliser depends on the data alone.
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        metrics = task.metrics(sums) | {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(trained),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, combine(trained, frozen), opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _accumulate(one: Callable, micro_batches: int):
    """Adds up `one(0) … one(A - 1)`; a single micro-batch needs no loop."""
    if micro_batches == 1:
        return one(0)

    def body(total, micro_step):
        return jax.tree.map(jnp.add, total, one(micro_step)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    return jax.lax.scan(body, zeros, jnp.arange(micro_batches))[0]
