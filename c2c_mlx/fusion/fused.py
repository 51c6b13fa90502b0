"""A conversation's caches, and decoding from them.

A fused cache *is* an mlx-lm prompt cache, so decoding is mlx-lm's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.config import Order
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fuser import Change
from c2c_mlx.fusion.gates import GateStats
from c2c_mlx.fusion.link import C2C as C2C
from c2c_mlx.fusion.reader import Progress, padding
from c2c_mlx.fusion.reader import Reader as Reader
from c2c_mlx.fusion.reader import common_prefix as common_prefix
from c2c_mlx.text.alignment import TokenAlignment, message_groups
from c2c_mlx.text.answer import AnswerAlignment


class Trace(NamedTuple):
    """What is kept of a change to tell of it; computed when somebody asks."""

    slices: list[tuple[int, int]]
    weight: mx.array  # [S, Hr, N], message gate included; 0 where nothing was added
    norm: mx.array  # [S, Hr, N], of what was added

    @classmethod
    def of(cls, change: Change) -> Trace:
        """What is kept of this one, of a batch of one."""
        weight = change.weight[:, 0, ..., 0]
        if change.message_weight is not None:
            weight = weight * change.message_weight[:, 0, ..., 0]
        norm = mx.linalg.norm(change.delta[:, 0], axis=-1)
        return cls(change.slices, mx.where(norm > 0, weight, 0.0), norm)


@dataclass(frozen=True)
class Fusion:
    """What one fusion cost, and how each sharer changed positions [start, stop)."""

    start: int
    stop: int
    sharer_tokens: int  # that had to be read, over all sharers
    sharer_s: float
    receiver_s: float
    fuse_s: float
    texts: tuple[TokenAlignment, ...]  # what has been read, as each sharer feeds it
    traces: tuple[Trace | None, ...]


class FusedCache:
    """The caches of a C2C conversation: every sharer's, the receiver's own, and the fused one.

    The receiver's own cache is never fused, so extending it by a turn gives exactly what a prefill
    of the whole conversation from scratch would give.

    Args:
        links: one per sharer, all of them into the same receiver. A sharer that is in several with
            fusers of its own reads once.
        order: of several sharers. "sequential": each one changes what those before it have left;
            "parallel": each one changes the receiver's own, and the changes add up.

    Raises:
        C2CError: if the links do not lead into one receiver.
    """

    def __init__(self, *links: C2C, order: Order = "sequential") -> None:
        if len({id(link.receiver) for link in links}) != 1:
            raise C2CError("several sharers need one receiver, the same for all of them")
        self.links, self.order = links, order
        self.own = Reader(links[0].receiver)
        readers: dict[tuple[int, str], Reader] = {}
        self.sharers = [readers.setdefault(link.reading, Reader(link.sharer)) for link in links]
        self.cache = kv.make_cache(links[0].receiver)
        # Per fused position: its id, and per sharer the position that feeds it and its message.
        self.feeds: list[tuple[Any, ...]] = []
        self.fusions: list[Fusion] = []  # of this turn: the prompt's, then the answer's

    @property
    def last(self) -> Fusion | None:
        """The latest fusion."""
        return self.fusions[-1] if self.fusions else None

    def extend(
        self,
        receiver_ids: Sequence[int],
        sharer_ids: Sequence[int],
        index: np.ndarray,
        messages: np.ndarray,
        progress: Progress | None = None,
    ) -> kv.Cache:
        """`extend_all` for the only sharer; the arguments are the fields of a TokenAlignment."""
        prompt = TokenAlignment(list(receiver_ids), list(sharer_ids), index, messages)
        return self.extend_all([prompt], progress)

    def extend_all(
        self, prompts: Sequence[TokenAlignment], progress: Progress | None = None
    ) -> kv.Cache:
        """Makes the fused cache hold all of the prompt but its last id, decoding's first input.

        Args:
            prompts: the receiver's prompt, aligned to each sharer's.
            progress: called with positions done and to do, over the prefills of all models.

        Returns:
            The fused mlx-lm prompt cache, owned by this object until the next call.
        """
        self.fusions = []
        self._fuse(prompts, len(prompts[0].receiver_ids) - 1, progress)
        return self.cache

    def answering(
        self, answers: Sequence[AnswerAlignment]
    ) -> Callable[[mx.array, kv.Cache], mx.array]:
        """The receiver, for `decode`, with the answer fused while it is being written.

        All models read every new id, and what is fused of it takes its place inside of the
        receiver's pass: the receiver attends to fused keys and values alone, the new id's included.
        So `stats` are live, and the fused cache always is what a prefill of the text would give.

        Args:
            answers: aligns to each sharer's reading the answer to the prompt that was extended to.

        Returns:
            A function (ids [1, N], cache) -> logits [1, N, V]; the cache is this object's.
        """
        in_prompt = len(answers[0].prompt.receiver_ids) - kv.length(self.cache)

        def model(ids: mx.array, cache: kv.Cache) -> mx.array:
            nonlocal in_prompt
            new: Any = ids[0, in_prompt:].tolist()
            in_prompt = max(in_prompt - ids.shape[1], 0)
            return self._advance([answer.add(new) for answer in answers], ids)

        return model

    def fuse_anew(self, start: int = 0) -> None:
        """Forgets what was fused from `start` on, when a fuser has changed; what was read stays."""
        self.feeds, self.fusions = self.feeds[:start], []

    def _advance(self, texts: Sequence[TokenAlignment], ids: mx.array) -> mx.array:
        """The receiver's pass over `ids`, which go on in the texts where the caches end."""
        n = kv.length(self.cache) + ids.shape[1]
        given = self._fuse(texts, n, given=ids.shape[1])
        assert given is not None
        logits = self.own.model(ids, cache=kv.giving(self.cache, given))
        self.feeds = self._feeds(texts, n)
        return logits

    def _fuse(
        self,
        texts: Sequence[TokenAlignment],
        stop: int,
        progress: Progress | None = None,
        given: int = 0,
    ) -> kv.StackedKV | None:
        """Reads [0, stop) with all models; appends what is new in it to the fused cache, fused.

        Returns:
            All attention layers' keys and values of the last `given` positions, which are left out;
            None if nothing was new.
        """
        feeds = self._feeds(texts, stop)
        reading: dict[Reader, list[int]] = {}
        for reader, text in zip(self.sharers, texts, strict=True):
            ids = text.sharer_ids[: _reach(text, stop)]
            if reading.setdefault(reader, ids) != ids:
                raise C2CError("a sharer in several links must read the same text for all of them")
        reading[self.own] = texts[0].receiver_ids[:stop]
        kept = {reader: common_prefix(reader.ids, ids) for reader, ids in reading.items()}
        start = self._unchanged(texts, feeds, [kept[reader] for reader in self.sharers])
        self.feeds = self.feeds[:start]  # before the cache: an interruption leaves it too long
        if not kv.trim(self.cache, start):
            self.feeds, start = [], 0
            self.cache = kv.make_cache(self.own.model)
        if given:  # state of other layers goes into the coming pass as it was before it
            kv.copy_state(self.own.cache, self.cache)

        unread = [len(ids) - kept[reader] for reader, ids in reading.items()]
        times = [time.perf_counter()]
        for i, (reader, ids) in enumerate(reading.items()):
            reader.extend(ids, _part(progress, sum(unread[:i]), sum(unread)))
            times.append(time.perf_counter())
        rest: kv.StackedKV | None = None
        traces: tuple[Trace | None, ...] = (None,) * len(self.links)
        if start < stop:
            fused, traces = self._changed(texts, start, stop)
            if not given:
                kv.copy_state(self.own.cache, self.cache)
            end = stop - given - start
            for layer, keys, values in zip(kv.attention_layers(self.cache), *fused, strict=True):
                if end:
                    kv.append(self.cache, layer, keys[..., :end, :], values[..., :end, :])
            kv.hide(self.cache, padding(texts[0].receiver_ids[start : start + end], start))
            rest = kv.StackedKV(*(x[..., end:, :] for x in fused))
            mx.eval(kv.arrays(self.cache), rest, [t[1:] for t in traces if t and given])
        times.append(time.perf_counter())
        self.feeds = feeds[: stop - given]
        *sharers, own, fusing = np.diff(times).tolist()
        costs = sum(unread[:-1]), sum(sharers), own, fusing
        while self.fusions and self.fusions[-1].start >= start:  # fused anew
            self.fusions.pop()
        self.fusions.append(Fusion(start, stop, *costs, tuple(texts), traces))
        return rest

    def _feeds(self, texts: Sequence[TokenAlignment], stop: int) -> list[tuple[Any, ...]]:
        columns = (
            zip(t.index[:stop].tolist(), _messages(link, t)[:stop].tolist(), strict=True)
            for link, t in zip(self.links, texts, strict=True)
        )
        return list(zip(texts[0].receiver_ids[:stop], *columns, strict=True))

    def _unchanged(
        self, texts: Sequence[TokenAlignment], feeds: list[tuple[Any, ...]], kept: list[int]
    ) -> int:
        """How many positions can stay as they were fused; `kept` of each sharer's stay, too."""
        start = common_prefix(self.feeds, feeds)
        for text, keep in zip(texts, kept, strict=False):
            start = min(start, int(np.searchsorted(text.index[:start], keep)))
        for at, (link, text) in enumerate(zip(self.links, texts, strict=True)):
            if link.fuser.config.message_gate:
                # A gate looks at all of its message: one that grew or shrank is fused anew.
                numbers = (feed[at + 1][1] for feed in self.feeds[start:] + feeds[start:])
                beyond = [number for number in numbers if number >= 0]
                cut = np.flatnonzero(np.isin(_messages(link, text)[:start], beyond))
                start = int(cut[0]) if len(cut) else start
        return start

    def _changed(
        self, texts: Sequence[TokenAlignment], start: int, stop: int
    ) -> tuple[kv.StackedKV, tuple[Trace | None, ...]]:
        """All attention layers at [start, stop) with every sharer's change, and its traces."""
        layers = kv.attention_layers(self.own.cache)
        own = fused = kv.read(self.own.cache, layers, start, stop)
        traces = []
        for link, sharer, text in zip(self.links, self.sharers, texts, strict=True):
            messages, trace = _messages(link, text)[None, start:stop], None
            if (messages >= 0).any() and link.fuser.gates.any():
                rows = [layers.index(layer) for layer in link.receiver_layers]
                before = fused if self.order == "sequential" else own
                read = link.read_sharer(sharer.cache, text.index[None, start:stop])
                change = link.change(read, before.of(rows), messages, start)
                fused = kv.StackedKV(*change.added_to(fused, rows))
                trace = Trace.of(change)
            traces.append(trace)
        return fused, tuple(traces)

    def stats(self, sharer: int = 0, since: int = 0) -> GateStats | None:
        """Gates, weights and changes of this turn's fusions; computed only when asked for.

        Args:
            sharer: which one, should there be several.
            since: leaves out the positions before this one.

        Returns:
            None if nothing was fused from there on.
        """
        link = self.links[sharer]
        told = [(f, t) for f in self.fusions if f.stop > since and (t := f.traces[sharer])]
        if not told:
            return None
        start, stop = max(told[0][0].start, since), told[-1][0].stop
        own = mx.stack(list(kv.read(self.own.cache, link.receiver_layers, start, stop)))
        norms = np.array(mx.linalg.norm(own[:, :, 0], axis=-1).astype(mx.float32))
        weight, added = np.zeros_like(norms), np.zeros_like(norms)
        for fusion, trace in told:  # what is fused anew stands further behind, and counts
            if trace.slices:
                kinds, layers = np.array(trace.slices).T
                first = max(fusion.start, start)
                at = np.s_[kinds, layers, :, first - start : fusion.stop - start]
                weight[at], added[at] = (
                    np.array(x[..., first - fusion.start :].astype(mx.float32)) for x in trace[1:]
                )
        is_fused = _messages(link, told[-1][0].texts[sharer])[start:stop] >= 0
        layer_map = link.fuser.config.layer_map
        return GateStats(layer_map, start, link.fuser.gates, weight, norms, added, is_fused)


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress of one of several prefills as a part of all of them."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _messages(link: C2C, text: TokenAlignment) -> np.ndarray:
    return message_groups(text.message, link.fuser.config.positions)


def _reach(text: TokenAlignment, stop: int) -> int:
    """How many of the sharer's ids feed the receiver's positions [0, stop)."""
    return int(text.index[:stop].max(initial=-1)) + 1
