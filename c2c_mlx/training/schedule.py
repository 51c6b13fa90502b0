"""What changes with the step: the learning rate, up to its peak and then down; the gates' noise."""

from __future__ import annotations

from collections.abc import Callable

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.optimizers as optim

from c2c_mlx.config import TrainConfig


def learning_rate(c: TrainConfig) -> Callable[[mx.array], mx.array]:
    """As a function of the step, for an optimiser."""
    low = c.learning_rate * c.final_learning_rate
    steps = max(c.iters - c.warmup, 1)
    decay = (
        optim.cosine_decay(c.learning_rate, steps, low)
        if c.schedule == "cosine"
        else optim.linear_schedule(c.learning_rate, low, steps)
    )
    if c.warmup == 0:
        return decay
    return optim.join_schedules(
        [optim.linear_schedule(c.learning_rate / c.warmup, c.learning_rate, c.warmup), decay],
        [c.warmup],
    )


def temperature(c: TrainConfig, step: int) -> float | None:
    """Of the gates at a step: T0 (T1 / T0)^(step / anneal); None if they stay open."""
    if c.gates == "open":
        return None
    ratio = c.final_temperature / c.initial_temperature
    return c.initial_temperature * ratio ** min(step / c.anneal_steps, 1.0)
