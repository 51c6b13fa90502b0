"""A prompt from its messages to a cache that can be answered from, slice by slice."""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass

import c2c_mlx.blas  # noqa: F401

from c2c_mlx import device
from c2c_mlx.config import Order
from c2c_mlx.errors import C2CError, NoFuserError
from c2c_mlx.events import Mode
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader, common_prefix
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.models.remote_reader import RemoteReader
from c2c_mlx.serving.caches import Caches, State
from c2c_mlx.serving.job import Messages, TooLong, Wait
from c2c_mlx.talk.links import align_to_each
from c2c_mlx.text import thoughts
from c2c_mlx.text.alignment import TokenAlignment
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import tokenize


@dataclass(frozen=True)
class Team:
    """Who answers here; what is missing costs the modes that need it."""

    receiver: LanguageModel
    sharers: Sequence[LanguageModel] = ()  # the first one also answers alone and writes the relay
    links: Sequence[C2C] = ()  # one per sharer, or none
    order: Order = "sequential"
    fuse_response: bool = False
    weights: str = ""  # the receiver's fingerprint, for those who train from afar

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What can be asked for."""
        writing = self.sharers and not self.sharers[0].is_elsewhere
        alone: tuple[Mode, ...] = ("relay", "receiver", "sharer") if writing else ("receiver",)
        return ("c2c", *alone) if self.links else alone

    def answering(self, mode: Mode) -> LanguageModel:
        """The model whose words the answer is.

        Raises:
            C2CError: if the mode needs somebody who is missing.
        """
        if mode not in self.modes:
            name = self.receiver.name
            if self.sharers:
                raise NoFuserError(name, self.sharers[0].name)
            raise C2CError(f"{name} has no sharer")
        return self.sharers[0] if mode == "sharer" else self.receiver

    @property
    def gates_open(self) -> int:
        """Over all fusers."""
        return sum(int(link.fuser.gates.sum()) for link in self.links)

    @property
    def key(self) -> Hashable:
        """All that decides what a fused cache holds, but for the text."""
        links = (
            (link.reader_key, id(link.fuser), link.fuser.gates.tobytes()) for link in self.links
        )
        return (*links, self.order)


@dataclass
class Times:
    """Seconds of work on one job, without those in which others had their turn."""

    align: float = 0.0
    sharer: float = 0.0
    receiver: float = 0.0
    fuse: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A conversation as the models will read it."""

    lm: LanguageModel  # who answers
    messages: Messages
    ids: list[int]
    room: int  # tokens that an answer may have
    aligned: Sequence[TokenAlignment] = ()  # one per link; none: nobody else reads it
    thoughts: int = 0  # tokens that may come before the answer, of a model that may think
    is_thinking: bool = False  # whether it ends within thoughts

    @property
    def positions(self) -> int:
        """Of the longest of the texts."""
        return max(len(self.ids), *(len(text.sharer_ids) for text in self.aligned), 0)


@dataclass(frozen=True)
class Reading:
    """A prompt that has been read and waits to be answered."""

    prompt: Prompt
    state: State
    key: Hashable  # under which the state can be kept
    cached: int  # positions that had been read before

    @property
    def cache(self) -> kv.Cache:
        """All of the prompt but its last id."""
        return self.state.cache


def prepare(team: Team, mode: Mode, messages: Messages, times: Times) -> Prompt:
    """Renders, tokenises and aligns; no model runs.

    Raises:
        C2CError: if a template refuses the messages, or a model's context has no room for them.
    """
    tic = time.perf_counter()
    lm = team.answering(mode)
    aligned: Sequence[TokenAlignment] = ()
    if mode == "c2c":
        aligned = align_to_each(messages, lm, team.links, team.sharers)
        ids = aligned[0].receiver_ids
    else:
        ids = tokenize(render(messages, lm.tokenizer), lm.tokenizer)
    times.align += time.perf_counter() - tic
    if not ids:
        raise C2CError(f"the chat template of {lm.name} makes nothing of this conversation")
    room = room_for(lm, ids)
    for sharer, text in zip(team.sharers, aligned, strict=False):
        needed = room_for(sharer, text.sharer_ids)
        room = min(room, needed) if team.fuse_response else room  # it reads the answer, too
    is_thinking = thoughts.begins_thinking(lm.tokenizer, ids)
    # A budget is memory that nobody else gets: none where the template has turned thoughts off.
    may_think = thoughts.marks(lm.tokenizer) and not thoughts.has_thought(lm.tokenizer, ids)
    budget = thoughts.BUDGET if may_think else 0
    return Prompt(lm, messages, ids, room, aligned, budget, is_thinking)


def read(
    team: Team, prompt: Prompt, caches: Caches, times: Times
) -> Generator[Wait, None, Reading]:
    """Lets the models read a prompt, but for what they have read before.

    It stops after every slice, so that others can have their turn. Fusing is one step: a message
    gate looks at the whole of its message.
    """
    if prompt.aligned:
        return (yield from _read_fused(team, prompt, caches, times))
    ids, key = prompt.ids[:-1], id(prompt.lm.model)
    reader = caches.take(key, ids)
    if not isinstance(reader, Reader):
        reader = Reader(prompt.lm.model)
    cached = still_read(reader, ids)
    seconds = yield from _extend(reader, ids)
    if prompt.lm is team.receiver:
        times.receiver += seconds
    else:
        times.sharer += seconds
    return Reading(prompt, reader, key, cached)


def _read_fused(
    team: Team, prompt: Prompt, caches: Caches, times: Times
) -> Generator[Wait, None, Reading]:
    ids = prompt.ids[:-1]
    fused = caches.take(team.key, ids)
    if not isinstance(fused, FusedCache):
        fused = FusedCache(*team.links, order=team.order)
    for sharer, text in zip(fused.sharers, prompt.aligned, strict=True):
        reach = int(text.index[: len(ids)].max(initial=-1)) + 1
        if isinstance(sharer, RemoteReader):
            sharer.extend(text.sharer_ids[:reach])  # which goes on while the receiver reads
        else:
            times.sharer += yield from _extend(sharer, text.sharer_ids[:reach])
    times.receiver += yield from _extend(fused.own, ids)
    tic = time.perf_counter()
    for sharer in fused.sharers:
        while isinstance(sharer, RemoteReader) and not sharer.wait(0):
            yield "others"
    times.sharer += time.perf_counter() - tic
    fused.extend(prompt.aligned)
    assert fused.last is not None
    times.fuse += fused.last.fuse_s
    return Reading(prompt, fused, team.key, fused.last.start)


def _extend(reader: Reader, ids: Sequence[int]) -> Generator[Wait, None, float]:
    """Has one model read on; returns the seconds that it took."""
    seconds, step = 0.0, device.prefill_slice()
    kept = still_read(reader, ids)
    for stop in [*range(kept + step, len(ids), step), len(ids)]:
        tic = time.perf_counter()
        reader.extend(ids[:stop])
        seconds += time.perf_counter() - tic
        yield "read"
    return seconds


def still_read(reader: Reader, ids: Sequence[int]) -> int:
    """How many of the ids a reader need not read again; state can't be rolled back."""
    kept = common_prefix(reader.ids, ids)
    return 0 if kv.has_state(reader.cache) and kept < len(reader.ids) else kept


def position_nbytes(team: Team, mode: Mode) -> int:
    """Bytes that one position of a conversation takes where its caches are kept."""
    models = [team.answering(mode).model]
    if mode == "relay":
        models.append(team.sharers[0].model)
    elif mode == "c2c":  # the receiver's own and the fused one
        readers = {link.reader_key: link.sharer for link in team.links}
        models += [team.receiver.model, *readers.values()]
    return sum(map(kv.position_nbytes, models))


def room_for(lm: LanguageModel, ids: Sequence[int]) -> int:
    """Tokens that an answer may have."""
    if (room := lm.context_length - len(ids)) < 1:
        raise TooLong(
            f"the conversation is {len(ids)} tokens long, but {lm.name} reads at most "
            f"{lm.context_length}: shorten it"
        )
    return room
