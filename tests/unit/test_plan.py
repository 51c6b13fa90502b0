"""Plans: how long a run takes, and a run that is made for a given time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest

from c2c_mlx.commands import train
from c2c_mlx.config import TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.training import plan
from c2c_mlx.training.assemble import assemble
from c2c_mlx.training.batch import collate
from c2c_mlx.training.checkpoints import all_of, settings_in
from c2c_mlx.training.display import Display
from c2c_mlx.training.plan import Pace
from c2c_mlx.training.run import RunConfig

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PAIR = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]
SMALL = ["--batch-size", "4", "--preset", "tiny"]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    rows = [{"prompt": f"say {i}" + " please" * (i % 9), "completion": "so"} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(folder / "fuser.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


# --- how many steps


@pytest.mark.parametrize("seconds", [30, 600, 7200])
def test_the_longest_run_that_ends_in_time(seconds: float) -> None:
    pace = Pace(step=0.5, evaluation=3.0, answer=0.1, peak_gb=0)
    config = plan.fitted(TrainConfig(), seconds, pace, set())
    assert pace.seconds(config) <= seconds
    assert pace.seconds(replace(config, iters=config.iters + 1)) > seconds
    assert config.save_every <= max(config.iters / 3, 1)
    assert pace.evaluation * config.iters / config.eval_every <= max(seconds / 3, 3)


def test_a_time_is_shared_with_the_twin() -> None:
    alone = Pace(step=0.5, evaluation=3.0, answer=0.1, peak_gb=0)
    both = replace(alone, twin=replace(alone, step=0.4))
    config = plan.fitted(TrainConfig(), 600, both, set())
    twin = replace(config, answers=0)
    assert both.twin is not None
    seconds = alone.seconds(config) + both.twin.seconds(twin) + alone.evaluation
    assert both.seconds(config) == pytest.approx(seconds) and seconds <= 600
    assert config.iters < 0.6 * plan.fitted(TrainConfig(), 600, alone, set()).iters


def test_a_time_is_not_spent_on_evaluations() -> None:
    pace = Pace(step=1.0, evaluation=60.0, answer=0.0, peak_gb=0)
    config = plan.fitted(TrainConfig(), 180, pace, set())
    assert config.eval_every == config.iters == 100 and config.save_every == 25


def test_what_was_given_stays() -> None:
    pace = Pace(step=1.0, evaluation=0.0, answer=0.0, peak_gb=0)
    config = plan.fitted(TrainConfig(eval_every=7), 100, pace, {"eval_every"})
    assert (config.iters, config.eval_every, config.save_every) == (100, 7, 25)


def test_a_time_for_no_step_is_refused() -> None:
    with pytest.raises(C2CError, match="a single step with its evaluation takes 9 s"):
        plan.fitted(TrainConfig(), 3, Pace(step=5.0, evaluation=3.0, answer=0.1, peak_gb=0), set())


def test_a_chat_is_prefilled_once_where_it_is_kept() -> None:
    pace = Pace(1.0, 0.0, 0.0, 0, first=20, chat=0.5, new=lambda n: min(n, 100))
    config = TrainConfig(iters=50, batch_size=4)
    assert pace.seconds(config) == 50 + 20 + 100 * 0.5
    assert pace.seconds(replace(config, iters=10)) == 10 + 20 + 40 * 0.5


# --- the commands


def test_a_plan_is_told_and_nothing_is_made(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "run"
    given = [*PAIR, *SMALL, "--data", str(chats), "--out", str(out), "--iters", "50", "--plan"]
    assert train.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["chats"], found["valid_chats"], found["steps"]) == (36, 4, 50)
    assert found["epochs"] == pytest.approx(50 * 4 / 36) and found["step_s"] > 0
    assert found["hours"] * 3600 > 50 * found["step_s"] and found["memory"]["total_gb"] > 0
    assert found["fuser_parameters"] > 0 and found["out"] == str(out)
    assert train.main(given) == 0
    heads = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert heads == ["data", "steps", "time", "memory", "batches", "fuser", "out"]
    assert found["batches"].startswith("batches: 4 chats at a time") and found["batch_size"] == 4
    assert not out.parent.exists()


def test_a_probe_leaves_no_trace(chats: Path, tmp_path: Path) -> None:
    """Neither in the fuser and what is drawn, nor in the noise and the moments."""
    shape = {"dropout": 0.1}
    fixed = TrainConfig(batch_size=4)
    made, told = [], []
    for name in ("probed", "plain"):
        run = RunConfig(
            *(str(TINY / "sharer"), str(TINY / "receiver"), (str(chats),), str(tmp_path / name)),
            preset="tiny",
            fuser_config=shape,
            train=fixed if name == "probed" else plan.with_iters(fixed, 14, set()),
        )
        with Display(14) as display:
            trainer = assemble(run, display, resume=False, source="test")
        if name == "probed":
            pace = plan.probe(trainer, tell=lambda *far: told.append(far))
            assert told == [(0, 10), *((i, 10) for i in range(10))]
            assert pace.step > 0 and pace.evaluation > 0 and trainer.step == 0
            trainer.begin(plan.with_iters(trainer.config, 14, set()))
        trainer.run()
        made.append((weights(tmp_path / name), trainer.settings, trainer.verdict))
    (a, *rest), (b, *others) = made
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert rest == others


def test_a_probe_evaluates_as_the_run_does(chats: Path, tmp_path: Path) -> None:
    """A small fuser's run measures more than losses, on chats of every source."""
    run = RunConfig(
        *(str(TINY / "sharer"), str(TINY / "receiver"), (str(chats),), str(tmp_path / "run")),
        preset="tiny",
        train=TrainConfig(batch_size=2),
    )
    with Display(14) as display:
        trainer = assemble(run, display, resume=False, source="test")
    evaluate, measured = trainer.evaluate, []

    def seen(part: Any) -> Any:
        measured.append(part)
        return evaluate(part)

    trainer.evaluate = seen
    plan.probe(trainer)
    assert measured == [[trainer.valid[0], trainer.valid[2]]] and len(trainer.valid) == 4
    assert trainer.evaluate(measured[0]) != evaluate()


@pytest.mark.parametrize("twin", [False, True])
def test_a_probe_tells_what_its_steps_take(chats: Path, tmp_path: Path, twin: bool) -> None:
    run = RunConfig(
        *(str(TINY / "sharer"), str(TINY / "receiver"), (str(chats),), str(tmp_path / "run")),
        preset="tiny",
        train=TrainConfig(batch_size=2),
    )
    with Display(14) as display:
        trainer = assemble(run, display, resume=False, source="test")
    mx.eval(mx.zeros(50_000_000))
    pace = plan.probe(trainer, twin)
    assert 0 < (pace.twin or pace).peak_gb <= pace.peak_gb < 0.2


def test_a_probe_sees_which_prefills_are_kept(chats: Path, tmp_path: Path) -> None:
    """A run that found those of its first steps planned for as many more as it had no time for."""
    run = RunConfig(
        *(str(TINY / "sharer"), str(TINY / "receiver"), (str(chats),), str(tmp_path / "run")),
        preset="tiny",
        train=TrainConfig(batch_size=4, prefill_cache=str(tmp_path / "kept")),
    )
    with Display(14) as display:
        trainer, again = (
            assemble(replace(run, out=str(tmp_path / name)), display, resume=False, source="test")
            for name in ("run", "again")
        )
    pace = plan.probe(trainer)
    assert pace.chat > 0 and pace.first > 0
    assert [pace.new(n) for n in (4, 36, 400)] == [4, 36, 36]
    for rows in ([e] for e in trainer.train.some(99, 0)):
        trainer.prefills(collate(rows, trainer.c2c.fuser.config.positions))
    pace = plan.probe(again)
    assert (pace.new(400), pace.chat, pace.first) == (0, 0, 0) and pace.step > 0


def test_a_timed_run_that_is_resumed_keeps_its_length(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*PAIR, *SMALL, "--data", str(chats), "--out", str(tmp_path / "run")]
    assert train.main([*given, "--iters", "14"]) == 0
    assert settings_in(all_of(tmp_path / "run")[-1])["iters"] == 14
    capsys.readouterr()
    assert train.main([*given, "--time", "2h", "--resume"]) == 0
    assert "finished already: 14 steps" in capsys.readouterr().err


def test_a_timed_run_that_is_resumed_keeps_its_evaluations_and_answers(
    chats: Path, tmp_path: Path
) -> None:
    run = RunConfig(
        *(str(TINY / "sharer"), str(TINY / "receiver"), (str(chats),), str(tmp_path / "run")),
        preset="tiny",
        train=TrainConfig(batch_size=4),
    )
    with Display(14) as display:
        trainer = assemble(run, display, resume=False, source="test")
        slow = Pace(step=1.0, evaluation=60.0, answer=1.0, peak_gb=0)
        trainer.begin(plan.fitted(trainer.config, 100, slow, set()))
        trainer.run(stopped=lambda: trainer.step == 2)
        planned = trainer.config
        assert (planned.eval_every, planned.answers) == (planned.iters, 10)
        assert plan.as_planned(run, set()).train == planned
        given = replace(run, train=replace(run.train, answers=3))
        assert plan.as_planned(given, {"answers"}).train == replace(planned, answers=3)
        assert assemble(given, display, resume=True, source="test").step == 2
    state = all_of(tmp_path / "run")[-1] / "state.json"
    written = json.loads(state.read_text())
    for name in ("report_every", "eval_every", "save_every", "answers", "keep_checkpoints"):
        del written["settings"][name]  # as an earlier version wrote it
    state.write_text(json.dumps(written))
    earlier = plan.as_planned(run, set())
    assert earlier.train == plan.with_iters(run.train, planned.iters, set())
    with Display(14) as display:
        assert assemble(earlier, display, resume=True, source="test").step == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--time", "soon"], "--time soon: give hours, minutes or seconds"),
        (["--time", "15"], "as in 2h, 15m or 1h30m"),
        (["--time", "1.2.3h"], "--time 1.2.3h: give hours"),
        (["--time", "1h", "--iters", "3"], "leave --iters out, or --time"),
        (["--json"], "--json is for --plan"),
        (["--plan", "--resume"], "--plan is for a run that has not begun"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], chats: Path, given: list[str], words: str
) -> None:
    assert train.main([*PAIR, "--data", str(chats), "--out", "o", *given]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("2h", 7200), ("1h30m", 5400), ("0.5h", 1800), ("1h 10s", 3610)],
)
def test_times_are_written_so(text: str, seconds: Any) -> None:
    assert train._seconds(text) == seconds
