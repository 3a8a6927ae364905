"""The optimizer: AdamW with warm-up, decay and clipping, all from optax."""

from __future__ import annotations

from collections.abc import Callable

import optax

from nuner_jax.errors import NunerError


def learning_rate(schedule: str, *, peak: float, end: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then decay to `end` at `total_steps`.

    Args:
      schedule: "cosine", "linear" or "constant".
      peak, end: learning rates.
      warmup_steps, total_steps: optimizer updates.

    Raises:
      NunerError: an unknown schedule.
    """
    decay_steps = max(1, total_steps - warmup_steps)
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak if peak else 0.0),
        "linear": lambda: optax.linear_schedule(peak, end, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if schedule not in decays:
        raise NunerError(f"config.optim.schedule: unknown {schedule!r}; choose one of {', '.join(decays)}")
    warmup = optax.linear_schedule(0.0, peak, max(1, warmup_steps))
    return optax.join_schedules([warmup, decays[schedule]()], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    share: Callable[[str], float] = lambda path: 1.0,
) -> optax.GradientTransformation:
    """AdamW on gradients clipped to `clip_norm` (global L2 norm).

    `share` gives the share of the learning rate that the parameter of a path has. Decay is left out for biases, layer
    norms and scalars (arrays with no matrix in them), as is usual for BERT-like encoders: they are told by their path,
    since fused biases have more than one dimension.
    """

    def decayed(params: dict[str, object]) -> dict[str, bool]:
        return {path: path.endswith(("/kernel", "/embedding")) for path in params}

    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )

    def update(gradients: dict[str, object], state, params=None):
        updates, state = chain.update(gradients, state, params)
        return {path: change * share(path) for path, change in updates.items()}, state

    # Not one more link of the chain: the optimizer's memory, and so the checkpoints, are the same with and without.
    return optax.GradientTransformation(chain.init, update)
