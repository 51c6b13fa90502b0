"""A run's rows, answered by one of its models as far as the run has time for that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from c2c_mlx.models import memory
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.models.sizes import ModelSize
from c2c_mlx.training.answers import BATCH, answer_rows, unanswered
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.layouts import said
from c2c_mlx.training.run import RunConfig

SHARE = 1 / 3  # of a given time, at most


class Answered(NamedTuple):
    """Rows that all have an answer.

    Attributes:
        parts: what each source is left with; nothing, if there was no time for it.
        valid: what is only measured.
        seconds: of a dry run: how long the answers will take that were not given.
    """

    parts: list[list[ChatRow]]
    valid: list[ChatRow]
    seconds: float = 0.0


def answered(
    run: RunConfig,
    parts: list[list[ChatRow]],
    valid: list[ChatRow],
    models: tuple[LanguageModel, LanguageModel],
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
    *,
    resume: bool,
    dry: bool,
    deadline: float | None,
    room: int,
) -> Answered:
    """Answers rows that have no answer, those that are measured first.

    Args:
        run: says who answers, where answers are kept, and how long a prompt may be; longer ones are
            left out.
        parts: the rows of each source.
        valid: rows that are only measured.
        models: receiver and sharer.
        progress: called with answers known and wanted.
        say: told what is left out, but for the time.
        resume: a run goes on with the answers that it had.
        dry: one batch is answered, to know how long it takes, and one of those that are measured;
            the rest gets words of that length.
        deadline: of the run, on the clock of `time.monotonic`; of what is left until then `SHARE`
            is for answers, and rows that are left without one are left out.
        room: bytes that answering may take beside the models.
    """
    if not run.answer_with:
        return Answered(parts, valid)
    own = run.answer_with == "receiver"
    lm = models[0] if own else models[1]
    path = run.folder / f"answers-{run.answer_with}.jsonl"
    no_more = resume and path.exists()
    longest = run.train.max_tokens
    at_once = partial(memory.answers_at_once, ModelSize.read(lm.path), room)

    def answer(rows: list[ChatRow], until: float) -> list[ChatRow]:
        until = 0 if no_more else until
        kept = path, run.answer_tokens, own
        return answer_rows(rows, lm, *kept, progress, until, longest, say, at_once)

    everything = [row for rows in parts for row in rows]
    began = time.monotonic()
    until = math.inf if deadline is None else began + SHARE * (deadline - began)
    # The first batch whatever it takes; all of a large valid.jsonl could take the rows' time.
    valid, more = answer(valid[:BATCH], math.inf), valid[BATCH:]
    valid += _filled(more, run.answer_tokens) if dry else answer(more, (began + until) / 2)
    left_for_rows = until - time.monotonic()
    if not dry or left_for_rows <= 0:  # then a run answers no more either
        answer(everything, until)
        return Answered([answer(rows, 0) for rows in parts], valid)
    there = {row.where for row in answer(everything, 0)}
    left = [row for row in everything if row.where not in there]
    some = left[:: math.ceil(len(left) / BATCH)] if left else []
    began = time.monotonic()
    answer(some, math.inf)
    each = (time.monotonic() - began) / max(len(some), 1)
    seconds = min(each * (len(left) - len(some) + unanswered(more)), left_for_rows)
    return Answered([_filled(rows, run.answer_tokens) for rows in parts], valid, seconds)


def _filled(rows: list[ChatRow], tokens: int) -> list[ChatRow]:
    """The rows, with some answer of that length where there is none."""
    words = said("assistant", "so" + " so" * (tokens - 1))
    return [
        replace(row, messages=[*row.messages, words], cut=True) if unanswered([row]) else row
        for row in rows
    ]
