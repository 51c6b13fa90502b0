"""Training of a pair's fuser beside its conversation, in the inference thread, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import (
    EngineEvent,
    Finished,
    TrainingBegun,
    TrainingOver,
    TrainingStep,
    Trial,
)
from c2c_mlx.fusers import disk, trained
from c2c_mlx.models import registry
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.progress import Progress
from c2c_mlx.talk.explain import explain
from c2c_mlx.talk.opening import open_session
from c2c_mlx.training import checkpoints, plan, recipe, verdict
from c2c_mlx.training.assemble import assemble
from c2c_mlx.training.run import BESIDE, described
from c2c_mlx.training.trainer import Trainer

_LONGEST = 60  # tokens of a trial's answer
_BETWEEN = 180  # seconds from one trial to the next, at most, where evaluations are far between
_PER_CHAT = 2  # seconds of a run for each chat that is read of a source, at most


class _Stopped(Exception):
    """Leaves what comes before the first step."""


@dataclass(frozen=True)
class Course:
    """Where a pair's training goes.

    Attributes:
        out: the run's folder.
        step: of its latest checkpoint.
        steps: of the whole run; 0: it has no checkpoint.
    """

    out: Path
    step: int = 0
    steps: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it can go on, if only for its verdict."""
        return self.step < self.steps or not (self.out / verdict.FILE).exists()


def latest(receiver: str, sharer: str) -> Course | None:
    """The pair's latest run in the cache, if it left a checkpoint.

    Raises:
        C2CError: if that is damaged.
    """
    runs = trained.runs(receiver, sharer)
    there = checkpoints.all_of(runs[-1]) if runs else []
    if not there:
        return None
    return Course(runs[-1], int(there[-1].name), int(checkpoints.settings_in(there[-1])["iters"]))


def outlook(pair: Pair) -> dict[str, str]:
    """What there is for a pair beside its fuser, as `Loaded` says it."""
    if len(pair.sharers) != 1:
        return {}
    receiver, sharer = pair.receiver, pair.sharers[0]
    found = {"reverse": registry.find_fuser(sharer, receiver) or ""}
    with suppress(C2CError):  # a damaged run is told when it is to go on
        course = latest(receiver, sharer)
        if course and course.is_open and not checkpoints.is_going_on(course.out):
            found["unfinished"] = f"step {course.step} of {course.steps}"
    return found


def teach(
    pair: Pair,
    models: tuple[LanguageModel, LanguageModel],
    seconds: float,
    tell: Callable[[EngineEvent], None],
    question: Callable[[], str],
    stopped: Callable[[], bool],
) -> Iterator[None]:
    """Trains a fuser, or goes on with the pair's latest run if that was stopped.

    Args:
        pair: with one sharer.
        models: the receiver and the sharer.
        seconds: that a new run may take; half of it at least is for training.
        tell: gets the events.
        question: what each trial asks; empty: nothing.
        stopped: asked between steps; then everything is saved.

    Yields:
        After each step, so that something else can come between.

    Raises:
        C2CError: if there is nothing to learn from, or it does not fit.
    """
    receiver, sharer = pair.receiver, pair.sharers[0]
    course = latest(receiver, sharer)
    watcher = _Watcher(tell, stopped)
    try:
        if course and course.is_open:
            trainer, description = _gone_on(course.out, models, watcher)
        else:
            trainer, description = _begun(pair, models, seconds, watcher)
    except _Stopped:
        tell(TrainingOver(0, 0))
        return
    steps = trainer.config.iters
    tell(TrainingBegun(description, trainer.step, steps))
    yield None
    began, before, gates = time.monotonic(), trainer.step, 0
    tried = began
    for made in trainer.steps(stopped):
        if isinstance(made, float):
            # Time for other things counts, too: it is when this will end.
            left = (time.monotonic() - began) / (trainer.step - before) * (steps - trainer.step)
            tell(TrainingStep(trainer.step, steps, made, left, gates))
            yield None
            continue
        gates = int(made["gates_open"])
        is_saved = trainer.step % trainer.config.eval_every == 0
        is_due = is_saved or time.monotonic() - tried > _BETWEEN
        if is_due and (asked := question()) and not stopped():
            if not is_saved:
                trainer.save_fuser(trainer.folder)
            try:
                text = _tried(pair, models, trainer.folder, asked, stopped)
            except Exception as e:  # an answer less, not the run
                text = explain(e)
            tell(Trial(trainer.step, asked, text))
            tried = time.monotonic()
    mx.clear_cache()
    tell(TrainingOver(trainer.step, steps, str(trainer.verdict.get("verdict", ""))))


def _begun(
    pair: Pair,
    models: tuple[LanguageModel, LanguageModel],
    seconds: float,
    watcher: _Watcher,
) -> tuple[Trainer, str]:
    """A new run that ends in time, on the recipe that c2c-train would take; and its plan."""
    receiver, sharer = pair.receiver, pair.sharers[0]
    name, line = recipe.default()
    watcher.say(line)
    values: dict[str, Any] = {
        # Chats that it has no time for would only have to be read and answered.
        "rows": max(int(seconds / _PER_CHAT), 1),
        **recipe.read(name),
        **{"sharer": sharer, "receiver": receiver, "out": str(checkpoints.place(receiver, sharer))},
    }
    for length in ("iters", "time"):
        values.pop(length, None)
    run = described(values)
    deadline = time.monotonic() + seconds
    trainer = assemble(
        run, watcher, resume=False, source="c2c-chat", deadline=deadline, models=models
    )
    recipe.write(trainer.folder / recipe.FILE, values | {"time": f"{seconds:.0f}s"})
    # What is measured on has to be answered first, however long that takes.
    deadline = max(deadline, time.monotonic() + seconds / 2)
    tell = partial(watcher.count, "trying ten steps")
    pace = plan.fit(trainer, deadline, set(values), tell=tell)
    data, *lines, _ = plan.lines(plan.describe(run, trainer, pace))
    return trainer, "\n".join([*lines, data])  # what is long, and known, goes last


def _gone_on(
    out: Path, models: tuple[LanguageModel, LanguageModel], watcher: _Watcher
) -> tuple[Trainer, str]:
    """A run that was stopped, as it was told when it began."""
    values = recipe.read(str(out / recipe.FILE)) | {"out": str(out)}
    fixed = set(values)
    values = {name: value for name, value in values.items() if name not in BESIDE}
    run = plan.as_planned(described(values), fixed)
    trainer = assemble(run, watcher, resume=True, source="c2c-chat", models=models)
    return trainer, f"goes on at step {trainer.step} of {trainer.config.iters}"


def _tried(
    pair: Pair,
    models: tuple[LanguageModel, LanguageModel],
    folder: Path,
    question: str,
    stopped: Callable[[], bool],
) -> str:
    """C2C's answer by the fuser that was just saved: the one that learns keeps its precision."""
    session = open_session(
        replace(pair, fusers=()),
        models[0],
        [models[1]],
        [disk.load(folder)],
        sampling=SamplingConfig(max_tokens=_LONGEST),
        system=None,
        on_prefill=lambda event: None,
    )
    text = ""
    for event in session.ask(question, "c2c"):
        if stopped():
            session.stop()
        if isinstance(event, Finished):
            text = event.text
    return text


@dataclass(frozen=True)
class _Watcher:
    """Tells how far a run is put together, and leaves it when nobody waits for it any more."""

    tell: Callable[[EngineEvent], None]
    stopped: Callable[[], bool]

    def say(self, line: str) -> None:
        """A line that a person should read."""
        self.loading(Progress(line, 0, 0))

    def loading(self, progress: Progress) -> None:
        """Downloads and conversions."""
        self.check()
        self.tell(progress)

    def count(self, what: str, done: int, total: int) -> None:
        """Something else that takes long."""
        self.loading(Progress(what, done, total))

    def check(self) -> None:
        """Raises what `teach` waits for."""
        if self.stopped():
            raise _Stopped
