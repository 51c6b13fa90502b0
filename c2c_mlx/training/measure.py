"""What C2C and what it is compared with lose on chats that are only measured."""

from __future__ import annotations

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch, collate
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.prefills import Prefiller, Prefills
from c2c_mlx.training.sections import Sections

Losses = dict[str, list[float]]  # by name, nats per chat


def losses(
    c2c: C2C, prefiller: Prefiller, chats: list[Example], batch_size: int, zeroed: bool = False
) -> tuple[Losses, list[int]]:
    """The loss of each chat: C2C's, the receiver's alone, and C2C's with a shuffled sharer.

    A chat is fed by the sharer of the next longer one, whatever batch that is in; a single chat has
    nobody to swap with, and no shuffled loss.

    Args:
        c2c: both models and the fuser.
        prefiller: reads prompts with both models.
        chats: at least one.
        batch_size: chats that are read at a time.
        zeroed: whether C2C is also measured with a sharer that says nothing.

    Returns:
        Losses ("valid", "receiver", "shuffled", "zeroed"), and the tokens of each chat's answer;
        the chats are in an order of their own, the same in all.
    """
    c2c.fuser.eval()
    rows = sorted(chats, key=lambda e: (len(e.receiver_ids), len(e.response_ids)))
    others = [e.with_sharer_of(o) for e, o in zip(rows, rows[1:] + rows[:1], strict=True)]
    found: Losses = {"valid": [], "receiver": [], "shuffled": [], "zeroed": []}
    for at in range(0, len(rows), batch_size):
        batch = collate(rows[at : at + batch_size], c2c.fuser.config.positions)
        other = collate(others[at : at + batch_size], c2c.fuser.config.positions)
        prefills = prefiller(batch)
        for name, sharer, b in (
            ("valid", prefills.sharer, batch),
            ("shuffled", prefiller(other).sharer, other),
            *([("zeroed", step_loss.zeroed(c2c, batch), batch)] if zeroed else []),
        ):
            fused, _ = step_loss.fuse(c2c, prefills.own, sharer, b)
            found[name] += _lost(prefiller.receiver, fused, b, prefills)
        own = [c.copy() for c in prefills.own]
        found["receiver"] += _lost(prefiller.receiver, own, batch, prefills)
        mx.clear_cache()
    if len(rows) == 1:
        del found["shuffled"]
    if not zeroed:
        del found["zeroed"]
    return found, [len(e.response_ids) for e in rows]


def _lost(receiver: Sections, cache: kv.Cache, batch: Batch, prefills: Prefills) -> list[float]:
    each = step_loss.response_losses(receiver, cache, batch, prefills.state)
    return [float(x) for x in np.array(each)]
