"""The caches of a C2C conversation: every sharer's, the receiver's own, and the fused one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx import device
from c2c_mlx.config import Order
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fuser import Change, positions_at_once
from c2c_mlx.fusion.gates import Fusion, GateStats, Trace
from c2c_mlx.fusion.link import Link
from c2c_mlx.fusion.reader import Progress, Reader, common_prefix, padding, part_of
from c2c_mlx.fusion.states import States
from c2c_mlx.text.alignment import TokenAlignment, message_groups
from c2c_mlx.text.answer import AnswerAlignment

Layers = dict[int, tuple[mx.array, mx.array]]  # per attention layer keys and values [1, H, n, D]


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

    def __init__(self, *links: Link, order: Order = "sequential") -> None:
        if len({id(link.receiver) for link in links}) != 1:
            raise C2CError("several sharers need one receiver, the same for all of them")
        self.links, self.order = links, order
        self.own = Reader(links[0].receiver)
        # Below its first fused layer the receiver's own pass is the fused one's, too.
        self.first = min(layer for link in links for layer in link.receiver_layers)
        self._watched = States(links[0].receiver, self.first)
        layers: dict[tuple[int, str], set[int]] = {}
        for link in links:
            layers.setdefault(link.reader_key, set()).update(link.sharer_layers)
        keys = {link.reader_key: link for link in links}
        readers = {key: link.make_reader(sorted(layers[key])) for key, link in keys.items()}
        self.sharers = [readers[link.reader_key] for link in links]
        self.cache = kv.make_cache(links[0].receiver)
        # What every position was fused from; see `_sources`.
        self._fused_from = np.zeros((1 + 2 * len(links), 0), np.int64)
        self.fusions: list[Fusion] = []  # of this turn: the prompt's, then the answer's
        self.texts: tuple[TokenAlignment, ...] = ()  # the latest, as each sharer feeds it
        size = kv.dtype_of(links[0].receiver).size
        self._part = min(positions_at_once(link.fuser, size) for link in links)

    @property
    def last(self) -> Fusion | None:
        """The latest fusion."""
        return self.fusions[-1] if self.fusions else None

    def extend(
        self, prompts: Sequence[TokenAlignment], progress: Progress | None = None
    ) -> kv.Cache:
        """Makes the fused cache hold all of the prompt but its last id, decoding's first input.

        Args:
            prompts: the receiver's prompt, aligned to each sharer's.
            progress: called with positions done and to do, over the prefills of all models.

        Returns:
            The fused mlx-lm prompt cache, owned by this object until the next call.

        Raises:
            C2CError: if the receiver's prompt is not the same for all sharers, or a sharer's not
                for all of its links.
        """
        if any(prompt.receiver_ids != prompts[0].receiver_ids for prompt in prompts):
            raise C2CError(
                "several sharers need the receiver's prompt to be the same for all of them: align "
                "it with padding=False"
            )
        self.fusions = []
        self._fuse(prompts, len(prompts[0].receiver_ids) - 1, progress)
        return self.cache

    def answering(
        self, answers: Sequence[AnswerAlignment]
    ) -> Callable[[mx.array, kv.Cache], mx.array]:
        """The receiver, for decoding, with the answer fused while it is being written.

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
        self._fused_from, self.fusions = self._fused_from[:, :start], []

    def fork(self, n: int) -> FusedCache | None:
        """Another conversation that begins with the receiver's first `n` ids, read and fused.

        None if the state of one of the models can't go back to where they end.
        """
        other = FusedCache(*self.links, order=self.order)
        other._fused_from = self._fused_from[:, : self._whole_messages(n, self._fused_from)]
        length = {self.own: n}
        for sharer, fed_by in zip(self.sharers, self._fused_from[1::2, :n], strict=True):
            length[sharer] = max(length.get(sharer, 0), int(fed_by.max(initial=-1)) + 1)
        forks = {reader: reader.fork(length[reader]) for reader in length}
        own, *sharers = (forks[reader] for reader in (self.own, *self.sharers))
        if own is None or None in sharers:
            return None
        other.own, other.cache = own, kv.first(self.cache, other._fused_from.shape[1])
        other.sharers = [sharer for sharer in sharers if sharer]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes that all the caches take."""
        readers = {self.own, *self.sharers}
        return kv.nbytes(self.cache) + sum(reader.nbytes for reader in readers)

    def _advance(self, texts: Sequence[TokenAlignment], ids: mx.array) -> mx.array:
        """The receiver's pass over `ids`, which go on in the texts where the caches end."""
        n = ids.shape[1]
        stop = kv.length(self.cache) + n
        self._watched.forget()
        fused = self._fuse(texts, stop, held_back=n)
        states = self._watched.take(n)
        if states is None:  # they were read before
            logits = self.own.model(ids, cache=kv.injecting(self.cache, fused))
        else:
            above = {layer: pair for layer, pair in fused.items() if layer >= self.first}
            cache = kv.injecting(self.cache, above)
            logits = self._watched.go_on(states, ids, cache, self.own.cache)
            # Else a look at the own cache stays, and the next pass has to copy it.
            mx.async_eval(kv.arrays(self.cache[: self.first]))
        self._fused_from = self._sources(texts, stop)
        return logits

    def _fuse(
        self,
        texts: Sequence[TokenAlignment],
        stop: int,
        progress: Progress | None = None,
        held_back: int = 0,
    ) -> Layers:
        """Reads [0, stop) with all models; appends what is new in it to the fused cache, fused.

        Returns:
            The last `held_back` positions of it, fused, which are not appended.
        """
        sources = self._sources(texts, stop)
        reading: dict[Reader, list[int]] = {}
        for reader, text in zip(self.sharers, texts, strict=True):
            ids = text.sharer_ids[: _reach(text, stop)]
            if reading.setdefault(reader, ids) != ids:
                raise C2CError("a sharer in several links must read the same text for all of them")
        reading[self.own] = texts[0].receiver_ids[:stop]
        kept = {reader: common_prefix(reader.ids, ids) for reader, ids in reading.items()}
        start = self._unchanged(texts, sources, [kept[reader] for reader in self.sharers])
        # Before the cache: an interruption then leaves more in the cache than is noted, never less.
        self._fused_from = self._fused_from[:, :start]
        kv.trim(self.cache, start)
        if held_back:  # state of other layers goes into the coming pass as it was before it
            kv.copy_state(self.own.cache, self.cache)

        unread = [len(ids) - kept[reader] for reader, ids in reading.items()]
        reads = self._read_at_once(reading) if held_back else self._read(reading, unread, progress)
        tic = time.perf_counter()
        if not held_back:
            kv.copy_state(self.own.cache, self.cache)
        border = stop - held_back
        held, traces = self._append(texts, start, border, stop)
        self._fused_from = sources[:, :border]
        costs = sum(unread[:-1]), sum(reads[:-1]), reads[-1], time.perf_counter() - tic
        while self.fusions and self.fusions[-1].start >= start:  # fused anew
            self.fusions.pop()
        self.fusions.append(Fusion(start, stop, *costs, traces))
        self.texts = tuple(texts)
        return held

    def _read(
        self, reading: Mapping[Reader, list[int]], unread: list[int], progress: Progress | None
    ) -> list[float]:
        """Has one model read after the other; the seconds of each, the receiver's last."""
        seconds = []
        for i, (reader, ids) in enumerate(reading.items()):
            tic = time.perf_counter()
            reader.extend(ids, part_of(progress, sum(unread[:i]), sum(unread)))
            seconds.append(time.perf_counter() - tic)
        return seconds

    def _read_at_once(self, reading: Mapping[Reader, list[int]]) -> list[float]:
        """Has all models read side by side; as `_read`, but all of it is the receiver's time."""
        tic = time.perf_counter()
        with ExitStack() as passes:
            new = []
            with mx.stream(device.second_stream()):
                for reader, ids in reading.items():
                    if reader is not self.own:
                        new.append(passes.enter_context(reader.extending(ids)))
            own = self.own.extending(reading[self.own], model=self._watched)
            new.append(passes.enter_context(own))
            mx.eval(new)
        return [0.0, time.perf_counter() - tic]

    def _append(
        self, texts: Sequence[TokenAlignment], start: int, border: int, stop: int
    ) -> tuple[Layers, tuple[list[Trace], ...]]:
        """Fuses [start, stop) part by part, and appends what stands before `border`.

        Returns:
            What stands behind it, and what each link did.
        """
        traces: tuple[list[Trace], ...] = tuple([] for _ in self.links)
        rest: list[Layers] = []
        chunks = self._own_chunks([(start, border), (max(start, border), stop)])
        for number in range(len(self.links)):
            chunks = self._through(number, texts, chunks, (start, stop), traces[number])
        for at, layers in chunks:
            if at >= border:
                rest.append(layers)
                continue
            for layer, (keys, values) in layers.items():
                kv.append(self.cache, layer, keys, values)
            mx.eval(kv.arrays(self.cache), [trace[2:] for of in traces for trace in of])
            if stop - start > device.prefill_chunk():
                mx.clear_cache()
        kv.hide(self.cache, padding(texts[0].receiver_ids[start:border], start))
        held: Layers = {}
        for layer in rest[0] if rest else ():
            keys = mx.concatenate([part[layer][0] for part in rest], axis=2)
            held[layer] = keys, mx.concatenate([part[layer][1] for part in rest], axis=2)
        mx.async_eval(held, [trace[2:] for of in traces for trace in of])
        return held, traces

    def _sources(self, texts: Sequence[TokenAlignment], stop: int) -> np.ndarray:
        """[1 + 2 links, stop] what each position is fused from.

        Its id; and per link the sharer's position that feeds it and the message that it goes with.
        """
        rows: list[Any] = [texts[0].receiver_ids[:stop]]
        for link, text in zip(self.links, texts, strict=True):
            rows += [text.index[:stop], _messages(link, text)[:stop]]
        return np.array(rows, dtype=np.int64).reshape(len(rows), stop)

    def _unchanged(
        self, texts: Sequence[TokenAlignment], sources: np.ndarray, kept: list[int]
    ) -> int:
        """How many positions can stay as they were fused; `kept` of each sharer's stay, too."""
        n = min(self._fused_from.shape[1], sources.shape[1])
        differs = (self._fused_from[:, :n] != sources[:, :n]).any(axis=0)
        start = int(differs.argmax()) if differs.any() else n
        for text, keep in zip(texts, kept, strict=False):
            start = min(start, int(np.searchsorted(text.index[:start], keep)))
        return self._whole_messages(start, self._fused_from, sources)

    def _whole_messages(self, start: int, *sources: np.ndarray) -> int:
        """`start`, or where a message begins that goes on there in any of `sources`.

        A message gate looks at all of its message: one that grew or shrank is fused anew.
        """
        for number, link in enumerate(self.links):
            if link.fuser.config.message_gate:
                row = 2 + 2 * number
                beyond = np.concatenate([x[row, start:] for x in sources])
                cut = np.flatnonzero(np.isin(sources[0][row, :start], beyond[beyond >= 0]))
                start = int(cut[0]) if len(cut) else start
        return start

    def _own_chunks(self, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, Layers]]:
        """The receiver's own keys and values, in parts that a pass of every fuser has room for."""
        layers = kv.attention_layers(self.own.cache)
        for start, stop in spans:
            for at in range(start, stop, self._part):
                end = min(at + self._part, stop)
                yield at, {layer: kv.read_layer(self.own.cache, layer, at, end) for layer in layers}

    def _through(
        self,
        number: int,
        texts: Sequence[TokenAlignment],
        chunks: Iterator[tuple[int, Layers]],
        span: tuple[int, int],
        traces: list[Trace],
    ) -> Iterator[tuple[int, Layers]]:
        """The chunks with what one link adds to them."""
        link, reader, text = self.links[number], self.sharers[number], texts[number]
        messages = _messages(link, text)
        if not ((messages[slice(*span)] >= 0).any() and link.fuser.gates.any()):
            yield from chunks
            return
        waiting: list[tuple[int, Layers, Change]] = []

        def gated(end: int) -> Iterator[tuple[int, Layers]]:
            of_all = messages[None, waiting[0][0] : end]
            decided = link.fuser.gate([change for *_, change in waiting], of_all)
            settled = (change.unless_shut() for change in decided)
            for (at, layers, _), change in zip(waiting, settled, strict=True):
                traces.append(Trace.of(change, at))
                yield at, _added(layers, change, link.receiver_layers)
            waiting.clear()

        for at, layers in chunks:
            end = at + next(iter(layers.values()))[0].shape[2]
            before = layers
            if self.order == "parallel":
                before = {
                    i: kv.read_layer(self.own.cache, i, at, end) for i in link.receiver_layers
                }
            rows = [before[layer] for layer in link.receiver_layers]
            own = kv.StackedKV(mx.stack([k for k, _ in rows]), mx.stack([v for _, v in rows]))
            read = link.read_sharer(reader.cache, text.index[None, at:end])
            waiting.append((at, layers, link.propose(read, own, at)))
            if not link.fuser.config.message_gate:
                yield from gated(end)
            elif end < span[1]:  # more is to come: let this part be numbers, not a graph
                change = waiting[-1][2]
                mx.eval(change.delta, change.weight, change.votes)
        if waiting:
            yield from gated(span[1])

    def stats(self, sharer: int = 0, since: int = 0) -> GateStats | None:
        """Gates, weights and changes of this turn's fusions; computed only when asked for.

        Args:
            sharer: which one, should there be several.
            since: leaves out the positions before this one.

        Returns:
            None if nothing was fused from there on.
        """
        link = self.links[sharer]
        fusions = [f for f in self.fusions if f.stop > since and f.traces[sharer]]
        if not fusions:
            return None
        start, stop = max(fusions[0].start, since), fusions[-1].stop
        own = mx.stack(list(kv.read(self.own.cache, link.receiver_layers, start, stop)))
        norms = np.array(mx.linalg.norm(own[:, :, 0].astype(mx.float32), axis=-1))
        weight, added = np.zeros_like(norms), np.zeros_like(norms)
        for trace in (trace for fusion in fusions for trace in fusion.traces[sharer]):
            kinds, layers = np.array(trace.slices).reshape(-1, 2).T
            skipped = max(start - trace.start, 0)
            first = trace.start + skipped - start
            at = np.s_[kinds, layers, :, first : first + max(trace.norm.shape[-1] - skipped, 0)]
            # What was fused anew stands further behind, and counts.
            weight[at], added[at] = (np.array(x[..., skipped:]) for x in trace[2:])
        is_fused = _messages(link, self.texts[sharer])[start:stop] >= 0
        layer_map = link.fuser.config.layer_map
        return GateStats(layer_map, start, link.fuser.gates, weight, norms, added, is_fused)


def _added(layers: Layers, change: Change, receiver_layers: Sequence[int]) -> Layers:
    """The layers with the change added where it belongs; all others are the same arrays."""
    fused = dict(layers)
    for (kind, at), delta in zip(change.slices, change.delta, strict=True):
        layer = receiver_layers[at]
        keys, values = fused[layer]
        fused[layer] = (keys + delta, values) if kind == 0 else (keys, values + delta)
    return fused


def _messages(link: Link, text: TokenAlignment) -> np.ndarray:
    return message_groups(text.message, link.fuser.config.positions)


def _reach(text: TokenAlignment, stop: int) -> int:
    """How many of the sharer's ids feed the receiver's positions [0, stop)."""
    return int(text.index[:stop].max(initial=-1)) + 1
