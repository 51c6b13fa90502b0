"""One model, what it has read, and what reading on costs: only the new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn

from c2c_mlx import device
from c2c_mlx.fusion import kv

Progress = Callable[[int, int], None]  # positions done, of how many


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):  # the usual case, at the speed of C
        return n
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress of one of several prefills as a part of all of them."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def padding(ids: Sequence[int], start: int = 0) -> list[int]:
    """The positions of those of `ids` that are padding; the first one is at `start`."""
    return [position for position, token in enumerate(ids, start) if token < 0]


class Reader:
    """One model's cache and the ids that stand in it; extending it costs only what is new."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start_anew()

    def _start_anew(self) -> None:
        self.cache = kv.make_cache(self.model)
        self.ids: list[int] = []
        self._is_ahead = False  # a pass that may have been interrupted, or a decoder, went further

    def extend(self, ids: Sequence[int], progress: Progress | None = None) -> None:
        """Makes the cache hold exactly `ids`, from their common prefix on, in chunks.

        An id below zero is padding: `~id` takes its place, and nobody attends to it.
        """
        with self.extending(ids, progress) as new:
            mx.eval(new)
        mx.clear_cache()

    @contextmanager
    def extending(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        model: Callable[..., mx.array] | None = None,
    ) -> Iterator[list[Any]]:
        """As `extend`, but the last chunk is evaluated by who asks, together with other work.

        Args:
            ids: see `extend`.
            progress: called with new positions read and to read.
            model: is called in the model's place; see `states.States`.

        Yields:
            What is to be evaluated inside.
        """
        keep = common_prefix(self.ids, ids)
        if kv.has_state(self.cache) and (self._is_ahead or keep < len(self.ids)):
            self._start_anew()  # state can't be rolled back
            keep = 0
        # First of all: an interruption then leaves more in the cache than is noted, never less.
        self.ids = list(ids[:keep])
        kv.trim(self.cache, keep)
        if keep == len(ids):
            yield []
        step = device.prefill_chunk()
        while len(self.ids) < len(ids):
            chunk = ids[len(self.ids) : len(self.ids) + step]
            kv.hide(self.cache, padding(chunk, len(self.ids)))
            self._is_ahead = True
            (model or self.model)(mx.array([max(i, ~i) for i in chunk])[None], cache=self.cache)
            # The head's logits are in no state: never computed.
            if len(self.ids) + len(chunk) < len(ids):
                mx.eval(kv.arrays(self.cache))
                mx.clear_cache()  # a chunk's buffers fit no other chunk
            else:
                yield kv.arrays(self.cache)
            self._is_ahead = False
            self.ids.extend(chunk)
            if progress:
                progress(len(self.ids) - keep, len(ids) - keep)

    def settle(self, ids: Sequence[int]) -> None:
        """Notes what decoding left in the cache: the prompt and as much of what was written.

        Args:
            ids: the prompt and all ids that were yielded; a stopped decoder may have run one ahead.
        """
        held = kv.length(self.cache)
        # Without attention layers nobody knows how far a decoder came.
        self._is_ahead = held > len(ids) or not kv.attention_layers(self.cache)
        self.ids = list(ids[:held])
        kv.trim(self.cache, len(self.ids))

    def fork(self, n: int) -> Reader | None:
        """Another reader that has read the first `n` of these ids; None if state can't go back."""
        if kv.has_state(self.cache) and (self._is_ahead or n < len(self.ids)):
            return None
        other = Reader(self.model)
        other.cache, other.ids = kv.first(self.cache, n), self.ids[:n]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes."""
        return kv.nbytes(self.cache)
