"""How fast this device reads, fuses and writes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import generate_step

from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.gates import Fusion
from c2c_mlx.text.alignment import TokenAlignment

_WRITTEN = 32  # tokens


def measure(link: C2C, prompt: TokenAlignment) -> dict[str, float]:
    """Times of one turn, the second of two: the first one compiles and loads.

    Args:
        link: two models and a fuser.
        prompt: what they read.

    Returns:
        Tokens, seconds, and tokens per second; `peak_memory_gb` is that of the process.
    """
    _turn(link, prompt)
    fusion, first, writing = _turn(link, prompt)
    return {
        "prompt_tokens": len(prompt.receiver_ids),
        "sharer_reads_tokens_per_s": fusion.sharer_tokens / fusion.sharer_s,
        "receiver_reads_tokens_per_s": (fusion.stop - fusion.start) / fusion.receiver_s,
        "fuse_s": fusion.fuse_s,
        "fuses_tokens_per_s": (fusion.stop - fusion.start) / fusion.fuse_s,
        "first_token_s": fusion.sharer_s + fusion.receiver_s + fusion.fuse_s + first,
        "writes_tokens_per_s": (_WRITTEN - 1) / writing,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }


def _turn(link: C2C, prompt: TokenAlignment) -> tuple[Fusion, float, float]:
    """What a first turn cost to read and to fuse; its first token; and those behind it."""
    fused = FusedCache(link)
    cache = fused.extend([prompt])
    fusion = fused.last
    assert fusion is not None
    return fusion, *_write(link, cache, prompt.receiver_ids[-1:])


def _write(link: C2C, cache: kv.Cache, last: Sequence[int]) -> tuple[float, float]:
    """Seconds to the first token, and for those behind it."""
    tic = time.perf_counter()
    steps = generate_step(
        mx.array(list(last)), link.receiver, max_tokens=_WRITTEN, prompt_cache=cache
    )
    next(steps)
    toc = time.perf_counter()
    assert sum(1 for _ in islice(steps, _WRITTEN)) == _WRITTEN - 1
    return toc - tic, time.perf_counter() - toc
