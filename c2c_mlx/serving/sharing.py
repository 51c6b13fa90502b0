"""A cache for a receiver on another machine: its ids are read here, and what is new is told."""

from __future__ import annotations

from collections.abc import Generator

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
from safetensors.numpy import save

from c2c_mlx import device
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.serving.caches import Caches
from c2c_mlx.serving.job import CacheJob, Slice, Wait
from c2c_mlx.serving.reading import Prompt, room_for, still_read

UNSENT = 8  # slices that may wait for a slow network


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
    """Reads the ids slice by slice, and tells of each slice what it holds.

    What the other side has already may have to be read once more here, when the cache has made room
    for others: then there is a slice without positions for each, as a sign of life.
    """
    key, told = id(prompt.lm.model), job.since
    reader = caches.take(key, job.ids)
    if not isinstance(reader, Reader):
        reader = Reader(prompt.lm.model)
    step = device.prefill_slice()
    kept, slices = still_read(reader, job.ids), 0
    try:
        for stop in [*range(kept + step, len(job.ids), step), len(job.ids)]:
            reader.extend(job.ids[:stop])
            # What had been read before comes in slices, too.
            for at in range(told, stop, step) or [stop]:
                held = kv.read(reader.cache, job.layers, at, min(at + step, stop))
                job.tell(Slice(save({"keys": _bytes(held.keys), "values": _bytes(held.values)})))
                slices += 1
                while slices - job.sent > UNSENT:
                    yield "others"
            told = max(told, stop)
            yield "read"
    except GeneratorExit:  # who asks again, after giving up, finds what has been read
        caches.put(key, reader, len(reader.ids))
        raise
    # Not after an error: where a GPU fails, what was right before may be lost, too.
    caches.put(key, reader, len(reader.ids))


def _bytes(x: mx.array) -> np.ndarray:
    """[L, 1, H, n, D] -> [L, H, n, D] as numpy has them: two bytes are two bytes."""
    x = x[:, 0]
    return np.array(x if x.dtype == mx.float32 else x.view(mx.uint16))
