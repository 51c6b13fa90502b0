"""What crossed in an answer: how much likelier the sharer's cache made every token of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.events import Crossed
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.link import Link
from c2c_mlx.fusion.project import KV
from c2c_mlx.fusion.reader import Progress, Reader
from c2c_mlx.fusion.states import States
from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.answer import AnswerAlignment
from c2c_mlx.text.words import token_texts

PART = 256  # tokens whose logits are computed at a time; bounds the memory


class Silent(Link):
    """A link whose sharer says nothing: the fuser reads zeros."""

    def __init__(self, link: Link) -> None:
        vars(self).update(vars(link))

    def read_sharer(self, cache: kv.Cache, index: np.ndarray, offset: Any = 0) -> KV:
        """Zeros in the shape and the precision of what would have been read."""
        keys, values = super().read_sharer(cache, index, offset)
        return mx.zeros_like(keys), mx.zeros_like(values)


def silenced(text: TokenAlignment) -> TokenAlignment:
    """The same text for a silent sharer, which need read no more than one token."""
    return replace(text, sharer_ids=text.sharer_ids[:1], index=np.zeros_like(text.index))


@dataclass
class Decoded:
    """A C2C answer as it was decoded.

    Attributes:
        prompt: the receiver's, n ids.
        fused: whether the answer was fused while it was being written.
        states: of the receiver while it wrote, below what is fused; None: they were not kept.
        ids: N ids, the end of the turn and thoughts before the answer included.
        log_probs: of each of them.
        thoughts: how many of them are thoughts, of which nothing is told.
        text: what was shown; a stop string is not.
    """

    prompt: list[int]
    fused: bool = False
    states: States | None = None
    ids: list[int] = field(default_factory=list)
    log_probs: list[mx.array] = field(default_factory=list)
    thoughts: int = 0
    text: str = ""

    @property
    def has_answer(self) -> bool:
        """Whether there is anything to tell of."""
        return len(self.ids) > self.thoughts

    def add(self, token: int, text: str, log_prob: mx.array, is_thought: bool = False) -> None:
        """Notes one more token."""
        mx.async_eval(log_prob)  # else those of the whole vocabulary would be kept
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.thoughts += is_thought
        self.text += text

    def cut(self, n: int) -> None:
        """Forgets tokens that nobody was shown."""
        del self.ids[n:], self.log_probs[n:]

    def texts(self, tokenizer: Any) -> tuple[str, ...]:
        """Each answered token's part of what was shown, without white space before all words."""
        found: list[str] = []
        room = len(self.text.lstrip())
        for text in token_texts(self.ids[self.thoughts :], tokenizer):
            found.append((text if any(found) else text.lstrip())[:room])
            room -= len(found[-1])
        return tuple(found)


def watched(fused: FusedCache) -> States:
    """The receiver, for decoding, which keeps what weighing the answer would compute again."""
    return States(fused.own.model, fused.first)


class Crossing:
    """A second fused cache of a conversation, in which every sharer is silent.

    What both have in common, the models' own caches, is read once.

    Args:
        fused: the conversation's caches.
    """

    def __init__(self, fused: FusedCache) -> None:
        self._fused = fused
        links = [Silent(link) for link in fused.links]
        self._silent = FusedCache(*links, order=fused.order)
        borrowed = {reader: _Borrowed(reader) for reader in (fused.own, *fused.sharers)}
        self._silent.own = borrowed[fused.own]
        self._silent.sharers = [borrowed[reader] for reader in fused.sharers]

    def fuse_anew(self) -> None:
        """Forgets what was fused, when a fuser has changed."""
        self._silent.fuse_anew()

    def of(self, decoded: Decoded, tokenizer: Any, over_receiver: bool = False) -> Crossed:
        """How much likelier each token of the latest answer is than with a silent sharer.

        It costs one pass over the answer of the receiver's layers from the first fused one on (of
        all of them if the answer was fused, too), or none where nothing crossed; and a pass of the
        fuser over what is new of the prompt. In half precision a figure is as coarse as the model's
        logits, about 0.1 nat.

        Args:
            decoded: the answer.
            tokenizer: the receiver's.
            over_receiver: also compares with the receiver alone, which costs one more pass.

        Returns:
            One figure per token, the end of the turn included, thoughts not; exactly 0 where the
            two caches hold the same numbers, as they do if all gates are shut.
        """
        said = mx.stack(decoded.log_probs).astype(mx.float32)
        silent = self._silent_log_probs(decoded)
        over: Any = []
        if over_receiver:
            own, prompt = self._fused.own, decoded.prompt[:-1]
            own.extend(prompt)
            alone = log_probs_of(own.model, own.cache, decoded.prompt[-1], decoded.ids)
            own.settle(prompt)
            over = (said - alone).tolist()
        nats: Any = [0.0] * len(decoded.ids) if silent is None else (said - silent).tolist()
        answered = slice(decoded.thoughts, None)
        return Crossed(decoded.texts(tokenizer), tuple(nats[answered]), tuple(over[answered]))

    def _silent_log_probs(self, decoded: Decoded) -> mx.array | None:
        """[N] log p of each token with a silent sharer; None where nothing crossed."""
        n, texts, own = len(decoded.prompt), self._fused.texts, self._fused.own
        has_state = kv.has_state(own.cache)
        if decoded.fused and has_state:  # the own cache's has moved on with the answer
            self._silent.own = Reader(own.model)
        prompts = [_beginning(text, n) for text in texts]
        cache = self._silent.extend(prompts)
        if not decoded.fused:
            if self._same(n - 1):
                return None
            model: Any = own.model
            if decoded.states:
                model = decoded.states.above(self._fused.cache)
            return log_probs_of(model, cache, decoded.prompt[-1], decoded.ids)
        pairs = zip(prompts, texts, strict=True)
        model = self._silent.answering([_Written(*pair) for pair in pairs])
        # As it was decoded: what has state goes into every pass as the own cache's was before it.
        part = 1 if has_state else PART
        found = log_probs_of(model, cache, decoded.prompt[-1], decoded.ids, part)
        return None if self._same(n - 1 + len(decoded.ids)) else found

    def _same(self, n: int) -> bool:
        layers = sorted({layer for link in self._fused.links for layer in link.receiver_layers})
        return same_start(self._fused.cache, self._silent.cache, layers, n)


def same_start(a: kv.Cache, b: kv.Cache, layers: Sequence[int], n: int) -> bool:
    """Whether two caches hold the same numbers in their first n positions of these layers."""
    return all(
        mx.array_equal(x, y)
        for layer in layers
        for x, y in zip(kv.read(a, [layer], 0, n), kv.read(b, [layer], 0, n), strict=True)
    )


def log_probs_of(
    model: Any, cache: kv.Cache, last: int, answer: Sequence[int], part: int = 0
) -> mx.array:
    """The log-probability of each id of an answer, by teacher forcing; the cache grows by them.

    Args:
        model: an mlx-lm model, or what `FusedCache.answering` or `States.above` gives.
        cache: all of the prompt but its last id.
        last: that id.
        answer: N ids.
        part: how many of them pass at once; 0: as many as there is memory for.

    Returns:
        [N] in float32.
    """
    ids, found, part = [last, *answer[:-1]], [], part or PART
    for at in range(0, len(ids), part):
        logits = model(mx.array([ids[at : at + part]]), cache=cache)[0].astype(mx.float32)
        said = mx.array(list(answer[at : at + part]))[:, None]
        log_probs = mx.take_along_axis(logits, said, axis=1)[:, 0] - mx.logsumexp(logits, axis=1)
        found.append(log_probs)
        mx.eval(log_probs, kv.arrays(cache))
    return mx.concatenate(found)


class _Borrowed(Reader):
    """Another conversation's reader: what it has read is not read again, nor rolled back."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    @contextmanager
    def extending(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        model: Callable[..., mx.array] | None = None,
    ) -> Iterator[list[Any]]:
        """Reads only where it has read something else, or less."""
        if self._reader.ids[: len(ids)] == list(ids):
            yield []
            return
        with self._reader.extending(ids, progress, model) as new:
            yield new


class _Written(AnswerAlignment):
    """An answer that is all there."""

    def __init__(self, prompt: TokenAlignment, text: TokenAlignment) -> None:
        self.prompt, self._whole = prompt, text

    def add(self, ids: Sequence[int]) -> TokenAlignment:
        """All of it, whatever has been read of it."""
        return self._whole


def _beginning(text: TokenAlignment, n: int) -> TokenAlignment:
    ids, index, message = text.receiver_ids[:n], text.index[:n], text.message[:n]
    return replace(text, receiver_ids=ids, index=index, message=message)
