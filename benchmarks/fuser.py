"""One fuser call for all 30 layers of the embedded pair against the two prefills, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx import load_model
from c2c_mlx.config import FuserConfig
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.layers import k_nearest
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models import registry
from c2c_mlx.training.run import PRESETS, RECIPE

TOKENS, RUNS = 256, 5


def in_turns(*work: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each piece of work, RUNS times after a warm-up; load slows down all of them."""
    times: list[list[float]] = [[] for _ in work]
    for _ in range(RUNS + 1):
        for piece, seconds in zip(work, times, strict=True):
            tic = time.perf_counter()
            mx.eval(piece())
            seconds.append(time.perf_counter() - tic)
    return [seconds[1:] for seconds in times]


def fuse(c2c: C2C, own: Reader, other: Reader) -> mx.array:
    """Position by position over all of the prompt."""
    index, messages = np.arange(TOKENS)[None], np.zeros((1, TOKENS), np.int32)
    part = kv.read(own.cache, c2c.receiver_layers, 0, TOKENS)
    return c2c.change(c2c.read_sharer(other.cache, index), part, messages).delta


def main() -> None:
    receiver, sharer = map(load_model, registry.default_pair())
    ids = np.random.default_rng(0).integers(1000, 40000, TOKENS).tolist()

    def prefill(model: Any) -> Any:
        prefix = Reader(model)
        prefix.extend(ids)
        return kv.arrays(prefix.cache)

    own, other = Reader(receiver.model), Reader(sharer.model)
    own.extend(ids)
    other.extend(ids)
    layers = tuple(k_nearest(receiver.shape.layers, sharer.shape.layers))
    for preset in ("tiny", "small", "paper"):
        extra = {} if preset == "paper" else RECIPE
        fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layers, **extra, **PRESETS[preset]))
        fuser.gate_logit = mx.ones_like(fuser.gate_logit)
        fuser.eval()
        c2c = C2C(receiver.model, sharer.model, fuser)
        rounds = in_turns(
            lambda: prefill(sharer.model),
            lambda: prefill(receiver.model),
            lambda c2c=c2c: fuse(c2c, own, other),
        )
        sharer_s, receiver_s, fuse_s = (1e3 * statistics.median(times) for times in rounds)
        share = statistics.median(f / (s + r) for s, r, f in zip(*rounds, strict=True))
        print(
            f"preset {preset}, 30 layers, {TOKENS} tokens: {fuse_s:.0f} ms, {share:.1%} of the "
            f"prefills (sharer {sharer_s:.0f} ms, receiver {receiver_s:.0f} ms)"
        )


if __name__ == "__main__":
    main()
