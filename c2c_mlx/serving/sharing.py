"""A cache for a receiver on another machine: its ids are read here, and what is new is told."""

from __future__ import annotations

import time
from collections.abc import Generator

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from safetensors.numpy import save

from c2c_mlx import device
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader, common_prefix
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.serving.caches import Caches
from c2c_mlx.serving.job import CacheJob, Slice, Wait
from c2c_mlx.serving.reading import Prompt, room_for

UNSENT = 8  # slices that may wait for a slow network
_PAUSE_S = 0.01


def check(lm: LanguageModel, job: CacheJob) -> Prompt:
    """The job's ids as a prompt.

    Raises:
        C2CError: if there is no such id or layer, or the ids are too many.
    """
    known = (lm.config.get("text_config") or lm.config).get("vocab_size") or len(lm.tokenizer)
    if max(max(i, ~i) for i in job.ids) >= known:
        raise C2CError(f"ids: {lm.name} knows {known}")
    layers = kv.attention_layers(kv.make_cache(lm.model))
    if not {*job.layers} <= {*layers} or len({*job.layers}) < len(job.layers):
        raise C2CError(f"layers: {lm.name} has {len(layers)} that hold keys and values")
    return Prompt(lm, [], job.ids, room_for(lm, job.ids) + 1)


def share(job: CacheJob, prompt: Prompt, caches: Caches) -> Generator[Wait, None, None]:
    """Reads the ids slice by slice, and tells of each slice what it holds."""
    key, told = id(prompt.lm.model), job.since
    reader = caches.take(key, job.ids)
    if not isinstance(reader, Reader):
        reader = Reader(prompt.lm.model)
    step = device.prefill_slice()
    kept, slices = max(common_prefix(reader.ids, job.ids), told), 0
    for stop in [*range(kept + step, len(job.ids), step), len(job.ids)]:
        reader.extend(job.ids[:stop])
        for at in range(told, stop, step):  # what had been read before comes in slices, too
            held = kv.read(reader.cache, job.layers, at, min(at + step, stop))
            job.tell(Slice(save({"keys": _bytes(held.keys), "values": _bytes(held.values)})))
            slices += 1
            while slices - job.sent > UNSENT:
                time.sleep(_PAUSE_S)
                yield "others"
        told = stop
        yield "read"
    caches.put(key, reader, len(job.ids))


def _bytes(x: mx.array) -> np.ndarray:
    """[L, 1, H, n, D] -> [L, H, n, D] as numpy has them: two bytes are two bytes."""
    x = x[:, 0]
    return np.array(x if x.dtype == mx.float32 else x.view(mx.uint16))
