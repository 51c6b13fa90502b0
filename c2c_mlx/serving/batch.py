"""One model's answers, written together: a token of each per step, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step

from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Reason
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.serving.answer import Answer, sampler
from c2c_mlx.serving.job import Piece, Wait
from c2c_mlx.serving.reading import Reading, Team
from c2c_mlx.talk.decode import in_float32
from c2c_mlx.text.answer import AnswerAlignment

Tell = Callable[[Answer, Piece], None]


class _Row(NamedTuple):
    answer: Answer
    tell: Tell
    is_kept: bool  # whether what has read the answer is wanted afterwards


class Batch:
    """mlx-lm's continuous batching over the answers of one model.

    Args:
        lm: the model.
        slots: answers at a time, at most.
    """

    def __init__(self, lm: LanguageModel, slots: int) -> None:
        self.lm, self.slots = lm, slots
        self.rows: dict[int, _Row] = {}  # by the number of its sequence
        self._generator = self._start()

    def _start(self) -> BatchGenerator:
        return BatchGenerator(
            in_float32(self.lm.model),
            stop_tokens=[[token] for token in self.lm.tokenizer.eos_token_ids],
            completion_batch_size=self.slots,
            prefill_batch_size=self.slots,
        )

    def write(
        self, reading: Reading, answers: Sequence[Answer], sampling: SamplingConfig, tell: Tell
    ) -> Generator[Wait, None, None]:
        """Writes answers to one prompt, each with random numbers of its own.

        The reading's cache is copied into the batch with the next step. When the generator is
        closed, the answers that are not whole leave the batch.
        """
        ids, n = reading.prompt.ids, len(answers)
        numbers = self._generator.insert(
            [ids[-1:]] * n,
            [sampling.max_tokens] * n,
            [kv.mergeable(reading.cache) for _ in answers],
            [ids[:-1] for _ in answers],
            [sampler(sampling, answer.choice) for answer in answers],
        )
        is_kept = not reading.prompt.aligned  # a fused cache is never gone on from
        rows = (_Row(answer, tell, is_kept) for answer in answers)
        self.rows |= dict(zip(numbers, rows, strict=True))
        try:
            while any(answer.error or not answer.reason for answer in answers):
                if error := next((answer.error for answer in answers if answer.error), None):
                    raise error
                yield "write"
        finally:
            # Once it has begun anew it counts from zero again: a number may be a newcomer's.
            self._remove([number for number, row in self.rows.items() if row.answer in answers])

    def step(self) -> None:
        """One more token of every answer."""
        if not self.rows:
            return
        try:
            _, responses = self._generator.next()
        except Exception as e:
            self.fail(e)
            return
        for response in responses:
            row = self.rows[response.uid]
            try:
                self._take(row, response)
            except Exception as e:  # nobody else's
                row.answer.error = e

    def fail(self, error: Exception) -> None:
        """Begins anew; those who wait for an answer are told why there is none."""
        for row in self.rows.values():
            row.answer.error = error
        self.rows.clear()
        self._generator = self._start()

    def _take(self, row: _Row, response: Any) -> None:
        """One answer's next token."""
        answer, tell, is_kept = row
        piece = answer.add(response.token, response.logprobs, response.finish_reason)
        if answer.reason:
            left = response.prompt_cache, response.all_tokens
            if not response.finish_reason:  # mlx-lm knows nothing of stop strings
                left = self._generator.remove([response.uid], True)[response.uid]
            del self.rows[response.uid]
            if is_kept:
                answer.reader = self._reader(*left)
        tell(answer, piece)

    def _remove(self, numbers: list[int]) -> None:
        self._generator.remove(numbers)
        for number in numbers:
            del self.rows[number]

    def _reader(self, cache: kv.Cache, ids: list[int]) -> Reader:
        reader = Reader(self.lm.model)
        reader.cache, reader.ids = cache, list(ids)
        mx.eval(kv.arrays(cache))  # else it holds on to the whole batch
        return reader


def write_fused(
    team: Team, reading: Reading, answer: Answer, sampling: SamplingConfig, tell: Tell
) -> Generator[Wait, None, None]:
    """Writes one answer that is fused while it is written, which no batch can do."""
    prompt, fused = reading.prompt, reading.state
    assert isinstance(fused, FusedCache)
    alignments = [
        AnswerAlignment(
            text,
            prompt.lm.tokenizer,
            sharer.tokenizer,
            strategy=link.fuser.config.alignment,
        )
        for text, sharer, link in zip(prompt.aligned, team.sharers, team.links, strict=True)
    ]
    steps = generate_step(
        mx.array(prompt.ids[-1:]),
        in_float32(fused.answering(alignments)),
        max_tokens=sampling.max_tokens,
        sampler=sampler(sampling, answer.choice),
        prompt_cache=fused.cache,
    )
    with closing(steps):
        for token, logprobs in steps:
            finish: Reason | None = "length" if len(answer.ids) + 1 == sampling.max_tokens else None
            if token in prompt.lm.tokenizer.eos_token_ids:
                finish = "stop"
            tell(answer, answer.add(token, logprobs, finish))
            if answer.reason:
                return
            yield "write"
