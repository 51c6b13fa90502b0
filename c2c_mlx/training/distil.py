"""A small fuser learns what a big one does: the change of the caches, per layer and kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.config import TrainConfig
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import SHUT, Change, Fuser, positions_at_once
from c2c_mlx.fusion.project import KV, Slices
from c2c_mlx.training import fingerprint, measure
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch, collate, fused_positions
from c2c_mlx.training.checkpoints import Metrics
from c2c_mlx.training.dataset import Dataset, Example
from c2c_mlx.training.prefills import Prefiller, Prefills
from c2c_mlx.training.trainer import Trainer


class Distiller(Trainer):
    """A run in which a fuser learns from another; answers are only for the verdict.

    Args:
        c2c: both models and the fuser that learns, with the gates of the other.
        train: the chats whose prompts are fused.
        valid: as a trainer's.
        config: the run's configuration; its gates are open.
        folder: as a trainer's.
        teacher: the fuser to learn from, as it is at inference.
        options: what else a trainer takes.
    """

    def __init__(
        self,
        c2c: C2C,
        train: Dataset,
        valid: list[Example],
        config: TrainConfig,
        folder: Path,
        *options: Any,
        teacher: Fuser,
    ) -> None:
        teacher.eval()
        self.teacher = C2C(c2c.receiver, c2c.sharer, teacher)
        super().__init__(c2c, train, valid, config, folder, *options)

    def begin(self, config: TrainConfig) -> None:
        """As a trainer's; a run goes on from a checkpoint only with the same teacher."""
        super().begin(config)
        self.settings["weights of the big fuser"] = fingerprint.of_weights(self.teacher.fuser)

    def _loss(self, prefills: Prefills, batch: Batch, gate: float) -> tuple[mx.array, mx.array]:
        """As a trainer's, which divides by the answers' tokens: a batch weighs as many."""
        if batch.start == batch.stop:
            return mx.array(0.0), mx.array(0.0)
        view = _view(self.c2c, prefills, batch)
        wanted = change(self.teacher.fuser, prefills.sharer, view, batch)
        found = change(self.c2c.fuser, prefills.sharer, view, batch)
        error = change_error(found, wanted, view, batch.messages)
        fused = fused_positions(batch.examples, self.c2c.fuser.config.positions)
        gates = gate * fused * gate_error(found, wanted, batch.messages)
        return error * batch.tokens + gates, error * batch.tokens

    def evaluate(self, chats: list[Example] | None = None) -> Metrics:
        """As a trainer's, and the error of the fused caches."""
        return super().evaluate(chats) | self.errors(chats)

    def _judge(self) -> Metrics:
        return super()._judge() | self.errors()

    def errors(self, chats: list[Example] | None = None) -> Metrics:
        """Of the fused caches, on these chats or those that are only measured; see `errors`."""
        chats, size = chats or self.valid, self.config.batch_size
        found = errors(self.teacher, self.c2c, self.prefills, chats, size)
        return {f"valid_error_{name}": error for name, error in found.items()}


def change(fuser: Fuser, sharer: KV, view: KV, batch: Batch) -> Change:
    """What a fuser adds to the caches of a batch, keys as it sees them.

    One that does not train gets the positions in parts that there is room for.
    """
    length = view[0].shape[3]
    rows = view[0].shape[1]
    step = length
    if not fuser.training:
        step = positions_at_once(fuser, 4, rows)
    parts = []
    for at in range(0, length, step):
        (sk, sv), (rk, rv) = ([x[..., at : at + step, :] for x in kv] for kv in (sharer, view))
        parts.append(fuser.propose(sharer=(sk, sv), receiver=(rk, rv)))
        if step < length:
            mx.eval(parts[-1].delta, parts[-1].votes)
    gated = fuser.gate(parts, batch.messages)
    if len(gated) == 1:
        return gated[0]
    delta = mx.concatenate([part.delta for part in gated], axis=3)
    weights = [part.message_weight for part in gated if part.message_weight is not None]
    weight = mx.concatenate(weights, axis=3) if weights else None
    return replace(gated[0], delta=delta, message_weight=weight)


def change_error(found: Change, wanted: Change, receiver: KV, messages: np.ndarray) -> mx.array:
    """The mean squared error of a change, as it enters the cache, a mean over slices.

    It is in units of the variance of the keys or values that the big fuser leaves in that layer.
    Messages that it leaves alone count for nothing here: they are `gate_error`'s.

    Args:
        found: the small fuser's.
        wanted: the big one's, of the same slices.
        receiver: keys and values [L, B, Hr, N, Dr] that both are added to.
        messages: [B, N], -1 where nothing is added.
    """
    member = _member(messages)
    fused = _of_slices(receiver, wanted.slices) + wanted.delta
    mean = _mean(fused, member)
    variance = _mean(mx.square(fused - mean), member).mean(axis=(1, 2, 3, 4))  # [S]
    variance = variance + 1e-6 * mx.square(mean).mean(axis=(1, 2, 3, 4)) + 1e-12
    if wanted.message_weight is not None:
        member = member * (wanted.message_weight > SHUT)
    squares = _mean(mx.square(found.delta - wanted.delta), member).mean(axis=(1, 2, 3, 4))
    return (squares / variance).mean()


def gate_error(found: Change, wanted: Change, messages: np.ndarray) -> mx.array:
    """How far message gates are from the big one's: Kullback-Leibler, a mean over positions."""
    if found.message_weight is None or wanted.message_weight is None:
        return mx.array(0.0)
    total = mx.array(0.0)
    for p, q in (
        (wanted.message_weight, found.message_weight),
        (1 - wanted.message_weight, 1 - found.message_weight),
    ):
        total = total + _mean(p * (mx.log(p + 1e-6) - mx.log(q + 1e-6)), _member(messages)).sum()
    return total


def errors(
    big: C2C, small: C2C, prefiller: Prefiller, chats: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """How far a small fuser's caches are from a big one's, both as at inference.

    Returns:
        By kind ("keys", "values") the length of the error over that of what the big one adds; and
        over that of the fused cache ("cache_keys", "cache_values"). Nothing without chats.
    """
    big.fuser.eval()
    small.fuser.eval()
    kinds = big.fuser.config.fused_kinds
    sums = np.zeros((3, 2))  # of the error, of what is added, of the cache; squares
    rows = measure.by_length(list(chats))
    for at in range(0, len(rows), batch_size):
        batch = collate(rows[at : at + batch_size], big.fuser.config.positions)
        if batch.start == batch.stop:
            continue
        prefills = prefiller(batch)
        view = _view(big, prefills, batch)
        right = change(big.fuser, prefills.sharer, view, batch)
        wrong = change(small.fuser, prefills.sharer, view, batch).delta - right.delta
        if not right.slices:
            continue
        fused = _of_slices(view, right.slices) + right.delta
        member = _member(batch.messages)
        squares = [
            np.array((mx.square(x) * member).sum(axis=(1, 2, 3, 4)))
            for x in (wrong, right.delta, fused)
        ]
        for (kind, _), each in zip(right.slices, np.stack(squares, axis=1), strict=True):
            sums[:, kind] += each
        mx.clear_cache()
    if not sums[2].any():
        return {}
    found = {}
    for kind, name in enumerate(("keys", "values")):
        if name in kinds:
            error, added, cache = np.sqrt(sums[:, kind])
            found[name] = float(error / max(added, 1e-12))
            found[f"cache_{name}"] = float(error / max(cache, 1e-12))
    return found


def told(metrics: Metrics) -> str:
    """What `Distiller.errors` found, for people."""
    parts = [
        f"{kind} {metrics[name]:.1%} ({metrics[f'valid_error_cache_{kind}']:.1%} of the cache)"
        for kind in ("keys", "values")
        if (name := f"valid_error_{kind}") in metrics
    ]
    return f"off by {', '.join(parts)} of what the big one adds"


def _view(c2c: C2C, prefills: Prefills, batch: Batch) -> KV:
    part = step_loss.read_receiver(c2c, prefills.own, batch)
    return c2c.fuser_view(part, step_loss.first_position(batch))


def _of_slices(kv: KV, slices: Slices) -> mx.array:
    """[S, B, H, N, D]."""
    return mx.stack([kv[kind][layer] for kind, layer in slices])


def _member(messages: np.ndarray) -> mx.array:
    """[1, B, 1, N, 1] one where something may be added, zero elsewhere; of messages [B, N]."""
    return mx.array((messages >= 0)[None, :, None, :, None].astype(np.float32))


def _mean(x: mx.array, member: mx.array) -> mx.array:
    """The mean over rows and positions that are members, [S, 1, H, 1, D]."""
    total = mx.maximum(member.sum(), 1.0)
    return (x * member).sum(axis=(1, 3), keepdims=True) / total
