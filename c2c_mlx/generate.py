"""Cache-to-Cache itself, on token ids: prefill both models, fuse, hand an mlx-lm cache over.

A fused cache *is* an mlx-lm prompt cache, so decoding is mlx-lm's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler

from c2c_mlx import kv
from c2c_mlx.alignment import message_groups
from c2c_mlx.config import SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fuser import KV, Change, Fuser

PREFILL_CHUNK = 512  # tokens per pass; bounds the memory of attention scores

Progress = Callable[[int, int], None]  # positions done, of how many


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


class Prefix:
    """One model's cache and the ids that stand in it; extending it costs only what is new."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cache = kv.make_cache(model)
        self.ids: list[int] = []

    def extend(self, ids: Sequence[int], progress: Progress | None = None) -> None:
        """Makes the cache hold exactly `ids`, from their common prefix on, in chunks."""
        keep = common_prefix(self.ids, ids)
        if not kv.trim(self.cache, keep):
            self.cache, keep = kv.make_cache(self.model), 0
        self.ids = list(ids[:keep])
        while len(self.ids) < len(ids):
            chunk = ids[len(self.ids) : len(self.ids) + PREFILL_CHUNK]
            self.model(mx.array(list(chunk))[None], cache=self.cache)
            mx.eval(kv.arrays(self.cache))  # the head's logits are in no state: never computed
            self.ids.extend(chunk)
            if progress:
                progress(len(self.ids) - keep, len(ids) - keep)

    def settle(self, ids: Sequence[int]) -> None:
        """Notes what decoding left in the cache: the prompt and as much of what was written.

        Args:
            ids: the prompt and all ids that were yielded; a stopped decoder may have run one ahead.
        """
        kv.trim(self.cache, len(ids))
        self.ids = list(ids[: kv.length(self.cache)])


class C2C:
    """A receiver, a sharer, and the fuser between them.

    Args:
        receiver: the mlx-lm model that answers.
        sharer: the mlx-lm model whose cache is read.
        fuser: trained for models of these shapes.

    Raises:
        C2CError: if the fuser was made for models of other shapes.
    """

    def __init__(self, receiver: nn.Module, sharer: nn.Module, fuser: Fuser) -> None:
        self.receiver, self.sharer, self.fuser = receiver, sharer, fuser
        config = fuser.config
        for role, model, wanted in (
            ("receiver", receiver, config.receiver),
            ("sharer", sharer, config.sharer),
        ):
            shape = kv.model_shape(model, f"this {role}")
            if (shape.layers, shape.kv_heads, shape.head_dim) != (
                wanted.layers,
                wanted.kv_heads,
                wanted.head_dim,
            ):
                raise C2CError(f"the fuser's {role} is {wanted}, but {shape} was given")
        self.receiver_layers = [r for r, _ in config.layer_map]
        self.sharer_layers = sorted({s for _, s in config.layer_map})
        self._shared = mx.array([self.sharer_layers.index(s) for _, s in config.layer_map])
        self._receiver_ropes = self._sharer_ropes = []
        if not config.rotated_keys:
            self._receiver_ropes = [
                kv.rope_of(receiver, i, "receiver") for i in self.receiver_layers
            ]
            self._sharer_ropes = [kv.rope_of(sharer, i, "sharer") for i in self.sharer_layers]

    def prefill(
        self,
        receiver_ids: Sequence[int],
        sharer_ids: Sequence[int] | None = None,
        index: Sequence[int] | None = None,
    ) -> kv.Cache:
        """Prefills both models and fuses every position but the last.

        Args:
            receiver_ids: the receiver's prompt, n ids.
            sharer_ids: the sharer's prompt; None: the receiver's ids.
            index: position in `sharer_ids` that feeds receiver position i; None: i itself.

        Returns:
            An mlx-lm prompt cache over `receiver_ids[:-1]`.

        Raises:
            C2CError: for an empty prompt, or an index that does not fit the two prompts.
        """
        n = len(receiver_ids)
        sharer_ids = receiver_ids if sharer_ids is None else sharer_ids
        positions = np.arange(n) if index is None else np.asarray(index, dtype=np.int32)
        if n == 0:
            raise C2CError("the prompt is empty: C2C needs at least one token")
        feeding = positions[: n - 1]
        if len(feeding) < n - 1 or (
            n > 1 and not 0 <= feeding.min() <= feeding.max() < len(sharer_ids)
        ):
            raise C2CError(
                f"index must name one of the sharer's {len(sharer_ids)} positions for each of the "
                f"receiver's {n - 1}"
            )
        return FusedPrefix(self).extend(receiver_ids, sharer_ids, positions, np.zeros(n, np.int32))

    def read_sharer(self, cache: kv.Cache, index: np.ndarray, offset: Any = 0) -> KV:
        """What the sharer holds for each receiver position.

        Args:
            cache: the sharer's cache.
            index: [B, N] positions in it.
            offset: added to a position in the cache to give the position that RoPE saw, an int or
                [B] (left padding is negative).

        Returns:
            Keys (without RoPE if the fuser wants them so) and values, [L, B, Hs, N, Ds].
        """
        low, high = int(index.min()), int(index.max()) + 1
        keys, values = kv.read(cache, self.sharer_layers, low, high)
        if self._sharer_ropes:
            keys = _each(self._sharer_ropes, kv.unrotate, keys, offset + low)
        if index.shape[0] == 1:
            at = mx.array(index[0] - low)
            return keys[..., at, :][self._shared], values[..., at, :][self._shared]
        at = mx.array(index - low)[None, :, None, :, None]
        keys, values = (mx.take_along_axis(x, at, axis=3) for x in (keys, values))
        return keys[self._shared], values[self._shared]

    def fuser_view(self, own: kv.StackedKV, offset: Any = 0) -> KV:
        """The receiver's keys and values as the fuser wants them, [L, B, Hr, N, Dr].

        Args:
            own: the fused layers of the receiver's own cache.
            offset: the position that RoPE saw at the first of the N, an int or [B].
        """
        if not self._receiver_ropes:
            return own.keys, own.values
        return _each(self._receiver_ropes, kv.unrotate, own.keys, offset), own.values

    def change(
        self, sharer: KV, own: kv.StackedKV, messages: np.ndarray, offset: Any = 0
    ) -> Change:
        """What the fuser adds to the receiver's cache, ready to be added to rotated keys.

        Args:
            sharer: from `read_sharer`.
            own: the fused layers of the receiver's own cache, [L, B, Hr, N, Dr].
            messages: [B, N] the message of each position, -1 for template text and padding.
            offset: the position that RoPE saw at the first of the N, an int or [B].
        """
        receiver = self.fuser_view(own, offset)
        change = self.fuser.change(sharer=sharer, receiver=receiver, messages=messages)
        if not change.slices:
            return change
        delta = change.delta
        if (messages < 0).any():
            delta = delta * mx.array((messages >= 0)[None, :, None, :, None].astype(np.float32))
        if self._receiver_ropes:
            ropes = [self._receiver_ropes[at] for kind, at in change.slices if kind == 0]
            turned = [rope(d, offset=offset) for rope, d in zip(ropes, delta, strict=False)]
            delta = mx.concatenate([mx.stack(turned), delta[len(turned) :]]) if turned else delta
        return replace(change, delta=delta)


def _each(ropes: list[Any], f: Callable[..., mx.array], keys: mx.array, offset: Any) -> mx.array:
    return mx.stack([f(rope, k, offset) for rope, k in zip(ropes, keys, strict=True)])


@dataclass(frozen=True)
class GateStats:
    """How one turn's fusion changed the receiver's cache, per slice, head and position.

    Attributes:
        layers: the receiver's fused layers, L of them.
        start: the first of the N fused positions.
        gates: [2, L] bool, keys before values; nothing is computed for a closed one.
        weight: [2, L, Hr, N] the dynamic weight, message gate included.
        own: [2, L, Hr, N] norm of the receiver's own key or value.
        change: [2, L, Hr, N] norm of what was added to it.
    """

    layers: tuple[int, ...]
    start: int
    gates: np.ndarray
    weight: np.ndarray
    own: np.ndarray
    change: np.ndarray

    @property
    def mean_weight(self) -> np.ndarray:
        """[2, L, Hr] mean dynamic weight over the fused positions."""
        return self.weight.mean(axis=-1)

    @property
    def relative_change(self) -> np.ndarray:
        """[2, L, Hr] ||fused - own|| / ||own|| over the fused positions."""
        own = np.linalg.norm(self.own, axis=-1)
        return np.linalg.norm(self.change, axis=-1) / np.maximum(own, 1e-12)

    @property
    def applied_weight(self) -> np.ndarray:
        """[2, L, Hr, N] the weight, but 0 where a message gate kept everything out."""
        return np.where(self.change > 0, self.weight, 0.0)


@dataclass(frozen=True)
class Fusion:
    """What one call of `FusedPrefix.extend` cost, and what it added (positions [start, stop))."""

    start: int
    stop: int
    sharer_tokens: int
    sharer_s: float
    receiver_s: float
    fuse_s: float
    change: Change | None


class FusedPrefix:
    """The three caches of a C2C conversation: the sharer's, the receiver's own, and the fused one.

    The receiver's own cache is never fused, so extending it by a turn gives exactly what a prefill
    of the whole conversation from scratch would give.
    """

    def __init__(self, c2c: C2C) -> None:
        self.c2c = c2c
        self.own = Prefix(c2c.receiver)
        self.sharer = Prefix(c2c.sharer)
        self.cache = kv.make_cache(c2c.receiver)
        self.feeds: list[tuple[int, int, int]] = []  # per fused position: id, index, message
        self.last: Fusion | None = None

    def extend(
        self,
        receiver_ids: Sequence[int],
        sharer_ids: Sequence[int],
        index: np.ndarray,
        messages: np.ndarray,
        progress: Progress | None = None,
    ) -> kv.Cache:
        """Makes the fused cache hold `receiver_ids[:-1]`; the last id is decoding's first input.

        Args:
            receiver_ids: the receiver's prompt, n ids.
            sharer_ids: the sharer's prompt.
            index: [n] the position in `sharer_ids` that feeds each receiver position.
            messages: [n] the message that each position belongs to, -1 for template text.
            progress: called with positions done and to do, over both prefills.

        Returns:
            The fused mlx-lm prompt cache, owned by this object until the next call.
        """
        n = len(receiver_ids) - 1
        messages = message_groups(messages, self.c2c.fuser.config.positions)
        sharer_ids = sharer_ids[: int(index[:n].max()) + 1 if n else 0]
        feeds = list(zip(receiver_ids[:n], index[:n].tolist(), messages[:n].tolist(), strict=True))
        # A position stays fused only while the sharer's state that fed it stays, too.
        same_sharer = common_prefix(self.sharer.ids, sharer_ids)
        start = common_prefix(self.feeds, feeds)
        start = min(start, int(np.searchsorted(index[:start], same_sharer)))
        if self.c2c.fuser.config.message_gate:
            # A gate looks at all of its message: one that grew or shrank is fused anew.
            beyond = [m for *_, m in self.feeds[start:] + feeds[start:] if m >= 0]
            cut = np.flatnonzero(np.isin(messages[:start], beyond))
            start = int(cut[0]) if len(cut) else start
        if not kv.trim(self.cache, start):
            self.cache, start = kv.make_cache(self.c2c.receiver), 0
        self.feeds = self.feeds[:start]

        to_share = len(sharer_ids) - same_sharer
        total = to_share + n - start
        began = time.perf_counter()
        self.sharer.extend(sharer_ids, progress and (lambda done, _: progress(done, total)))
        shared = time.perf_counter()
        self.own.extend(
            receiver_ids[:n], progress and (lambda done, _: progress(to_share + done, total))
        )
        prefilled = time.perf_counter()
        change = self._append(start, n, index[None, start:n], messages[None, start:n])
        mx.eval(kv.arrays(self.cache))
        fused = time.perf_counter()
        self.feeds = feeds
        self.last = Fusion(
            start, n, to_share, shared - began, prefilled - shared, fused - prefilled, change
        )
        return self.cache

    def _append(
        self, start: int, stop: int, index: np.ndarray, messages: np.ndarray
    ) -> Change | None:
        """Appends the receiver's own positions [start, stop) to the fused cache, changed."""
        if start == stop:
            return None
        change = None
        added: dict[tuple[int, int], mx.array] = {}
        if (messages >= 0).any() and self.c2c.fuser.gates.any():
            own = kv.read(self.own.cache, self.c2c.receiver_layers, start, stop)
            sharer = self.c2c.read_sharer(self.sharer.cache, index)
            change = self.c2c.change(sharer, own, messages, start)
            for (kind, at), delta in zip(change.slices, change.delta, strict=True):
                added[kind, self.c2c.receiver_layers[at]] = delta
        kv.copy_state(self.own.cache, self.cache)
        for layer in kv.attention_layers(self.own.cache):
            fresh = kv.read(self.own.cache, [layer], start, stop)
            keys, values = (
                x[0] + added[kind, layer] if (kind, layer) in added else x[0]
                for kind, x in enumerate(fresh)
            )
            kv.append(self.cache, layer, keys, values)
        return change

    def stats(self) -> GateStats | None:
        """Gates, weights and changes of the last extension; computed only when asked for."""
        if self.last is None or self.last.change is None:
            return None
        start, stop, change = self.last.start, self.last.stop, self.last.change
        own = mx.stack(list(kv.read(self.own.cache, self.c2c.receiver_layers, start, stop)))
        norms = np.array(mx.linalg.norm(own[:, :, 0], axis=-1).astype(mx.float32))
        weight, added = np.zeros_like(norms), np.zeros_like(norms)
        if change.slices:
            kinds, at = np.array(change.slices).T
            weights = change.weight[:, 0, ..., 0]
            if change.message_weight is not None:
                weights = weights * change.message_weight[:, 0, ..., 0]
            weight[kinds, at] = np.array(weights.astype(mx.float32))
            delta = mx.linalg.norm(change.delta[:, 0], axis=-1)
            added[kinds, at] = np.array(delta.astype(mx.float32))
        layers = tuple(self.c2c.receiver_layers)
        return GateStats(layers, start, self.c2c.fuser.gates, weight, norms, added)


def decode(
    model: nn.Module,
    tokenizer: Any,
    cache: kv.Cache,
    last_ids: Sequence[int],
    sampling: SamplingConfig,
    stop_strings: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """mlx-lm's own decoding from a prefilled cache, the same for every mode.

    Args:
        model: an mlx-lm model.
        tokenizer: its mlx-lm tokenizer.
        cache: a prompt cache; it grows in place.
        last_ids: what of the prompt is not in the cache, at least one id.
        sampling: temperature, nucleus, seed, and the most tokens to generate.
        stop_strings: text that ends an answer; it and all behind it are dropped.

    Yields:
        (token id, text that is now certain); the text is empty while it might become a stop string.
        The last id that is yielded may be the end-of-turn token.
    """
    mx.random.seed(sampling.seed)
    text, shown = "", 0
    for response in stream_generate(
        model,
        tokenizer,
        mx.array(list(last_ids)),
        max_tokens=sampling.max_tokens,
        sampler=make_sampler(temp=sampling.temp, top_p=sampling.top_p),
        prompt_cache=cache,
        prefill_step_size=PREFILL_CHUNK,
    ):
        text += response.text
        stop = min((at for s in stop_strings if (at := text.find(s)) >= 0), default=-1)
        certain = stop if stop >= 0 else len(text) - _held_back(text, stop_strings)
        if response.finish_reason and stop < 0:
            certain = len(text)
        yield response.token, text[shown:certain]
        shown = max(shown, certain)
        if stop >= 0:
            return


def _held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest tail of `text` that a stop string begins with."""
    return max(
        (n for s in stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
    )
