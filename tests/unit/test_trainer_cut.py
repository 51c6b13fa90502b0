"""Runs that are cut: by Ctrl-C, by a full memory, by a loss that is no number; and gone on with."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from trainers import NOISY, RECIPE, Make, run, same, weights

from c2c_mlx import Fuser
from c2c_mlx.errors import C2CError
from c2c_mlx.training import interrupt, verdict
from c2c_mlx.training.assemble import assemble_twin
from c2c_mlx.training.batch import Batch
from c2c_mlx.training.checkpoints import all_of, settings_in
from c2c_mlx.training.dataset import Source
from c2c_mlx.training.display import Display
from c2c_mlx.training.fits import CHOSEN
from c2c_mlx.training.plot import read_reports
from c2c_mlx.training.prefills import Prefills
from c2c_mlx.training.run import RunConfig
from c2c_mlx.training.trainer import Trainer


@pytest.mark.parametrize(
    "options", [NOISY, RECIPE, {"accumulate": 2}, {"prefill_cache": "kept"}], ids=str
)
def test_a_resumed_run_gives_the_same_weights(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = make(tmp_path / "whole", **options)
    before = weights(whole)
    reports = run(whole)
    assert [c.name for c in all_of(tmp_path / "whole")] == ["0000003", "0000006"]

    mx.random.normal((5,))  # whatever else drew numbers in the meantime
    resumed = make(tmp_path / "resumed", **options)
    resumed.resume(all_of(tmp_path / "whole")[0])
    assert resumed.step == 3 and not same(weights(resumed), before)
    again = run(resumed)
    assert same(weights(resumed), weights(whole))
    assert resumed.position == whole.position and resumed.tokens == whole.tokens
    for key in ("valid_loss", "valid_receiver_loss", "learning_rate", "gates_open", "tokens"):
        assert again[-1][key] == reports[-1][key]


def test_ctrl_c_saves_a_checkpoint_that_continues_exactly(make: Make, tmp_path: Path) -> None:
    whole, cut = make(tmp_path / "whole", **NOISY), make(tmp_path / "cut", report_every=1, **NOISY)
    run(whole)

    loss_and_grad = cut._loss_and_grad

    def interrupted(*args: Any) -> Any:  # in the middle of the second step
        if cut.step == 1:
            signal.raise_signal(signal.SIGINT)
        return loss_and_grad(*args)

    cut._loss_and_grad = interrupted
    said: list[str] = []
    with interrupt.noticed(lambda: said.append("stopping")) as stopped:
        cut.run(stopped=stopped)
    assert said == ["stopping"] and not cut.finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Fuser.load(tmp_path / "cut").provenance.steps == 2
    resumed = make(tmp_path / "cut", **NOISY)
    resumed.resume(all_of(tmp_path / "cut")[-1])
    assert resumed.step == 2
    run(resumed)
    assert same(weights(resumed), weights(whole))


def test_a_second_ctrl_c_is_raised_at_once() -> None:
    with interrupt.noticed(lambda: None) as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.001}, "learning_rate was 0.003, is 0.001"),
        ({"batch_size": 2}, "batch_size was 3, is 2"),
        ({"accumulate": 2}, "accumulate was 1, is 2"),
        ({"activation": "silu"}, "fuser_config.activation was gelu, is silu"),
        ({"hidden_dim": 8}, "fuser_config.hidden_dim was 16, is 8"),
        ({"prefill_cache": "kept"}, "prefill_cache was False, is True"),
        ({"seed": 7, "clip": 2.0}, "clip was 1.0, is 2.0, seed was 0, is 7"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run(make(tmp_path, iters=3))
    other = make(tmp_path, **options)
    before = weights(other)
    with pytest.raises(C2CError) as e:
        other.resume(all_of(tmp_path)[-1])
    assert words in str(e.value) and "\n" not in str(e.value)
    assert same(weights(other), before) and other.step == 0


def test_other_chats_or_models_are_not_resumed(make: Make, tmp_path: Path) -> None:
    run(make(tmp_path, iters=3))
    other = make(tmp_path)
    rows = other.train.sources[0].rows
    other.train.sources[0] = Source(rows[:-1], 1.0)
    chats = other.train.fingerprint()
    other.train.sources[0] = Source(rows, 1.0)
    for name, value in (("chats", chats), ("weights of the sharer", "f" * 16)):
        changed = make(tmp_path)
        assert changed.settings[name] != value
        changed.settings[name] = value
        with pytest.raises(C2CError, match=f"other {name}"):
            changed.resume(all_of(tmp_path)[-1])


def test_what_is_told_and_kept_may_change_and_a_run_may_get_longer(
    make: Make, tmp_path: Path
) -> None:
    run(make(tmp_path, iters=3))
    said: list[str] = []
    free = {"report_every": 1, "eval_every": 2, "save_every": 1, "keep_checkpoints": 1}
    longer = make(tmp_path, iters=4, grad_checkpoint=True, say=said.append, **free)
    longer.resume(all_of(tmp_path)[-1])
    assert longer.step == 3 and not longer.finished
    assert said == [
        "grad_checkpoint was False, is True from here on",
        "iters was 3, is 4 from here on",
    ]
    run(longer)
    assert longer.finished and [c.name for c in all_of(tmp_path)] == ["0000004"]


def test_a_finished_run_that_is_resumed_is_finished_and_keeps_its_figures(
    make: Make, tmp_path: Path
) -> None:
    trainer = make(tmp_path)
    reports = run(trainer)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = make(tmp_path)
    again.resume(all_of(tmp_path)[-1])
    assert again.finished and again.measured == reports[-1] and again.best == trainer.best
    assert run(again) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_run_that_is_told_to_end_where_it_stands_gets_its_verdict(
    make: Make, tmp_path: Path
) -> None:
    run(make(tmp_path, iters=3))
    cut = make(tmp_path)
    cut.resume(all_of(tmp_path)[-1])
    cut.run(stopped=lambda: cut.step == 5)
    assert not (tmp_path / verdict.FILE).exists(), "it was of fewer steps"
    short = make(tmp_path, iters=5)
    short.resume(all_of(tmp_path)[-1])
    assert short.finished and not short.judged
    assert run(short) == [] and short.judged
    assert short.verdict == verdict.read(tmp_path)
    provenance = Fuser.load(tmp_path).provenance
    assert (provenance.steps, provenance.verdict) == (5, short.verdict["verdict"])
    assert provenance.metrics["valid_loss"] == short.verdict["valid_loss"]
    again = make(tmp_path, iters=5)
    again.resume(all_of(tmp_path)[-1])
    assert again.measured == short.measured and again.best == short.best


def test_a_damaged_checkpoint_is_named(make: Make, tmp_path: Path) -> None:
    run(make(tmp_path, iters=3))
    (tmp_path / "checkpoints" / "0000003" / "state.json").write_text('{"step": 3}')
    with pytest.raises(C2CError, match=r"0000003: damaged, or of another version"):
        make(tmp_path).resume(all_of(tmp_path)[-1])


FULL = RuntimeError("[metal::malloc] Unable to allocate 17179869184 bytes.")  # MLX's own words

STOPPED = RuntimeError(
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
)


def full_at(trainer: Trainer, step: int, error: RuntimeError = FULL) -> None:
    """The memory is full, or what else the error says, as soon as so many steps are done."""
    loss_and_grad = trainer._loss_and_grad

    def full(*given: Any) -> Any:
        if trainer.step == step:
            raise error
        return loss_and_grad(*given)

    trainer._loss_and_grad = full


@pytest.mark.parametrize("options", [{}, NOISY], ids=str)
@pytest.mark.parametrize("step", [0, 2, 3])  # before any checkpoint, after, and right behind one
def test_a_run_that_did_not_fit_goes_on_with_less_and_learns_the_same(
    make: Make, tmp_path: Path, step: int, options: dict[str, Any]
) -> None:
    whole, cut = (make(tmp_path / name, batch_size=6, **options) for name in ("whole", "cut"))
    run(whole)
    full_at(cut, step)
    with pytest.raises(C2CError) as e:
        run(cut)
    assert str(e.value) == (
        f"step {step + 1} did not fit into the memory: --resume goes on there with "
        "--batch-size 3 --accumulate 2, from the same chats a step"
    )
    latest = all_of(tmp_path / "cut")[-1]
    assert latest.name == f"{step:07d}"
    chosen = {name: settings_in(latest)[name] for name in CHOSEN}
    assert (chosen["batch_size"], chosen["accumulate"]) == (3, 2)
    smaller = make(tmp_path / "cut", **options, **chosen)
    smaller.resume(latest)
    run(smaller)
    assert smaller.position == whole.position and smaller.tokens == whole.tokens
    if not options:
        for key, value in weights(whole).items():
            np.testing.assert_allclose(weights(smaller)[key], value, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "batch"), [((), 3), (("batch_size", "accumulate"), 6)], ids=["chosen", "given"]
)
def test_a_twin_that_did_not_fit_goes_on_with_less(
    make: Make, tmp_path: Path, given: tuple[str, ...], batch: int
) -> None:
    main = make(tmp_path, batch_size=6)
    described = RunConfig("", "", ("chats",), str(tmp_path), given=given)
    with Display(6) as display:
        twin = assemble_twin(main, described, display)
        full_at(twin, 2)
        with pytest.raises(C2CError, match="--resume goes on there with --batch-size 3"):
            run(twin)
        smaller = assemble_twin(main, described, display)
    assert (smaller.step, smaller.config.batch_size) == (2, batch)
    run(smaller)
    assert smaller.finished and smaller.config.zero_sharer


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_macos_interrupted_goes_on_exactly(
    make: Make, tmp_path: Path, step: int
) -> None:
    whole, cut = (make(tmp_path / name, **NOISY) for name in ("whole", "cut"))
    run(whole)
    full_at(cut, step, STOPPED)
    with pytest.raises(C2CError) as e:
        run(cut)
    start = f"macOS interrupted the GPU at step {step + 1}: --resume goes on there; where"
    assert str(e.value).startswith(start) and "\n" not in str(e.value)
    latest = all_of(tmp_path / "cut")[-1]
    assert latest.name == f"{step:07d}" and settings_in(latest) == whole.settings
    resumed = make(tmp_path / "cut", **NOISY)
    resumed.resume(latest)
    run(resumed)
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("kept", ["", "kept"])  # then the answers alone compute anything
def test_a_verdict_that_did_not_fit_is_given_when_the_run_is_resumed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"batch_size": 6, "prefill_cache": kept}
    whole, cut = (make(tmp_path / name, **options) for name in ("whole", "cut"))
    run(whole)
    compute = cut.prefills.whole

    def full(batch: Batch) -> Prefills:
        if cut.finished:
            raise FULL
        return compute(batch)

    cut.prefills.whole = full
    with pytest.raises(C2CError) as e:
        run(cut)
    assert str(e.value).startswith("the verdict did not fit into the memory: --resume goes on")
    assert Fuser.load(tmp_path / "cut").provenance.steps == 6
    metrics = tmp_path / "cut" / "metrics.jsonl"
    assert read_reports(metrics)[-1]["step"] == 6, "what was learned is told in any case"
    latest = all_of(tmp_path / "cut")[-1]
    smaller = make(
        tmp_path / "cut",
        **options | {name: settings_in(latest)[name] for name in CHOSEN},
    )
    smaller.resume(latest)
    run(smaller)
    assert same(weights(smaller), weights(whole)) and smaller.config.batch_size == 3
    for name in ("valid_loss", "zeroed_loss"):
        assert smaller.verdict[name] == pytest.approx(whole.verdict[name], rel=1e-4)
    assert Fuser.load(tmp_path / "cut").provenance.verdict == smaller.verdict["verdict"]
    last = read_reports(metrics)[-1]
    assert last["loss"] > 0 and last["valid_loss"] == smaller.verdict["valid_loss"]


def test_other_noise_is_told(make: Make, tmp_path: Path) -> None:
    run(make(tmp_path, iters=3, **NOISY))
    said: list[str] = []
    split = {"batch_size": 1, "accumulate": 3}
    make(tmp_path, say=said.append, **split, **NOISY).resume(all_of(tmp_path)[-1])
    assert "with other noise" in said[-1]


def test_what_did_not_fit_gets_less_and_less(make: Make, tmp_path: Path) -> None:
    trainer = make(tmp_path, batch_size=1, grad_checkpoint=True)
    full_at(trainer, 0)
    with pytest.raises(C2CError, match=r"^step 1 .*: start again .*--max-tokens") as e:
        run(trainer)
    assert "\n" not in str(e.value) and all_of(tmp_path) == []


@pytest.mark.parametrize("split", [(3, 2), (2, 3), (1, 6)])
def test_a_step_learns_from_the_same_chats_however_it_is_split(
    make: Make, tmp_path: Path, split: tuple[int, int]
) -> None:
    whole = make(tmp_path / "whole", batch_size=6)
    reports = run(whole)
    said: list[str] = []
    parts = make(tmp_path / "whole", batch_size=split[0], accumulate=split[1], say=said.append)
    parts.resume(all_of(tmp_path / "whole")[0])
    assert [line.split()[0] for line in said] == ["accumulate", "batch_size"]
    again = run(parts)
    assert parts.position == whole.position
    assert again[-1]["loss"] == pytest.approx(reports[-1]["loss"], rel=0.5)
    for key, value in weights(whole).items():
        np.testing.assert_allclose(weights(parts)[key], value, atol=1e-4)


def test_old_checkpoints_go(make: Make, tmp_path: Path) -> None:
    run(make(tmp_path, iters=5, save_every=1, keep_checkpoints=3))
    assert [c.name for c in all_of(tmp_path)] == ["0000003", "0000004", "0000005"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_loss_that_is_no_number_stops_the_run_and_changes_nothing(
    make: Make, tmp_path: Path
) -> None:
    trainer = make(tmp_path)
    fuser = trainer.c2c.fuser
    fuser.proj_out.bias = fuser.proj_out.bias.at[0, 0, 0].add(mx.array(float("nan")))
    before = weights(trainer)
    with pytest.raises(C2CError, match="step 1: the loss is nan") as e:
        run(trainer)
    assert "--fuser" in str(e.value) and len(re.findall("chats, line", str(e.value))) == 3
    after = weights(trainer)
    assert all(np.array_equal(before[k], after[k], equal_nan=True) for k in before)
    assert trainer.step == 0 and all_of(tmp_path) == []
