"""The six modes at work: items are read, answers written and weighed."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator, TextStateMachine

from c2c_mlx.config import Order
from c2c_mlx.errors import C2CError, NoFuserError
from c2c_mlx.evaluation.task import C2C_MODES, Item, Messages
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.talk import decode, relay
from c2c_mlx.talk.crossed import Silent, silenced
from c2c_mlx.talk.links import align_to_each, link
from c2c_mlx.text import thoughts
from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import tokenize

LOGITS = 1024  # tokens whose logits are computed at a time; bounds the memory


@dataclass
class Written:
    """What a model wrote."""

    ids: list[int] = field(default_factory=list)  # the end of the turn and thoughts included
    thoughts: int = 0  # of them, before the answer
    text: str = ""
    first: float = 0.0  # on the clock of `time.perf_counter`: when the first token was there
    last: float = 0.0


@dataclass(frozen=True)
class Reading:
    """A prompt that has been read and waits to be answered."""

    lm: LanguageModel  # who answers
    cache: kv.Cache  # all of the prompt but its last id; nobody else writes to it
    last: int
    prompt_tokens: int
    is_thinking: bool = False  # whether the prompt ends within thoughts
    relayed: Written | None = None


class Modes:
    """A receiver, its sharers with a fuser each, asked in any mode.

    Args:
        receiver: answers, in every mode but `sharer`.
        sharers: none: only `receiver` works; the first one answers alone and writes the relay.
        fusers: one per sharer; none: the C2C modes don't work.
        order: of several sharers, see `FusedCache`.
        items: all that will be asked; in `c2c-shuffled` each is fed by another one's sharer.
        seed: of who is fed by whom.
        max_tokens: of an answer.

    Raises:
        C2CError: if a fuser was not made for its models.
    """

    def __init__(
        self,
        receiver: LanguageModel,
        sharers: Sequence[LanguageModel],
        fusers: Sequence[Fuser],
        order: Order,
        items: Sequence[Item],
        seed: int,
        max_tokens: int,
    ) -> None:
        self.receiver, self.sharers, self.order = receiver, sharers, order
        self.links = [link(receiver, *pair) for pair in zip(sharers, fusers, strict=bool(fusers))]
        self._silent = [Silent(link) for link in self.links]
        self.partners = derangement(items, seed)
        self.max_tokens = max_tokens
        self.forget()

    def forget(self) -> None:
        """Drops what prompts have in common with earlier ones, which would be read for free."""
        self._prefixes: dict[str, Reader | FusedCache] = {}

    def read(self, mode: str, items: Sequence[Item]) -> list[Reading | C2CError]:
        """Lets the models of a mode read the items' prompts; an item may fail by itself."""
        if mode != "relay":
            return [self._try(mode, item, item.messages) for item in items]
        relayed = self._relay(items)
        return [
            w if isinstance(w, C2CError) else self._try(mode, item, _with_background(item, w), w)
            for item, w in zip(items, relayed, strict=True)
        ]

    def _relay(self, items: Sequence[Item]) -> list[Written | C2CError]:
        """What the sharer writes for the receiver to read."""
        readings = [self._try("background", item, self._background(item)) for item in items]
        good = [r for r in readings if isinstance(r, Reading)]
        stops = relay.stop_strings(self._sharer)
        written = iter(write(good, relay.BACKGROUND_TOKENS, stops))
        return [next(written) if isinstance(r, Reading) else r for r in readings]

    def _background(self, item: Item) -> Messages:
        asked = relay.background_message(_ask(item))
        return relay.prompt(self._sharer, [*item.messages[:-1], asked])

    def _try(
        self, mode: str, item: Item, messages: Messages, relayed: Written | None = None
    ) -> Reading | C2CError:
        try:
            if mode in C2C_MODES:
                return self._read_fused(mode, item)
            lm = self._sharer if mode in ("sharer", "background") else self.receiver
            return replace(self._read_plain(mode, lm, messages), relayed=relayed)
        except C2CError as e:
            return e

    def _read_plain(self, mode: str, lm: LanguageModel, messages: Messages) -> Reading:
        ids = tokenize(render(messages, lm.tokenizer), lm.tokenizer)
        check_room(lm, ids)
        prefix = self._prefixes.setdefault(mode, Reader(lm.model))
        assert isinstance(prefix, Reader)
        prefix.extend(ids[:-1])
        is_thinking = thoughts.begins_thinking(lm.tokenizer, ids)
        return Reading(lm, copy.deepcopy(prefix.cache), ids[-1], len(ids), is_thinking)

    def _read_fused(self, mode: str, item: Item) -> Reading:
        if not self.links:
            raise NoFuserError(self.receiver.name, self._sharer.name)
        lm, prompts = self.receiver, self._aligned(item)
        ids = prompts[0].receiver_ids
        if mode == "c2c-shuffled":
            others = self._aligned(self.partners[item.id])
            prompts = [p.with_sharer_of(o) for p, o in zip(prompts, others, strict=True)]
        elif mode == "c2c-zeroed":  # nothing of it is looked at
            prompts = [silenced(prompt) for prompt in prompts]
        check_room(lm, ids)
        for sharer, prompt in zip(self.sharers, prompts, strict=True):
            check_room(sharer, prompt.sharer_ids)
        links = self._silent if mode == "c2c-zeroed" else self.links
        prefix = self._prefixes.setdefault(mode, FusedCache(*links, order=self.order))
        assert isinstance(prefix, FusedCache)
        cache, is_thinking = prefix.extend(prompts), thoughts.begins_thinking(lm.tokenizer, ids)
        return Reading(lm, copy.deepcopy(cache), ids[-1], len(ids), is_thinking)

    def _aligned(self, item: Item) -> list[TokenAlignment]:
        return align_to_each(item.messages, self.receiver, self.links, self.sharers)

    @property
    def _sharer(self) -> LanguageModel:
        return self.sharers[0]


def derangement(items: Sequence[Item], seed: int) -> dict[str, Item]:
    """For each item's id another item, each once; nothing if there is only one."""
    if len(items) < 2:
        return {}
    order = np.random.default_rng(seed).permutation(len(items))
    return {
        items[a].id: items[b]
        for a, b in zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)
    }


def write(
    readings: Sequence[Reading], max_tokens: int, stop_strings: Sequence[str] | None = None
) -> list[Written]:
    """Answers greedily, all at once; the readings are of one model and stay as they are.

    Args:
        readings: what is answered.
        max_tokens: of an answer, if the model's context has room for them. Thoughts have a budget
            of their own, as in a chat, and are no part of the text.
        stop_strings: text that ends an answer; None: the model's own.
    """
    if not readings:
        return []
    lm = readings[0].lm
    stops = lm.stop_strings if stop_strings is None else stop_strings
    stop_tokens, parts = set(lm.tokenizer.eos_token_ids), decode.parts_of(lm.tokenizer, stops)
    generator = BatchGenerator(
        lm.model,
        stop_tokens=[[token] for token in stop_tokens],
        completion_batch_size=len(readings),
        prefill_batch_size=len(readings),
    )
    room = [lm.context_length - r.prompt_tokens for r in readings]
    most = max_tokens + (thoughts.BUDGET if thoughts.marks(lm.tokenizer) else 0)
    uids = generator.insert(
        [[r.last] for r in readings],
        [min(most, left) for left in room],
        [kv.mergeable(r.cache) for r in readings],
    )
    written = {uid: Written() for uid in uids}
    texts = {uid: lm.tokenizer.detokenizer for uid in uids}
    states = {
        uid: parts.make_state("thoughts" if r.is_thinking else "normal")
        for uid, r in zip(uids, readings, strict=True)
    }
    try:
        while responses := generator.next_generated():
            now = time.perf_counter()
            for response in responses:
                w, text = written[response.uid], texts[response.uid]
                w.ids.append(response.token)
                w.last = now
                if response.token not in stop_tokens:
                    text.add_token(response.token)
                if response.finish_reason:
                    text.finalize()
                before = states[response.uid]
                state, segments = TextStateMachine.split(before, text.last_segment)
                if "thoughts" in (before[0], state[0]):  # a mark is no part of the answer
                    w.thoughts += 1
                else:
                    w.first = w.first or now
                is_cut = len(w.ids) - w.thoughts == max_tokens
                w.text += "".join(part for name, part in segments if name == "normal")
                if (response.finish_reason or is_cut) and state[0] == "normal":
                    state, rest, _ = TextStateMachine.flush(state)
                    w.text += rest
                states[response.uid] = state
                if (state[0] is None or is_cut) and not response.finish_reason:
                    generator.remove([response.uid])
    finally:
        generator.close()
    for w in written.values():
        w.text = w.text.strip()
    return [written[uid] for uid in uids]


def nats(
    readings: Sequence[Reading], continuations: Sequence[Sequence[list[int]]]
) -> list[list[float]]:
    """-log p of each reading's continuations, by teacher forcing, several at once.

    No logits of a prompt are ever computed, and continuations that differ in their last token alone
    cost as much as one.
    """
    lasts: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # reading, all but the last token
    for number, wanted in enumerate(continuations):
        for ids in wanted:
            lasts.setdefault((number, tuple(ids[:-1])), []).append(ids[-1])
    rows = sorted(lasts, key=lambda row: len(row[1]))
    size = max(LOGITS // (len(rows[-1][1]) + 1), 1) if rows else 1
    found: dict[tuple[int, tuple[int, ...]], float] = {}
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        width = len(part[-1][1])
        padded = [[readings[n].last, *said, *[0] * (width - len(said))] for n, said in part]
        cache = kv.merge([readings[n].cache for n, _ in part])
        logits = readings[0].lm.model(mx.array(padded), cache=cache)
        for (n, said), of_row in zip(part, logits, strict=True):
            logs = nn.log_softmax(of_row[: len(said) + 1].astype(mx.float32), axis=-1)
            before = logs[mx.arange(len(said)), mx.array(said, mx.int32)].sum()
            for last in lasts[n, said]:
                found[n, (*said, last)] = -(before + logs[-1, last]).item()
    return [[found[n, tuple(ids)] for ids in of] for n, of in enumerate(continuations)]


def _ask(item: Item) -> str:
    return item.messages[-1]["content"]


def _with_background(item: Item, relayed: Written) -> Messages:
    return [*item.messages[:-1], *relay.with_background(_ask(item), relayed.text)]


def check_room(lm: LanguageModel, ids: Sequence[int]) -> None:
    """Makes sure that a model can read a prompt and write one token.

    Raises:
        C2CError: if its context is too short for that.
    """
    if len(ids) >= lm.context_length:
        raise C2CError(
            f"the prompt is {len(ids)} tokens long, but {lm.name} reads at most {lm.context_length}"
        )
