"""c2c-study as a user meets it: files, mistakes, cuts, and pairs side by side."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest

from c2c_mlx import Fuser, LanguageModel
from c2c_mlx.commands import study as command
from c2c_mlx.config import FuserConfig, Pair
from c2c_mlx.evaluation.runner import Log
from c2c_mlx.fusers.disk import CONFIG
from c2c_mlx.studies import gates, mapping

TEXTS = ("who wrote it", "and when", "the quick brown", "a house by the sea", "read this", "jumps")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of `transform` learns for as long as it takes to see that it does."""
    monkeypatch.setattr(mapping, "STEPS", mapping.CHECK)


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "task.jsonl"
    rows = (
        {"prompt": f"{TEXTS[i % 6]} {i}", "completion": f"{TEXTS[-i % 6]} he did"}
        for i in range(24)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def call(tiny_pair: Pair, task: str, tmp_path: Path) -> Iterator[Callable[..., int]]:
    who = ["--receiver", tiny_pair.receiver, "--sharer", tiny_pair.sharers[0]]

    def call(study: str, *more: str, fuser: str = tiny_pair.fusers[0]) -> int:
        arguments = [study, *who, "--fuser", fuser, "--task", task, "--shots", "2"]
        return command.main([*arguments, "--out", str(tmp_path / study), *more])

    yield call


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("study", command.STUDIES)
def test_every_study_leaves_its_three_files(
    call: Callable[..., int], study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(study, "--limit", "20") == 0
    out = tmp_path / study
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["result.json", "report.md", f"{study}.png"]
    )
    assert json.loads((out / "result.json").read_text())["study"] == study
    assert (out / f"{study}.png").read_bytes().startswith(b"\x89PNG")
    assert "[95 %]" in (out / "report.md").read_text()
    capsys.readouterr()
    assert call(study, "--limit", "20") == 2
    assert "a result is there already" in capsys.readouterr().err


def test_an_interrupted_study_goes_on(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = call("gates", "--limit", "8")
    result = json.loads((tmp_path / "gates" / "result.json").read_text())
    again = tmp_path / "again"
    append, calls = Log.append, []

    def cut(self: Log, records: Any) -> None:
        calls.append(len(records))
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, records)

    monkeypatch.setattr(Log, "append", cut)
    assert call("gates", "--limit", "8", "--out", str(again)) == 130
    assert "continues" in capsys.readouterr().err and whole == 0
    monkeypatch.setattr(Log, "append", append)
    assert call("gates", "--limit", "8", "--seed", "1", "--out", str(again)) == 2
    assert "another" in capsys.readouterr().err
    (again / "gates.partial.jsonl").rename(kept := tmp_path / "kept")
    (again / "gates.partial.jsonl").write_text("nonsense\n")
    assert call("gates", "--limit", "8", "--out", str(again)) == 2
    assert "c2c-eval" not in (said := capsys.readouterr().err) and "not the records" in said
    kept.rename(again / "gates.partial.jsonl")
    assert call("gates", "--limit", "8", "--out", str(again)) == 0
    found = json.loads((again / "result.json").read_text())
    worth, expected = (
        [of["worth"]["mean"] for of in r["slices"]] + [r["whole"]["mean"]] for r in (found, result)
    )
    assert worth == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gates", "--pair", "a,b"], "--pair belongs to"),
        (["pairs", "--pair", "a,b"], "leave out --receiver"),
        (["layers", "--limit", "0"], "must be at least 1"),
        (["enrich", "--shots", "30"], "examples and questions"),
        (["transform", "--limit", "5"], "must be 20 or more"),
        (["gates", "--task", "nowhere.jsonl"], "neither a file"),
    ],
)
def test_a_mistake_is_one_line(
    call: Callable[..., int], arguments: list[str], words: str, capsys: Any
) -> None:
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("c2c-study: ") and err.count("\n") == 1


def test_of_a_fuser_for_answers_prompts_alone_are_studied(
    call: Callable[..., int], tiny_pair: Pair, tmp_path: Path, capsys: Any
) -> None:
    config = json.loads((shutil.copytree(tiny_pair.fusers[0], tmp_path / "f") / CONFIG).read_text())
    (tmp_path / "f" / CONFIG).write_text(json.dumps(config | {"fuse_response": True}))
    assert call("rank", fuser=str(tmp_path / "f")) == 0
    assert "prompts alone are fused" in capsys.readouterr().err


def test_a_full_memory_and_an_interrupted_gpu_are_one_line(
    call: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*given: Any) -> None:
        raise error

    monkeypatch.setattr(gates, "run", full)
    error: Exception = RuntimeError("[metal::malloc] Unable to allocate 17179869184 bytes.")
    assert call("gates") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("c2c-study: out of memory ([metal::malloc]") and "smaller models" in err
    error = RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity (e)")
    assert call("gates") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("c2c-study: macOS interrupted the GPU ([METAL]") and "display" in err
    error = RuntimeError("[matmul] Last dimension of first input must match")
    with pytest.raises(RuntimeError, match="matmul"):
        call("gates")


def test_pairs_lie_side_by_side_with_a_twin(
    tiny_pair: Pair, task: str, tmp_path: Path, capsys: Any
) -> None:
    names = tiny_pair.receiver, tiny_pair.sharers[0]
    pairs = [",".join([*names, tiny_pair.fusers[0], tiny_pair.fusers[0]]), ",".join(names[::-1])]
    arguments = ["--pair", pairs[0], "--pair", pairs[1], "--task", task, "--limit", "4"]
    assert command.main(["pairs", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert "without c2c" in capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "result.json").read_text())["pairs"]
    first, second = found.values()
    assert set(second["modes"]) == {"receiver", "sharer", "relay"}
    assert set(first["modes"]) > {"c2c", "c2c-zeroed", "twin"}
    zeroed, twin = (first["modes"][m]["scores"]["nll"] for m in ("c2c-zeroed", "twin"))
    assert zeroed == twin  # the same fuser, fed by nobody


@pytest.fixture
def fuser(receiver: LanguageModel, sharer: LanguageModel) -> Fuser:
    """Another one for the tiny pair."""
    mx.random.seed(1)
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, ((1, 3), (3, 5)), 24, 20))
    fuser.gate_logit = mx.full(fuser.gate_logit.shape, -1.0)
    fuser.proj_out.bias = 3 * fuser.proj_out.bias
    return fuser


@pytest.fixture
def pairs(tiny_pair: Pair, task: str, tmp_path: Path) -> Callable[..., int]:
    """Studies the tiny pair with each of these: a fuser, perhaps a comma and a twin."""

    def pairs(*fusers: str, more: tuple[str, ...] = ()) -> int:
        models = f"{tiny_pair.receiver},{tiny_pair.sharers[0]}"
        given = [x for fuser in fusers for x in ("--pair", f"{models},{fuser}")]
        out = ["--out", str(tmp_path / "out")]
        return command.main(["pairs", *given, "--task", task, "--limit", "2", *out, *more])

    return pairs


def test_fusers_of_the_same_models_lie_side_by_side(
    pairs: Callable[..., int], tiny_pair: Pair, fuser: Fuser, tmp_path: Path, capsys: Any
) -> None:
    fuser.gate_logit = -fuser.gate_logit
    fuser.save(tmp_path / "other")
    assert pairs(tiny_pair.fusers[0], str(tmp_path / "other")) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["pairs"]
    assert [name.rpartition(", ")[2] for name in found] == [
        tiny_pair.fusers[0],
        str(tmp_path / "other"),
    ]
    first, second = (of["modes"]["c2c"]["scores"]["nll"]["mean"] for of in found.values())
    assert first != second
    capsys.readouterr()
    assert pairs(tiny_pair.fusers[0], tiny_pair.fusers[0], more=("--out", str(tmp_path / "2"))) == 2
    assert "is there twice" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["fuser", "twin", "fuser_bits"])
def test_a_pair_with_another_fuser_does_not_go_on(
    other: str,
    pairs: Callable[..., int],
    tiny_pair: Pair,
    fuser: Fuser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    append = Log.append

    def cut(self: Log, records: Any) -> None:
        append(self, records)
        raise KeyboardInterrupt

    monkeypatch.setattr(Log, "append", cut)
    own = tiny_pair.fusers[0]
    assert pairs(own) == 130
    monkeypatch.setattr(Log, "append", append)
    fuser.save(tmp_path / "other")
    capsys.readouterr()
    given = {"fuser": str(tmp_path / "other"), "twin": f"{own},{own}"}.get(other, own)
    assert pairs(given, more=("--fuser-bits", "8") if other == "fuser_bits" else ()) == 2
    assert f"an unfinished run with another {other} (" in capsys.readouterr().err
    assert pairs(own) == 0


def test_a_pair_has_a_receiver_and_a_sharer(task: str, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--pair", "a", "--task", task, "--out", str(tmp_path / "out")]
    assert command.main(["pairs", *arguments]) == 2
    assert "must be RECEIVER,SHARER" in capsys.readouterr().err


def test_pairs_read_one_sharer(call: Callable[..., int], tiny_pair: Pair, capsys: Any) -> None:
    assert call("pairs", "--sharer", tiny_pair.sharers[0]) == 2
    err = capsys.readouterr().err
    assert "one sharer at a time" in err and err.count("\n") == 1


def test_a_pair_is_let_go_before_the_next_is_loaded(
    tiny_pair: Pair, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, there = command.pair.load, []

    def watched(*args: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(model() for model in there)
        loaded = load(*args, **options)
        there.extend(weakref.ref(lm) for lm in (loaded.receiver, *loaded.sharers))
        return loaded

    monkeypatch.setattr(command.pair, "load", watched)
    names = tiny_pair.receiver, tiny_pair.sharers[0]
    both = [x for pair in (names, names[::-1]) for x in ("--pair", ",".join(pair))]
    arguments = ["pairs", *both, "--task", task, "--limit", "2", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    assert len(there) == 4
