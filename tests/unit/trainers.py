"""Trainers of the two tiny models: run, and looked at."""

from __future__ import annotations

from collections.abc import Callable

import c2c_mlx.blas  # noqa: F401

import numpy as np
from mlx.utils import tree_flatten

from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch
from c2c_mlx.training.checkpoints import Metrics
from c2c_mlx.training.trainer import Trainer

POSITIONS = ["all", "from_first_message", "messages"]
NOISY = {"gates": "learned", "dropout": 0.3}
RECIPE = {"positions": "messages", "message_gate": True, "rotated_keys": False, "normalise": True}
Make = Callable[..., Trainer]
Say = Callable[[str], None]


def run(trainer: Trainer) -> list[Metrics]:
    reports: list[Metrics] = []
    trainer.run(reports.append)
    return reports


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in tree_flatten(trainer.c2c.fuser.parameters())}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def loss_of(trainer: Trainer, batch: Batch) -> float:
    trainer.c2c.fuser.eval()
    prefills = trainer.prefills(batch)
    fused, _ = step_loss.fuse(trainer.c2c, prefills.own, prefills.sharer, batch)
    return step_loss.response_loss(trainer.prefills.receiver, fused, batch, prefills.state).item()
