"""How long a run takes, from a few steps that leave no trace, and how many end in a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx.config import TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.fuser import parameters
from c2c_mlx.training import checkpoints, fits, measure
from c2c_mlx.training.dataset import WINDOW, Example
from c2c_mlx.training.run import RunConfig
from c2c_mlx.training.trainer import Trainer
from c2c_mlx.training.verdict import ANSWER_TOKENS

PROBE = 10  # steps that are timed
_LOOKED_FOR = 64  # chats of which one sees how many are kept
_ANSWERED = 4  # tokens of an answer that are timed
_ANSWERING = 0.1  # of a given time, at most, is for the verdict's answers
_EVALUATING = 0.25  # of a given time, at most, is for evaluations; there is always one
_EVALUATIONS = 4  # of a run that is too short for the usual rhythm
_PLANNED = ("answers", "eval_every", "save_every")  # beside the steps, of a run in a given time


@dataclass(frozen=True)
class Pace:
    """Seconds that things take on this machine.

    Attributes:
        step: one optimiser step, on average.
        evaluation: one look at all chats that are only measured.
        answer: the verdict's greedy answers to one of them.
        peak_gb: of memory, while this was measured.
        first: what the first evaluation takes beyond that, where prefills are kept.
        chat: the prefills of one chat that a step does not find kept; 0 if none are kept: then
            they are part of a step.
        new: such chats among the first n that are drawn.
        twin: that of a run with nothing to read, if one comes after this.
    """

    step: float
    evaluation: float
    answer: float
    peak_gb: float
    first: float = 0.0
    chat: float = 0.0
    new: Callable[[int], float] = lambda n: 0.0
    twin: Pace | None = None

    def seconds(self, config: TrainConfig) -> float:
        """Of a whole run and its twin; a verdict measures a third more than an evaluation does."""
        evaluations = math.ceil(config.iters / config.eval_every) + 1 / 3
        own = config.iters * self.step + evaluations * self.evaluation + self.first
        own += self.chat * self.new(config.iters * config.batch_size * config.accumulate)
        own += config.answers * self.answer
        if self.twin is None:
            return own
        # It answers nothing, and is measured once more to be compared with.
        return own + self.twin.seconds(replace(config, answers=0)) + self.twin.evaluation


def probe(
    trainer: Trainer, twin: bool = False, tell: Callable[[int, int], None] = lambda i, n: None
) -> Pace:
    """Times steps over batches of all lengths, then puts the trainer back to where it was.

    Args:
        trainer: of a run that has not begun.
        twin: whether the steps of its control are timed as well.
        tell: called before each step with those that are done, and all of them.

    Raises:
        C2CError: if they don't fit into the memory, or the loss is not finite.
    """
    c, fuser, prefills = trainer.config, trainer.c2c.fuser, trainer.prefills
    missing = prefills.missing(trainer.train.some(_LOOKED_FOR, c.seed))
    stream = trainer.train.batches(c.batch_size * c.accumulate, c.seed)
    window = takewhile(lambda drawn: drawn[0][0] == 0, islice(stream, WINDOW))
    drawn = [rows for _, rows in window]
    drawn.sort(key=_columns)
    # The means of ten equal parts: the lengths of batches differ more than anything else does.
    typical = [drawn[int((i + 0.5) * len(drawn) / PROBE)] for i in range(PROBE)]
    before = fuser.parameters()
    mx.reset_peak_memory()  # loading may have taken more
    tell(0, PROBE)
    with trainer.fitting():
        trainer.train_step(trainer.split(drawn[-1]))  # the longest; and a first step is slower
        began, spent, computed = time.perf_counter(), prefills.spent, prefills.computed
        for done, rows in enumerate(typical):
            tell(done, PROBE)
            trainer.train_step(trainer.split(rows))
        spent = prefills.spent - spent
        step = (time.perf_counter() - began - spent) / PROBE
        chat = spent / max(prefills.computed - computed, 1)
        evaluation = answer = first = 0.0
        if trainer.valid:
            part = measure.spread(trainer.valid, c.batch_size)
            began, spent = time.perf_counter(), prefills.spent
            trainer.evaluate(part)
            spent = prefills.spent - spent
            evaluation, first = (
                seconds * len(trainer.valid) / len(part)
                for seconds in (time.perf_counter() - began - spent, spent)
            )
            answer = _answer(trainer) if c.answers else 0.0
    fuser.update(before)
    trainer.begin(c)
    pace = Pace(
        step,
        evaluation,
        answer,
        mx.get_peak_memory() / 1e9,
        first,
        chat,
        lambda drawn: missing * trainer.train.distinct(drawn),
    )
    if not twin:
        return pace
    prefills.zero_sharer = True
    try:
        # It finds kept what the run before it has computed.
        control = replace(probe(trainer, tell=tell), first=0.0, chat=0.0)
        return replace(pace, peak_gb=max(pace.peak_gb, control.peak_gb), twin=control)
    finally:
        prefills.zero_sharer = c.zero_sharer


def _answer(trainer: Trainer) -> float:
    """Seconds for one chat's greedy answers: the prompts, and each token."""
    n = min(trainer.config.batch_size, len(trainer.valid), max(trainer.config.answers, 1))
    times = []
    for tokens in (1, 1 + _ANSWERED):
        began = time.perf_counter()
        trainer.answers(n, tokens)
        times.append(time.perf_counter() - began)
    token = max(times[1] - times[0], 0.0) / _ANSWERED
    return (times[0] + token * (ANSWER_TOKENS - 1)) / n


def fitted(config: TrainConfig, seconds: float, pace: Pace, fixed: set[str]) -> TrainConfig:
    """The longest run that ends in time, its schedule and its evaluations made for that.

    Args:
        config: the run's.
        seconds: that are left.
        pace: of this run on this machine.
        fixed: fields that stay as they are.

    Raises:
        C2CError: if not even one step fits.
    """
    if "answers" not in fixed and pace.answer:
        affordable = int(_ANSWERING * max(seconds, 0) / pace.answer)
        config = replace(config, answers=min(config.answers, affordable))
    evaluations = _EVALUATIONS
    if evaluation := pace.evaluation + (pace.twin.evaluation if pace.twin else 0.0):
        affordable = int(_EVALUATING * max(seconds, 0) / evaluation)
        evaluations = min(max(affordable, 1), _EVALUATIONS)
    low, high = 0, max(int(seconds / pace.step), 1) + 1  # `low` steps fit, `high` don't
    while high - low > 1:
        middle = (low + high) // 2
        if pace.seconds(with_iters(config, middle, fixed, evaluations)) <= seconds:
            low = middle
        else:
            high = middle
    if not low:
        least = pace.seconds(with_iters(config, 1, fixed, evaluations))
        raise C2CError(
            f"--time: {max(seconds, 0):.0f} s are left of it after loading and ten steps of probe, "
            f"and a single step with its evaluation takes {least:.0f} s: give it more"
        )
    return with_iters(config, low, fixed, evaluations)


def with_iters(
    config: TrainConfig, iters: int, fixed: set[str], evaluations: int = _EVALUATIONS
) -> TrainConfig:
    """A run of so many steps, evaluated so often at least, and saved four times; `fixed` stays."""
    parts = {"eval_every": evaluations, "save_every": _EVALUATIONS}
    rhythm: dict[str, Any] = {
        # Where evaluations are dear there are no more of them in a long run.
        name: min(200 if n == _EVALUATIONS else iters, math.ceil(iters / n))
        for name, n in parts.items()
        if name not in fixed
    }
    return replace(config, iters=iters, **rhythm)


def fit(
    trainer: Trainer,
    deadline: float,
    fixed: set[str],
    twin: bool = False,
    tell: Callable[[int, int], None] = lambda i, n: None,
) -> Pace:
    """Gives a run that has not begun the length that ends by `deadline`, for all its processes.

    Args:
        trainer: its `begin` is called.
        deadline: on the clock of `time.monotonic`.
        fixed: fields of its configuration that stay as they are.
        twin: whether its control is to end by then, too.
        tell: see `probe`.

    Raises:
        C2CError: as `probe` and `fitted` do.
    """
    pace = probe(trainer, twin, tell)
    config, is_first = trainer.config, trainer.group.rank() == 0
    if is_first:  # which alone measures and saves; the others have another pace, and may find none
        config = fitted(config, deadline - time.monotonic(), pace, fixed)
    iters = mx.distributed.all_sum(mx.array(config.iters if is_first else 0), group=trainer.group)
    trainer.begin(replace(config, iters=int(iters)))
    return pace


def as_planned(run: RunConfig, fixed: set[str]) -> RunConfig:
    """A run that is resumed, with the steps that were planned for it: others would be another run.

    And with its evaluations and answers, which there was time for; `fixed` stays.

    Raises:
        C2CError: if its checkpoint is damaged.
    """
    there = checkpoints.all_of(run.folder)
    if not there:
        return run
    settings = checkpoints.settings_in(there[-1])
    # Earlier versions wrote the steps alone.
    planned = {n: settings[n] for n in _PLANNED if n in settings and n not in fixed}
    train = with_iters(run.train, int(settings["iters"]), fixed)
    return replace(run, train=replace(train, **planned))


def describe(run: RunConfig, trainer: Trainer, pace: Pace) -> dict[str, Any]:
    """What a run will do, for `--json`; `lines` tells people."""
    c, fuser = trainer.config, trainer.c2c.fuser
    chats = sum(len(s.rows) for s in trainer.train.sources)
    fitted = trainer.fitted
    assert fitted is not None  # it was assembled
    size = sum(p.size for p in parameters(fuser).values())
    return {
        "data": [name for name, _ in run.sources],
        "chats": chats,
        "valid_chats": len(trainer.valid),
        "steps": c.iters,
        "twin": run.twin,
        "chats_per_step": c.batch_size * c.accumulate,
        "epochs": c.iters * c.batch_size * c.accumulate / chats,
        "step_s": pace.step,
        "new_chat_s": pace.chat,
        "evaluation_s": pace.evaluation,
        "answers": c.answers,
        "answer_s": pace.answer,
        "answering_s": trainer.answering,
        "hours": (trainer.answering + pace.seconds(c)) / 3600,
        "memory": fitted.need.record(),
        "probe_peak_gb": pace.peak_gb,
        "batches": fitted.why,
        **{name: getattr(c, name) for name in fits.CHOSEN},
        "prefill_cache_gb": c.prefill_cache_gb if c.prefill_cache else 0.0,
        "fuser_parameters": size,
        "fuser_gb": 2 * size / 1e9,
        "out": run.out,
    }


def lines(plan: dict[str, Any]) -> list[str]:
    """A plan for people."""
    first = plan["answering_s"]
    costs = [f"{plan['step_s']:.2f} s a step"]
    if plan["new_chat_s"]:
        costs.append(f"{plan['new_chat_s']:.2f} s a chat that is not prefilled yet")
    costs.append(f"{plan['evaluation_s']:.1f} s an evaluation")
    if plan["answers"]:
        costs.append(f"{plan['answers']} answers of {plan['answer_s']:.1f} s for the verdict")
    before = f"; {told(first)} before that, for prompts to be answered" if first else ""
    return [
        f"data: {plan['chats']} chats from {', '.join(plan['data'])}; {plan['valid_chats']} more "
        "to measure on",
        f"steps: {plan['steps']} of {plan['chats_per_step']} chats, {plan['epochs']:.1f} times "
        "through the data" + (", and as many for the twin" if plan["twin"] else ""),
        f"time: about {told(3600 * plan['hours'])} ({', '.join(costs)}{before})",
        f"memory: ten steps took {plan['probe_peak_gb']:.1f} GB; the longest chats in one batch, "
        f"and what MLX keeps for reuse, would be about {plan['memory']['total_gb']:.1f} GB of "
        f"{plan['memory']['limit_gb']:.1f} GB",
        plan["batches"],
        f"fuser: {plan['fuser_parameters'] / 1e6:.2f} M parameters, "
        f"{1e3 * plan['fuser_gb']:.1f} MB",
        f"out: {plan['out']}",
    ]


def told(seconds: float) -> str:
    """A time as a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _columns(rows: list[Example]) -> int:
    """What a batch costs, roughly: its longest prompt and answer."""
    return max(len(e.receiver_ids) for e in rows) + max(len(e.response_ids) for e in rows)
