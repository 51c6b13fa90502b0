"""c2c-train as a user meets it: runs of tiny models from the command line, cut and shared ones."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from mlx_lm.utils import save_config, save_model
from rich.console import Console

from c2c_mlx import Fuser
from c2c_mlx.commands import train
from c2c_mlx.training import verdict
from c2c_mlx.training.checkpoints import all_of, alone_in
from c2c_mlx.training.plot import read_reports

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PAIR = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]
SHORT = ["--iters", "12", "--batch-size", "4", "--preset", "tiny", "--report-every", "4"]
SHORT += ["--answers", "2"]

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: Any) -> tuple[int, str]:
        code = train.main([str(a) for a in arguments])
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    rows = [
        {"prompt": f"say {i}" + " please" * (i % 4), "completion": f"{i}" + " so" * (i % 3)}
        for i in range(18)
    ]
    write(folder / "train.jsonl", rows)
    write(folder / "valid.jsonl", rows[:4])
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def weights(folder: Path) -> dict[str, np.ndarray]:
    arrays = mx.load(str(folder / "fuser.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- configuration


def test_a_file_describes_a_run_and_flags_override_it(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"sharer: {TINY / 'sharer'}\nreceiver: {TINY / 'receiver'}\ndata: {{{chats}: 2}}\n"
        f"out: {tmp_path / 'nowhere'}\npreset: tiny\niters: 99\nbatch_size: 2\n"
        "fuser_config: {hidden_dim: 8, activation: silu}\n"
    )
    code, err = call("--config", file, "--iters", "3", "--out", tmp_path / "run")
    assert code == 0, err
    fuser = Fuser.load(tmp_path / "run")
    assert (fuser.provenance.steps, fuser.config.hidden_dim) == (3, 8)
    assert (fuser.config.activation, fuser.config.intermediate_dim) == ("silu", 64)
    assert not (tmp_path / "nowhere").exists()


def test_a_fuser_for_prompts_learns_answers_as_well(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    given = [*PAIR, *SHORT, "--data", chats]
    assert call(*given, "--out", tmp_path / "prompts")[0] == 0
    assert not Fuser.load(tmp_path / "prompts").config.fuse_response
    for start, out in (("prompts", "answers"), ("answers", "more")):
        on = ["--fuse-response", "--twin"] if out == "answers" else []
        code, err = call(*given, "--fuser", tmp_path / start, "--out", tmp_path / out, *on)
        assert code == 0 and "valid: c2c" in err
        assert Fuser.load(tmp_path / out).config.fuse_response
    assert Fuser.load(tmp_path / "answers" / "twin").config.fuse_response
    assert call("--resume", "--out", tmp_path / "answers")[0] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("itres: 3", "unknown key 'itres'"),
        ("resume: true", "unknown key 'resume'"),
        ("- iters", "expected keys with values"),
        ("a: [", "not YAML"),
        ("preset: huge", "must be one of tiny, small, paper"),
        ("track: paper", "must be one of wandb, swanlab"),
        ("data: 3", "'data' must be a list"),
        ("fuser_config: {hidden: 3}", "fuser_config: unknown key 'hidden'"),
        ("fuser_config: {bits: 8}", "'bits' is for a trained fuser"),
        ("iters: 0", "iters must be at least 1"),
        ("iters: many", "'iters' must be of type int"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    call: Call, chats: Path, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    given = [*PAIR, *([] if text.startswith("data") else ["--data", chats])]
    code, err = call("--config", tmp_path / "run.yaml", "--out", tmp_path / "run", *given)
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--sharer is missing"),
        ([*PAIR, "--data", "nothing here", "--out", "o"], "no train.jsonl there"),
        ([*PAIR, "--data", "org/name", "--out", "o"], "pip install 'c2c-mlx[datasets]'"),
        ([*PAIR, "--data", ".=0", "--out", "o"], "the weight must be a number above zero"),
        ([*PAIR, "--data", ".=inf", "--out", "o"], "the weight must be a number above zero"),
        (["--config", "missing.yaml"], "cannot read missing.yaml"),
        ([*PAIR, "--data", ".", "--zero-sharer"], "name its --out"),
        (["--plot", "nowhere"], "no metrics.jsonl there"),
        ([*PAIR, "--track", "wandb"], "pip install 'c2c-mlx[wandb]'"),
        (
            [*PAIR, "--data", ".", "--out", "o", "--prefill-cache", "train.jsonl"],
            "--prefill-cache train.jsonl: cannot make the folder",
        ),
    ],
)
def test_a_mistake_is_one_line(
    call: Call,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(chats)
    code, err = call(*arguments)
    assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err


def test_a_model_that_cannot_be_trained_is_named_before_it_is_loaded(
    call: Call, chats: Path, lfm2: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hybrid").mkdir()  # without a tokenizer, which loading would miss
    save_model("hybrid", lfm2)
    save_config(asdict(lfm2.args), "hybrid/config.json")
    code, err = call(*PAIR[:2], "--receiver", "hybrid", "--data", chats, "--out", tmp_path / "run")
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("c2c-train: hybrid: training needs models whose layers")


def test_a_run_may_lie_at_home(
    call: Call, chats: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    code, err = call(*PAIR, "--data", "~/chats", "--out", "~/run")
    assert code == 2 and f"--out {tmp_path / 'run'}: a run or fuser is there" in err


def test_a_run_is_never_overwritten(call: Call, chats: Path, tmp_path: Path) -> None:
    run = [*PAIR, *SHORT, "--data", chats, "--out", tmp_path / "run"]
    assert call(*run, "--iters", "2")[0] == 0
    code, err = call(*run)
    assert code == 2 and "--resume it, or name another folder" in err


def test_a_run_that_is_going_on_keeps_what_it_was_told(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    (out := tmp_path / "run").mkdir()
    (out / "run.yaml").write_text("iters: 7\n")
    with alone_in(out):
        code, err = call(*PAIR, *SHORT, "--data", chats, "--out", out)
    assert code == 2 and "a run is going on there" in err and err.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["run.yaml"]
    assert (out / "run.yaml").read_text() == "iters: 7\n"


def test_a_run_leaves_out_what_a_template_refuses(call: Call, chats: Path, tmp_path: Path) -> None:
    receiver = tmp_path / "receiver"
    shutil.copytree(TINY / "receiver", receiver)
    template = receiver / "chat_template.jinja"
    template.write_text(
        "{% if messages[1:] and messages[1].role == 'user' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}" + template.read_text()
    )
    twice = [{"role": "user", "content": "say it"}] * 2
    row = {"messages": [*twice, {"role": "assistant", "content": "so"}]}
    for name in ("train", "valid"):
        with (chats / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    given = [*PAIR[:2], "--receiver", receiver, *SHORT, "--data", chats, "--out", tmp_path / "run"]
    code, err = call(*given)
    assert code == 0 and "19 chats, 4 for validation" in err
    line = err.splitlines()[-3]
    assert line.startswith(f"2 chats are left out, the first {chats / 'valid.jsonl'}, line 5: ")
    assert "are longer than" not in err and call("--resume", "--out", tmp_path / "run")[0] == 0


# --- where chats come from


def test_a_data_set_of_the_hub(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"say {i}", "completion": "so"} for i in range(4)]
    hub = ModuleType("datasets")
    hub.get_dataset_split_names = lambda name, **k: ["train", "test"]  # type: ignore[attr-defined]
    hub.load_dataset = lambda name, **k: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    code, err = call(*PAIR, *SHORT, "--data", "org/name", "--out", tmp_path / "run")
    assert code == 0 and "4 chats, 0 for validation" in err
    rows.append({"text": "?"})
    code, err = call(*PAIR, *SHORT, "--data", "org/name", "--out", tmp_path / "other")
    assert (
        code == 2
        and "org/name (train), row 4: of its fields (text)" in err
        and err.count("\n") == 1
    )


def test_without_a_valid_file_some_chats_are_kept_out(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    (chats / "valid.jsonl").unlink()
    write(chats / "train.jsonl", [{"prompt": f"say {i}", "completion": "so"} for i in range(90)])
    given = [*PAIR, *SHORT, "--data", chats, "--out"]
    code, err = call(*given, tmp_path / "run")
    assert code == 0 and "no valid.jsonl: 9 chats are kept out" in err
    assert "81 chats, 9 for validation" in err
    found = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert found["chats"] == 9 and found["verdict"] in err
    call(*given, tmp_path / "cut", "--iters", "4")
    code, err = call(*given, tmp_path / "cut", "--resume")
    assert code == 0 and "iters was 4, is 12" in err  # the same chats are kept out again


def test_what_another_model_answered_is_left_out_and_told(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    (chats / "valid.jsonl").unlink()
    (foreign := tmp_path / "foreign").mkdir()
    rows = [{"prompt": f"tell {i}", "completion": "so", "by": "gpt-4"} for i in range(3)]
    write(foreign / "train.jsonl", rows)
    write(chats / "train.jsonl", [{"prompt": f"say {i}"} for i in range(40)])
    given = [*PAIR, *SHORT, "--iters", "2", "--answer-with", "receiver", "--answer-tokens", "4"]
    code, err = call(*given, "--data", foreign, "--data", chats, "--out", tmp_path / "run")
    said = re.sub(r"\s+", " ", err)
    assert code == 0 and "3 chats are left out: another model answered them" in said
    assert "4 chats are kept out of training" in said  # of the source that is left
    code, err = call(*given, "--data", foreign, "--out", tmp_path / "none")
    assert code == 2 and "no chat is left to learn from" in err and "--time" not in err
    code, err = call(*given, "--data", chats, "--out", tmp_path / "long", "--max-tokens", "4")
    assert code == 2 and "no prompt could be answered" in err and "--time" not in err


def test_a_twin_is_trained_after_it_and_judges_it(call: Call, chats: Path, tmp_path: Path) -> None:
    write(chats / "valid.jsonl", [{"prompt": f"tell {i}", "completion": "so"} for i in range(9)])
    given = [*PAIR, *SHORT, "--data", chats]
    assert call(*given, "--out", tmp_path / "alone", "--zero-sharer")[0] == 0
    assert call(*given, "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["vs_twin"] is None
    code, err = call("--resume", "--out", tmp_path / "run", "--twin")
    assert code == 0 and "the twin, which has nothing to read, from step 0 on" in err
    # It is the run that --zero-sharer makes.
    assert_same(tmp_path / "run" / "twin", tmp_path / "alone")
    found = json.loads((tmp_path / "run" / "verdict.json").read_text())
    alone = json.loads((tmp_path / "alone" / "verdict.json").read_text())
    assert found["twin_loss"] == alone["valid_loss"] and found["vs_twin"]["ci95"]
    assert Fuser.load(tmp_path / "run").provenance.verdict == found["verdict"]
    code, err = call(*given, "--out", tmp_path / "timed", "--twin", "--plan")
    assert code == 0


def test_a_twin_without_chats_to_measure_on_is_told_before_any_training(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    (chats / "valid.jsonl").unlink()
    code, err = call(*PAIR, *SHORT, "--data", chats, "--out", tmp_path / "run", "--twin")
    assert code == 0 and "the twin, which has nothing to read, from step 0 on" in err
    assert err.index("it will be compared with nothing") < err.index("step 4/12")
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["vs_twin"] is None


def test_other_fields_are_named_and_rows_limited(call: Call, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"q": f"say {i}", "a": "so"} for i in range(9)])
    given = [*PAIR, *SHORT, "--data", tmp_path, "--rows", "5", "--out", tmp_path / "run"]
    code, err = call(*given, "--fields", "prompt=q,completion=b")
    assert code == 2 and "--answer-with" in err  # there is a question, and no answer called b
    code, err = call(*given, "--fields", "prompt=q,completion=a")
    assert code == 0 and "5 chats, 0 for validation" in err
    code, err = call(*given, "--fields", "query=q")
    assert code == 2 and "fields: 'query' is not one of messages" in err


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (["test", "validation"], "has no rows to train on, only test, validation"),
        ([], "only nothing"),
        (["train"], "has no rows to train on"),
    ],
)
def test_a_data_set_without_rows_to_train_on_is_one_line(
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    splits: list[str],
    words: str,
) -> None:
    hub = ModuleType("datasets")
    hub.get_dataset_split_names = lambda name, **k: splits  # type: ignore[attr-defined]
    hub.load_dataset = lambda name, **k: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    code, err = call(*PAIR, *SHORT, "--data", "org/name", "--out", tmp_path / "run")
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_prompts_are_answered_once(call: Call, chats: Path, tmp_path: Path) -> None:
    write(chats / "train.jsonl", [{"prompt": f"count to {i}"} for i in range(6)])
    answering = ["--answer-with", "receiver", "--answer-tokens", "3"]
    run = [*PAIR, *SHORT, *answering, "--data", chats, "--out", tmp_path / "run"]
    code, err = call(*run, "--iters", "2")
    assert code == 0 and "answering prompts: 6 of 6" in err
    answers = (tmp_path / "run" / "answers-receiver.jsonl").read_text()
    assert call(*run, "--resume")[0] == 0
    assert (tmp_path / "run" / "answers-receiver.jsonl").read_text() == answers


# --- runs that are cut, shared or drawn


def test_a_folder_without_a_run_is_not_resumed(call: Call, tmp_path: Path) -> None:
    code, err = call("--out", tmp_path / "nope", "--resume")
    assert code == 2 and f"--resume: {tmp_path / 'nope'} holds no run" in err


def test_a_run_is_resumed_as_it_was_or_not_at_all(call: Call, chats: Path, tmp_path: Path) -> None:
    run = [*PAIR, *SHORT, "--data", chats, "--out", tmp_path / "run", "--eval-every", "3"]
    assert call(*run)[0] == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    fuser = (tmp_path / "run" / "config.json").read_bytes()
    assert b"valid_loss" in fuser
    code, err = call(*run, "--resume", "--learning-rate", "0.001", "--preset", "small")
    assert code == 2 and "learning_rate was 0.003, is 0.001" in err.splitlines()[-1]
    assert "fuser_config.hidden_dim was 64, is 128" in err.splitlines()[-1]
    with (chats / "train.jsonl").open("a") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n')
    code, err = call(*run, "--resume")
    assert code == 2 and "other chats" in err.splitlines()[-1]
    lines = (chats / "train.jsonl").read_text().splitlines(keepends=True)
    (chats / "train.jsonl").write_text("".join(lines[:-1]))
    code, err = call(*run, "--resume")
    assert code == 0 and "finished already: 12 steps" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "run" / "config.json").read_bytes() == fuser
    code, err = call(*run, "--resume", "--iters", "14")
    assert code == 0 and "iters was 12, is 14 from here on" in err
    assert Fuser.load(tmp_path / "run").provenance.steps == 14


def test_a_run_is_resumed_from_any_folder(
    call: Call, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = [name if name.startswith("--") else os.path.relpath(name) for name in PAIR]
    out = tmp_path / "run"
    given = ["--data", "chats=2", "--prefill-cache", "kept", "--iters", "4", "--out", out]
    assert call(*pair, *SHORT, *given)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    code, err = call("--resume", "--out", out)
    assert code == 0 and "finished already: 4 steps" in err and not [*Path().iterdir()]


def test_a_finished_run_without_its_verdict_is_judged(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert call(*PAIR, *SHORT, "--iters", "4", "--data", chats, "--out", out)[0] == 0
    found = (out / "verdict.json").read_text()
    (out / "verdict.json").unlink()
    code, err = call("--resume", "--out", out)
    assert code == 0 and "finished already" not in err and "Not judged: there are only 4" in err
    assert (out / "verdict.json").read_text() == found
    assert "finished already: 4 steps" in call("--resume", "--out", out)[1]


@pytest.mark.slow
def test_ctrl_c_says_what_it_does_and_leaves_a_fuser(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    (chats / "valid.jsonl").unlink()
    run = [*PAIR, *SHORT, "--data", str(chats), "--out", str(tmp_path / "run")]
    run += ["--iters", "100000", "--report-every", "1"]
    code = "import sys; from c2c_mlx.commands.train import main; sys.exit(main())"
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", code, *run], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, said
    text = "".join(said)
    assert "stopping after what it is at" in text and "Ctrl-C again stops at once" in text
    assert "the same with --resume goes on" in text and "Traceback" not in text
    assert len(re.findall("^step 2/", text, re.MULTILINE)) == 1  # nothing is printed twice
    step = int(all_of(tmp_path / "run")[-1].name)
    assert step >= 2 and Fuser.load(tmp_path / "run").provenance.steps == step


def test_ctrl_c_in_the_verdict_leaves_the_twin_for_later(
    call: Call, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, out = verdict.judge, tmp_path / "run"

    def interrupted(*given: Any) -> verdict.Verdict:
        signal.raise_signal(signal.SIGINT)
        return judge(*given)

    monkeypatch.setattr(verdict, "judge", interrupted)
    code, err = call(*PAIR, *SHORT, "--iters", "4", "--data", chats, "--out", out, "--twin")
    assert code == 130 and "stopping after" in err and "stopped before the twin" in err
    assert (out / "verdict.json").exists() and not (out / "twin").exists()
    monkeypatch.setattr(verdict, "judge", judge)
    code, err = call("--resume", "--out", out)
    assert code == 0 and (out / "twin" / "verdict.json").exists()


@pytest.mark.slow
def test_kill_9_loses_nothing_that_a_checkpoint_holds(
    call: Call, chats: Path, tmp_path: Path
) -> None:
    common = [*PAIR, *SHORT, "--data", str(chats), "--save-every", "2"]
    assert call(*common, "--out", tmp_path / "whole")[0] == 0
    cut = [
        sys.executable,
        "-c",
        "import sys; from c2c_mlx.commands.train import main; sys.exit(main())",
    ]
    cut += [*common, "--out", str(tmp_path / "cut")]
    for step in ("step 4/", "step 8/"):
        resume = ["--resume"] if all_of(tmp_path / "cut") else []
        with subprocess.Popen([*cut, *resume], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(step):
                    process.kill()
        assert process.returncode == -signal.SIGKILL
        assert all_of(tmp_path / "cut")
    assert call(*common, "--out", tmp_path / "cut", "--resume")[0] == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")
    reports = [read_reports(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole")]
    assert [r["step"] for r in reports[0]] == [4, 8, 12]
    assert [r["loss"] for r in reports[0]][-1] == reports[1][-1]["loss"]


def test_a_full_disk_loses_no_earlier_checkpoint(
    call: Call, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*PAIR, *SHORT, "--data", chats, "--out", tmp_path / "run", "--save-every", "4"]
    assert call(*run, "--iters", "4")[0] == 0
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, err = call(*run, "--resume")
    assert code == 2 and "No space left on device" in err.splitlines()[-1]
    assert [c.name for c in all_of(tmp_path / "run")] == ["0000004"]
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert call(*run, "--resume")[0] == 0
    assert call(*run[:-4], "--out", tmp_path / "whole")[0] == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def together(*command: Any) -> subprocess.CompletedProcess[str]:
    """A command in two processes."""
    return subprocess.run(
        [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--", *command],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(call: Call, chats: Path, tmp_path: Path) -> None:
    common = [*PAIR, *SHORT, "--data", str(chats)]
    assert call(*common, "--out", tmp_path / "one")[0] == 0
    done = together("c2c-train", *common, "--out", tmp_path / "two")
    assert (tmp_path / "two" / "config.json").exists(), done.stderr + done.stdout
    one, two = (read_reports(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    assert two[-1]["valid_loss"] == pytest.approx(one[-1]["valid_loss"], rel=1e-4)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12, 12]  # one process writes


ALIKE = """
import mlx.core as mx
from c2c_mlx.config import TrainConfig
from c2c_mlx.models.memory import Need
from c2c_mlx.training import fits, interrupt

first = mx.distributed.init().rank() == 0

def need(config, shapes):
    return Need(0, 0, 0, config.batch_size * 10**9, 0, 0, 20 * 10**9 if first else 5 * 10**9)

found = fits.fit(TrainConfig(batch_size=16), (), [(9, 9)] * 16, need).config
stopped = interrupt.anywhere(lambda: first)()
print("chosen", found.batch_size, found.accumulate, stopped, flush=True)
"""


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path: Path) -> None:
    (tmp_path / "alike.py").write_text(ALIKE)
    done = together("python", tmp_path / "alike.py")
    said = [line for line in done.stdout.splitlines() if line.startswith("chosen")]
    assert said == ["chosen 4 4 True"] * 2, done.stderr


def test_a_run_is_drawn(call: Call, chats: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    assert call(*PAIR, *SHORT, "--data", chats, "--out", run)[0] == 0
    assert call("--plot", run)[0] == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    (run / "metrics.jsonl").write_text('{"step": 4, "lo')
    assert call("--plot", run)[0] == 2


def test_a_tracker_hears_every_report(
    call: Call, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    service = ModuleType("swanlab")
    service.__spec__ = ModuleSpec("swanlab", None)
    service.init = lambda **given: heard.append(given["config"]["iters"])  # type: ignore[attr-defined]
    service.log = lambda figures, step: heard.append(step)  # type: ignore[attr-defined]
    service.finish = lambda: heard.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swanlab", service)
    out = tmp_path / "run"
    assert call(*PAIR, *SHORT, "--data", chats, "--out", out, "--track", "swanlab")[0] == 0
    assert heard == [12, 4, 8, 12, "finished"]


def test_a_terminal_gets_a_bar(
    call: Call, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    sharer = shutil.copytree(TINY / "sharer", tmp_path / "no[/b]markup")
    given = [*SHORT, "--sharer", sharer, *PAIR[2:], "--data", chats, "--out", tmp_path / "run"]
    code, err = call(*given)
    assert code == 0 and "12/12" in err and "gates open" in err
    assert "step 4/12" not in err and "valid: c2c" in err
