"""A training step of ours against the reference's way of doing it, in one run.

The reference fuses layer by layer, prefills every row with its template, and has the receiver give
logits for every position that it reads; ours does none of that, and may read the frozen half of a
step from disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx import C2C, load_model
from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fuser import Change
from c2c_mlx.fusion.layers import k_nearest
from c2c_mlx.models import registry
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch, Padded, collate
from c2c_mlx.training.caches import training_cache
from c2c_mlx.training.dataset import Dataset, Source
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.prefills import Prefills
from c2c_mlx.training.run import RECIPE
from c2c_mlx.training.start import new_fuser
from c2c_mlx.training.trainer import Trainer

ROWS, RUNS = 8, 3


def main() -> None:
    receiver, sharer = map(load_model, registry.default_pair())
    layers = tuple(p for p in k_nearest(receiver.shape.layers, sharer.shape.layers) if p[0] >= 15)
    fields = RECIPE | {"hidden_dim": 128, "intermediate_dim": 128}
    fuser = new_fuser(FuserConfig(receiver.shape, sharer.shape, layers, **fields), "open", 0)
    fuser.temperature = None
    rows = short_chats()
    data = Dataset([Source(rows, 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 512)
    examples = [e for e in map(data.example, rows) if e is not None]
    c2c = C2C(receiver.model, sharer.model, fuser)
    with tempfile.TemporaryDirectory() as folder:
        ours = Trainer(c2c, data, [], TrainConfig(), Path(folder))
        kept = Trainer(c2c, data, [], TrainConfig(prefill_cache=folder), Path(folder))
        seconds = {
            "the reference's way": _seconds(
                lambda: reference_step(c2c, collate(examples, "messages"))
            ),
            "ours": _seconds(lambda: ours.train_step([examples])),
            "ours, prefills on disk": _seconds(lambda: kept.train_step([examples])),
        }
    slowest = seconds["the reference's way"]
    for name, s in seconds.items():
        print(f"{name}: {1e3 * s:.0f} ms for {ROWS} chats, {slowest / s:.1f} times as fast")


def short_chats() -> list[ChatRow]:
    """ROWS chats of one length: 46 tokens of a prompt, 10 of an answer."""
    return [
        ChatRow(
            [
                {"role": "user", "content": f"Translate to English: J'ai {n} chats et un chien."},
                {"role": "assistant", "content": f"I have {n} cats and a dog."},
            ]
        )
        for n in range(2, 2 + ROWS)
    ]


def reference_step(c2c: C2C, batch: Any) -> None:
    """Loss and gradient the slow way; the numbers are those of ours."""
    prefills = Prefills(
        _prefill(c2c.receiver, batch.receiver),
        step_loss.read_sharer(c2c, _prefill(c2c.sharer, batch.sharer), batch),
        None,
    )
    fuser = c2c.fuser
    fuser.train()

    def loss() -> mx.array:
        part = kv.read(prefills.own, c2c.receiver_layers, batch.start, batch.stop)
        fused = [c.copy() for c in prefills.own]
        for at, layer in enumerate(c2c.receiver_layers):
            change = _one_layer(c2c, prefills, part, batch, at)
            for (kind, _), delta in zip(change.slices, change.delta, strict=True):
                x = [fused[layer].keys, fused[layer].values]
                x[kind] = step_loss._add(x[kind], delta, batch.start)
                fused[layer] = fused[layer].copy(*x)
        return _all_logits(c2c.receiver, fused, batch) / batch.tokens

    mx.eval(nn.value_and_grad(fuser, loss)())


def _one_layer(c2c: C2C, prefills: Prefills, part: Any, batch: Any, at: int) -> Change:
    """One layer's keys and values through their own two small networks."""
    fuser = c2c.fuser
    _, slices = fuser._taking_part()
    rows = [row for row, (_, layer) in enumerate(slices) if layer == at]
    one = mx.array(rows, mx.uint32), [slices[row] for row in rows]
    fuser.__dict__["_taking_part"] = lambda: one
    try:
        offset = step_loss.first_position(batch)
        return c2c.change(prefills.sharer, part, batch.messages, offset)
    finally:
        del fuser.__dict__["_taking_part"]


def _all_logits(model: nn.Module, cache: kv.Cache, batch: Batch) -> mx.array:
    logits = model(mx.array(batch.inputs), cache=cache)
    losses = nn.losses.cross_entropy(logits, mx.array(batch.targets))
    return (losses * mx.array(batch.mask.astype(np.float32))).sum()


def _prefill(model: nn.Module, prompts: Padded) -> kv.Cache:
    """Every row from its first id on, with logits for every position."""
    padding = mx.array(prompts.padding) if prompts.padding.any() else None
    cache = training_cache(model, padding, prompts.prefix)
    mx.eval(model(mx.array(prompts.ids), cache=cache), kv.arrays(cache))
    return cache


def _seconds(work: Callable[[], Any]) -> float:
    """Median of RUNS after a warm-up."""
    times = []
    for _ in range(RUNS + 1):
        tic = time.perf_counter()
        work()
        times.append(time.perf_counter() - tic)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
