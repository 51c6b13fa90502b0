"""Cache-to-Cache itself, on token ids: prefill both models, fuse, hand an mlx-lm cache over.

A fused cache *is* an mlx-lm prompt cache, so decoding is mlx-lm's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
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
from c2c_mlx.checkpoint import check_models
from c2c_mlx.config import SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import Reason
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
        self.ids = list(
            ids[:keep]
        )  # first of all: an interruption leaves more in the cache, not less
        if not kv.trim(self.cache, keep):
            self.ids, keep = [], 0
            self.cache = kv.make_cache(self.model)
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
        self.ids = list(ids[: kv.length(self.cache)])
        kv.trim(self.cache, len(self.ids))


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
        shapes = (kv.model_shape(model, "a model") for model in (receiver, sharer))
        check_models(config, *shapes)
        self.receiver_layers = [r for r, _ in config.layer_map]
        self.sharer_layers = sorted({s for _, s in config.layer_map})
        self._shared = mx.array([self.sharer_layers.index(s) for _, s in config.layer_map])
        self._rotations: tuple[kv.Rotation, kv.Rotation] | None = None  # receiver's, sharer's
        if not config.rotated_keys:
            self._rotations = (
                kv.Rotation(receiver, self.receiver_layers, "receiver"),
                kv.Rotation(sharer, self.sharer_layers, "sharer"),
            )

    def prefill(
        self,
        receiver_ids: Sequence[int],
        sharer_ids: Sequence[int] | None = None,
        index: Sequence[int] | None = None,
        sections: Sequence[tuple[int, bool]] | None = None,
    ) -> kv.Cache:
        """Prefills both models and fuses every position but the last.

        Args:
            receiver_ids: the receiver's prompt, n ids.
            sharer_ids: the sharer's prompt; None: the receiver's ids.
            index: position in `sharer_ids` that feeds receiver position i; None: i itself.
            sections: (length, whether it is fused) of consecutive parts of `receiver_ids[:-1]`; the
                receiver reads a part on top of the fused parts before it. None: one part, fused.

        Returns:
            An mlx-lm prompt cache over `receiver_ids[:-1]`.

        Raises:
            C2CError: for an empty prompt, or an index or sections that do not fit the prompts.
        """
        n = len(receiver_ids) - 1
        if n < 0:
            raise C2CError("the prompt is empty: C2C needs at least one token")
        sharer_ids = receiver_ids if sharer_ids is None else sharer_ids
        feeding = np.arange(n) if index is None else np.asarray(index[:n], dtype=np.int32)
        if len(feeding) < n or (n and not 0 <= feeding.min() <= feeding.max() < len(sharer_ids)):
            raise C2CError(
                f"index must name one of the sharer's {len(sharer_ids)} positions for each of the "
                f"receiver's {n}"
            )
        sections = [(n, True)] if sections is None else sections
        if sum(length for length, _ in sections) != n or any(length < 0 for length, _ in sections):
            raise C2CError(f"sections must have {n} positions, the prompt's but its last")
        shared = Prefix(self.sharer)
        shared.extend(sharer_ids[: feeding.max(initial=-1) + 1])
        prefix = Prefix(self.receiver)
        for length, fused in sections:
            start, stop = len(prefix.ids), len(prefix.ids) + length
            prefix.extend(receiver_ids[:stop])
            if fused and length:
                own = kv.read(prefix.cache, self.receiver_layers, start, stop)
                sharer = self.read_sharer(shared.cache, feeding[None, start:stop])
                change = self.change(sharer, own, np.zeros((1, length), np.int32), start)
                for layer, *pair in zip(self.receiver_layers, *change.added_to(own), strict=True):
                    kv.replace(prefix.cache, layer, *pair)
                mx.eval(kv.arrays(prefix.cache))
        return prefix.cache

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
        if self._rotations:
            keys = self._rotations[1].take_off(keys, offset + low)
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
        if self._rotations is None:
            return own.keys, own.values
        return self._rotations[0].take_off(own.keys, offset), own.values

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
        keys = [at for kind, at in change.slices if kind == 0]
        if self._rotations is None or not keys:
            return change
        turned = self._rotations[0].put_on(change.delta[: len(keys)], offset, keys)
        return replace(change, delta=mx.concatenate([turned, change.delta[len(keys) :]]))


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
        self.feeds = self.feeds[:start]  # before the cache: as in Prefix.extend
        if not kv.trim(self.cache, start):
            self.feeds, start = [], 0
            self.cache = kv.make_cache(self.c2c.receiver)

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
        change, mapped = None, self.c2c.receiver_layers
        own = kv.read(self.own.cache, mapped, start, stop)
        fused: KV = own
        if (messages >= 0).any() and self.c2c.fuser.gates.any():
            sharer = self.c2c.read_sharer(self.sharer.cache, index)
            change = self.c2c.change(sharer, own, messages, start)
            fused = change.added_to(own)
        kv.copy_state(self.own.cache, self.cache)
        pairs = dict(zip(mapped, zip(*fused, strict=True), strict=True))
        for layer in kv.attention_layers(self.own.cache):
            if layer not in pairs:
                keys, values = kv.read(self.own.cache, [layer], start, stop)
                pairs[layer] = keys[0], values[0]
            kv.append(self.cache, layer, *pairs[layer])
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
) -> Generator[tuple[int, str], None, Reason]:
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

    Returns:
        "stop" if the answer ended by itself or at a stop string, "length" if it was cut.
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
            return "stop"
    return "stop" if response.finish_reason == "stop" else "length"


def _held_back(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest tail of `text` that a stop string begins with."""
    return max(
        (n for s in stop_strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0
    )
