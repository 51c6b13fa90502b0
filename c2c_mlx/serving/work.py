"""A job at work: its messages become a prompt, the prompt caches, and the caches answers."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import c2c_mlx.blas  # noqa: F401

from c2c_mlx.config import SamplingConfig
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.serving.answer import Answer
from c2c_mlx.serving.batch import Batch, write_fused
from c2c_mlx.serving.caches import Caches
from c2c_mlx.serving.job import CacheJob, Done, Ended, Job, Piece, Wait
from c2c_mlx.serving.reading import Prompt, Reading, Team, Times, prepare, read
from c2c_mlx.serving.sharing import check, share
from c2c_mlx.talk import relay
from c2c_mlx.talk.crossed import Crossing, Decoded

_GROWTH = 256  # positions by which mlx-lm's caches grow


@dataclass(frozen=True)
class Desk:
    """What all works share."""

    team: Team
    caches: Caches
    batches: Mapping[int, Batch]  # by the model that writes in it


@dataclass(eq=False)
class Work:
    """A job at work.

    Attributes:
        job: what is to be done.
        arrived: when it was asked for.
        prompt: the first one that is read.
        sampling: of its answers.
        thoughts: tokens that may come before one of its texts.
        times: what it has taken so far.
        steps: does all of it, and stops wherever others may have their turn.
        wait: what it does next.
    """

    job: Job
    arrived: float
    prompt: Prompt
    sampling: SamplingConfig
    thoughts: int
    times: Times
    steps: Generator[Wait, None, None] = field(init=False)
    wait: Wait = "read"
    began: float = 0.0
    due: int = 0  # in slices of all prompts: by when its own would be read if it were alone
    first: float = 0.0  # when the first token of an answer was there
    prompt_tokens: int = 0
    cached_tokens: int = 0
    relayed: Answer | None = None
    answers: list[Answer] = field(default_factory=list)
    crossed: tuple[tuple[str, float], ...] | None = None

    @property
    def positions(self) -> int:
        """Of the longest text that a model will have read and written at the end."""
        positions = self.prompt.positions + self.thoughts + self.sampling.max_tokens
        if self.job.mode == "relay":  # it stands in the receiver's prompt, too
            positions += 2 * relay.BACKGROUND_TOKENS
        return math.ceil(positions / _GROWTH) * _GROWTH

    def done(self, gates_open: int) -> Done:
        """What all of it has cost."""
        now, relayed = time.perf_counter(), self.relayed
        return Done(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(len(answer.ids) for answer in self.answers),
            gates_open=gates_open if self.job.mode == "c2c" else 0,
            relayed_text=relayed.text.strip() if relayed else "",
            relayed_tokens=len(relayed.ids) if relayed else 0,
            crossed=self.crossed,
            queued_s=self.began - self.arrived,
            align_s=self.times.align,
            sharer_s=self.times.sharer,
            receiver_s=self.times.receiver,
            fuse_s=self.times.fuse,
            first_token_s=(self.first or now) - self.arrived,
            total_s=now - self.arrived,
        )

    def answers_to(self, desk: Desk) -> Generator[Wait, None, None]:
        """All of a job that wants answers, as `steps`."""
        job, team, prompt = self.job, desk.team, self.prompt
        if job.mode == "relay":
            receiver_room = team.receiver.context_length // 8  # for a text in two vocabularies
            limit = min(relay.BACKGROUND_TOKENS, prompt.room, receiver_room)
            stops, is_thinking = relay.stop_strings(prompt.lm), prompt.is_thinking
            self.relayed = Answer(prompt.lm, job.n, stops, limit=limit, is_thinking=is_thinking)
            yield from self._answer(desk, prompt, [self.relayed], limit)
            told = relay.with_background(job.messages[-1]["content"], self.relayed.text.strip())
            prompt = prepare(team, "relay", [*job.messages[:-1], *told], self.times)
        self.prompt_tokens = len(prompt.ids)
        stops = (*prompt.lm.stop_strings, *job.stop)
        decoded = Decoded(prompt.ids, team.fuse_response) if job.crossed else None
        limit = min(self.sampling.max_tokens, prompt.room)
        self.answers = [
            Answer(prompt.lm, choice, stops, job.top_logprobs, decoded, limit, prompt.is_thinking)
            for choice in range(job.n)
        ]
        yield from self._answer(desk, prompt, self.answers, limit)

    def _answer(
        self, desk: Desk, prompt: Prompt, answers: Sequence[Answer], limit: int
    ) -> Generator[Wait, None, None]:
        """Reads a prompt and has answers to it written, of so many tokens behind thoughts."""
        with_thoughts = min(limit + prompt.thoughts, prompt.room)
        sampling, team = replace(self.sampling, max_tokens=with_thoughts), desk.team
        is_fused, before = prompt.aligned and team.fuse_response, len(prompt.ids) - 1
        for some in [[answer] for answer in answers] if is_fused else [answers]:
            reading = yield from read(team, prompt, desk.caches, self.times)
            if some[0] in self.answers[:1]:  # later ones find what the first one has read
                self.cached_tokens = reading.cached
            if is_fused:
                yield from write_fused(team, reading, some[0], sampling, self._tell_piece)
            else:
                if not self.job.crossed:  # others may go on from here meanwhile
                    desk.caches.put(reading.key, reading.state, before)
                batch = desk.batches[id(prompt.lm.model)]
                yield from batch.write(reading, some, sampling, self._tell_piece)
            if some[0].decoded:
                self.crossed = _crossed(reading, some[0].decoded)
            if is_fused or self.job.crossed:
                desk.caches.put(reading.key, reading.state, before)
            elif some[0].reader:
                desk.caches.put(reading.key, some[0].reader, before)

    def _tell_piece(self, answer: Answer, piece: Piece) -> None:
        if answer is self.relayed:
            return
        if not answer.is_thinking:
            self.first = self.first or time.perf_counter()
        if piece.text or piece.tokens:
            self.job.tell(piece)
        if answer.reason:
            self.job.tell(Ended(answer.choice, answer.reason))


def take_up(job: Job, arrived: float, desk: Desk, defaults: SamplingConfig) -> Work:
    """The job with its prompt in tokens.

    Raises:
        C2CError: if it can't be done.
    """
    times, messages = Times(), job.messages
    if isinstance(job, CacheJob):
        prompt = check(desk.team.receiver, job)
        work = Work(job, arrived, prompt, replace(defaults, max_tokens=1), 0, times)
        work.steps = share(job, prompt, desk.caches)
        return work
    prompt = answered = prepare(desk.team, job.mode, messages, times)
    if job.mode == "relay":
        question = relay.background_message(messages[-1]["content"])
        messages = relay.prompt(desk.team.sharers[0], [*messages[:-1], question])
        prompt = prepare(desk.team, "sharer", messages, times)
    options = {name: v for name, v in asdict(job.sampling).items() if v is not None}
    sampling = replace(defaults, **options)
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, answered.room))
    left = answered.room - sampling.max_tokens
    thoughts = max(prompt.thoughts, min(answered.thoughts, left))
    work = Work(job, arrived, prompt, sampling, thoughts, times)
    work.steps = work.answers_to(desk)
    return work


def _crossed(reading: Reading, decoded: Decoded) -> tuple[tuple[str, float], ...]:
    """Each token of an answer with what it owes to the sharers, in nats."""
    assert isinstance(reading.state, FusedCache)
    found = Crossing(reading.state).of(decoded, reading.prompt.lm.tokenizer)
    return tuple(zip(found.tokens, found.nats, strict=True))
