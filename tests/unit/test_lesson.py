"""Training in the inference thread: begun, talked beside, stopped, gone on with, finished, left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from c2c_mlx import Fuser
from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import (
    EngineEvent,
    Failed,
    Finished,
    Loaded,
    TrainingBegun,
    TrainingOver,
    TrainingStep,
    Trial,
    TurnOver,
)
from c2c_mlx.fusers import trained
from c2c_mlx.talk import lesson
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.talk.lesson import latest
from c2c_mlx.training import recipe
from c2c_mlx.training.assemble import assemble
from c2c_mlx.training.checkpoints import all_of, alone_in
from c2c_mlx.training.display import Display
from c2c_mlx.training.run import described

E = TypeVar("E", bound=EngineEvent)
LONG = 3600.0  # seconds; every test ends it before


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so the recipe is the one in the package
    monkeypatch.setattr(lesson, "_PER_CHAT", LONG / 6)  # six chats of each of its sources


@pytest.fixture
def pair(tiny_pair: Pair) -> Pair:
    """Without a fuser."""
    return Pair(tiny_pair.receiver, tiny_pair.sharers)


@pytest.fixture
def open_engine(pair: Pair) -> Iterator[Callable[[], InferenceThread]]:
    engines = []

    def open_engine() -> InferenceThread:
        engines.append(InferenceThread(pair, SamplingConfig(max_tokens=6)))
        engines[-1].start()
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()
        engine.join(timeout=60)
        assert not engine.is_alive()


def until(engine: InferenceThread, last: type[E]) -> tuple[list[EngineEvent], E]:
    seen: list[EngineEvent] = []
    while True:
        seen.append(engine.events.get(timeout=120))
        assert not isinstance(seen[-1], Failed), seen[-1]
        if isinstance(seen[-1], last):
            return seen, seen[-1]


def stopped_run(pair: Pair, tmp_path: Path, eval_every: int = 1, steps: int = 2) -> Path:
    """A run of four steps that was stopped after so many."""
    data = tmp_path / "chats"
    data.mkdir()
    rows = [{"prompt": f"say {i}", "completion": "so"} for i in range(40)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = trained.next_run(pair.receiver, pair.sharers[0])
    values = {
        **{"sharer": pair.sharers[0], "receiver": pair.receiver, "data": [str(data)]},
        **{"out": str(out), "preset": "tiny", "iters": 4, "save_every": 1},
        **{"eval_every": eval_every, "report_every": 1, "answers": 2},
    }
    with Display(4) as display:
        trainer = assemble(described(values), display, resume=False, source="test")
        trainer.run(stopped=lambda: trainer.step == steps)
    recipe.write(out / recipe.FILE, values)
    return out


def test_training_goes_on_beside_the_conversation_until_it_is_stopped(
    open_engine: Callable[[], InferenceThread], pair: Pair
) -> None:
    engine = open_engine()
    engine.train(LONG)
    _, loaded = until(engine, Loaded)
    assert not loaded.links and not loaded.unfinished
    _, begun = until(engine, TrainingBegun)
    assert begun.step == 0 < begun.steps
    heads = [line.partition(":")[0] for line in begun.plan.splitlines()]
    assert heads == ["steps", "time", "memory", "batches", "fuser", "data"]
    until(engine, TrainingStep)
    engine.ask("Who?", ["receiver"])
    between, _ = until(engine, TurnOver)
    assert any(isinstance(e, Finished) for e in between)
    _, step = until(engine, TrainingStep)
    assert step.step > 1 and step.steps == begun.steps and step.loss > 0 and step.left_s > 0
    engine.stop_training()
    _, over = until(engine, TrainingOver)
    assert 0 < over.step < over.steps and not over.is_whole and not over.verdict
    run = trained.latest(pair.receiver, pair.sharers[0])
    assert run and Fuser.load(run).provenance.steps == over.step
    assert (run / recipe.FILE).exists()
    engine.reload(pair)
    _, loaded = until(engine, Loaded)
    assert len(loaded.links) == 1 and loaded.unfinished == f"step {over.step} of {over.steps}"
    engine.train(LONG)
    _, begun = until(engine, TrainingBegun)
    assert (begun.step, begun.steps) == (over.step, over.steps)


def test_a_run_that_was_stopped_is_finished_and_tried_on_the_way(
    open_engine: Callable[[], InferenceThread], pair: Pair, tmp_path: Path
) -> None:
    out = stopped_run(pair, tmp_path)
    engine = open_engine()
    engine.ask("Who wrote it?", ["receiver"])
    _, loaded = until(engine, Loaded)
    assert loaded.unfinished == "step 2 of 4"
    until(engine, TurnOver)
    engine.train(LONG)
    seen, over = until(engine, TrainingOver)
    assert [e.step for e in seen if isinstance(e, TrainingStep)] == [3, 4]
    trials = [e for e in seen if isinstance(e, Trial)]
    assert [(e.step, e.question) for e in trials] == [(3, "Who wrote it?"), (4, "Who wrote it?")]
    assert over.is_whole and "chats" in over.verdict
    assert Fuser.load(out).provenance.steps == 4
    engine.reload(pair)
    _, loaded = until(engine, Loaded)
    assert loaded.links and not loaded.unfinished


def test_a_run_that_is_going_on_elsewhere_is_not_gone_on_with(pair: Pair, tmp_path: Path) -> None:
    out = stopped_run(pair, tmp_path)
    assert lesson.outlook(pair)["unfinished"] == "step 2 of 4"
    with alone_in(out):
        assert "unfinished" not in lesson.outlook(pair)
    assert lesson.outlook(pair)["unfinished"] == "step 2 of 4"


def test_a_finished_run_that_has_no_verdict_gets_it(
    open_engine: Callable[[], InferenceThread], pair: Pair, tmp_path: Path
) -> None:
    out = stopped_run(pair, tmp_path, steps=4)
    (out / "verdict.json").unlink()
    engine = open_engine()
    _, loaded = until(engine, Loaded)
    assert loaded.unfinished == "step 4 of 4"
    engine.train(LONG)
    seen, over = until(engine, TrainingOver)
    assert not [e for e in seen if isinstance(e, TrainingStep)]
    assert over.is_whole and "chats" in over.verdict
    engine.reload(pair)
    _, loaded = until(engine, Loaded)
    assert loaded.links and not loaded.unfinished


def test_the_question_is_tried_between_evaluations_that_are_far_between(
    open_engine: Callable[[], InferenceThread],
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped_run(pair, tmp_path, eval_every=4)
    monkeypatch.setattr(lesson, "_BETWEEN", 0)
    engine = open_engine()
    engine.ask("Who wrote it?", ["receiver"])
    until(engine, TurnOver)
    engine.train(LONG)
    seen, _ = until(engine, TrainingOver)
    assert [e.step for e in seen if isinstance(e, Trial)] == [3, 4]


def test_a_question_that_cannot_be_answered_costs_a_trial_and_not_the_run(
    open_engine: Callable[[], InferenceThread], pair: Pair, tmp_path: Path
) -> None:
    out = stopped_run(pair, tmp_path)
    engine = open_engine()
    engine.ask("so " * 1000, ["c2c"])  # more than the models can read
    while not isinstance(engine.events.get(timeout=120), TurnOver):
        pass
    engine.train(LONG)
    seen, over = until(engine, TrainingOver)
    tried = [e.text for e in seen if isinstance(e, Trial)]
    assert tried and all("reads at most 512" in text for text in tried) and over.is_whole
    assert Fuser.load(out).provenance.steps == 4


def test_training_that_was_stopped_before_its_turn_never_begins(
    open_engine: Callable[[], InferenceThread], pair: Pair
) -> None:
    engine = open_engine()  # loads, and looks at nothing else meanwhile
    engine.train(LONG)
    engine.stop_training()
    engine.reload(pair)
    engine.train(LONG)
    seen, _ = until(engine, TrainingBegun)  # the second one
    assert TrainingOver(0, 0) in seen


def test_leaving_keeps_what_was_learned(
    open_engine: Callable[[], InferenceThread], pair: Pair, tmp_path: Path
) -> None:
    engine = open_engine()
    engine.train(LONG)
    until(engine, TrainingStep)
    engine.close()
    engine.join(timeout=60)
    course = latest(pair.receiver, pair.sharers[0])
    assert course and course.is_open and course.step > 0
    assert all_of(course.out)[-1].name == f"{course.step:07d}"
    assert Fuser.load(course.out).provenance.steps == course.step


def test_leaving_before_the_first_step_leaves_nothing_to_go_on_with(
    open_engine: Callable[[], InferenceThread], pair: Pair
) -> None:
    engine = open_engine()
    until(engine, Loaded)
    engine.train(LONG)
    engine.close()
    engine.join(timeout=60)
    assert latest(pair.receiver, pair.sharers[0]) is None


def test_what_cannot_be_trained_is_said_and_over(
    open_engine: Callable[[], InferenceThread], pair: Pair
) -> None:
    engine = open_engine()
    until(engine, Loaded)
    engine.train(0.5)
    failed = None
    while not isinstance(event := engine.events.get(timeout=120), Failed):
        over = event
    failed = event
    assert over == TrainingOver(0, 0) and "--time" in failed.message
    engine.ask("Who?", ["receiver"])
    until(engine, TurnOver)
