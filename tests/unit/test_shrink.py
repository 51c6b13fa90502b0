"""A big fuser made small: what it begins from, what it learns, and the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from huggingface_hub import constants
from trainers import RECIPE, run

from c2c_mlx import C2C, Fuser, LanguageModel
from c2c_mlx.commands import train, weights
from c2c_mlx.config import FuserConfig, Provenance, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.fuser import count
from c2c_mlx.training import shrink
from c2c_mlx.training.dataset import Dataset, Example
from c2c_mlx.training.distil import Distiller
from c2c_mlx.training.start import measure_inputs, new_fuser

PAPER = {"dropout": 0.1, "activation": "gelu", "depth": 4}
TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"

MakeDistiller = Callable[..., Distiller]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(receiver: LanguageModel, sharer: LanguageModel) -> FuserConfig:
    layers = tuple((i, i + 2) for i in range(4))
    return FuserConfig(receiver.shape, sharer.shape, layers, 48, 40)


@pytest.fixture
def distiller(
    receiver: LanguageModel,
    sharer: LanguageModel,
    dataset: Dataset,
    examples: list[Example],
    config: FuserConfig,
    tmp_path: Path,
) -> MakeDistiller:
    """A run of a fresh fuser of a share of the size, between the tiny models."""

    def make(small: float, train: dict[str, Any] | None = None, **fields: Any) -> Distiller:
        whole = replace(config, **fields)
        big = new_fuser(whole, "open", 5)
        c2c = C2C(receiver.model, sharer.model, big.train())
        if whole.normalise:
            measure_inputs(c2c, examples, 4)
            big.proj_out.weight = big.proj_out.weight * 10
        options = {"iters": 40, "batch_size": 4, "warmup": 2, "learning_rate": 1e-3, "answers": 0}
        wanted = shrink.smaller(whole, small) if small < 1 else replace(whole, dropout=0.0)
        fuser = new_fuser(wanted, "open", 7).train()
        return Distiller(
            C2C(receiver.model, sharer.model, fuser),
            dataset,
            examples[:6],
            TrainConfig(**(options | (train or {}))),
            tmp_path,
            teacher=big,
        )

    return make


def begin(d: Distiller, examples: list[Example]) -> None:
    parts = shrink.read(d.c2c, d.prefills, examples, 4)
    shrink.begin(d.c2c.fuser, d.teacher.fuser, parts)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("fields", [PAPER, RECIPE])
def test_no_wider_fuser_is_as_small(
    config: FuserConfig, share: float, fields: dict[str, Any]
) -> None:
    big = replace(config, **fields)
    small = shrink.smaller(big, share)
    assert count(small) <= share * count(big)
    if (wider := small.hidden_dim + 1) > 128:
        wider += 63 - small.hidden_dim % 64
    inner = round(big.intermediate_dim * wider / big.hidden_dim)
    assert count(replace(small, hidden_dim=wider, intermediate_dim=inner)) > share * count(big)
    same = replace(
        small,
        hidden_dim=big.hidden_dim,
        intermediate_dim=big.intermediate_dim,
        dropout=big.dropout,
    )
    assert same == big


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5])
def test_a_wide_one_can_be_packed(config: FuserConfig, share: float) -> None:
    big = replace(config, hidden_dim=1024, intermediate_dim=1024)
    small = shrink.smaller(big, share)
    assert 0.5 * share * count(big) < count(small) <= share * count(big)
    assert small.hidden_dim % 64 == small.intermediate_dim % 64 == 0


def test_a_size_below_one_channel_is_refused(config: FuserConfig) -> None:
    with pytest.raises(C2CError, match="can't be made so small, a single channel takes"):
        shrink.smaller(config, 0.001)
    narrow = replace(config, hidden_dim=1, intermediate_dim=1)
    with pytest.raises(C2CError, match="it has a single channel"):
        shrink.smaller(narrow, 0.5)


@pytest.mark.parametrize("fields", [PAPER, RECIPE, {"kinds": "values", "activation": "silu"}])
def test_turning_the_hidden_channels_changes_nothing(
    distiller: MakeDistiller, examples: list[Example], fields: dict[str, Any]
) -> None:
    d = distiller(1.0, **fields)
    begin(d, examples)
    found = d.errors()
    assert found and max(found.values()) < 0.01
    assert not mx.allclose(d.c2c.fuser.proj_in.weight, d.teacher.fuser.proj_in.weight, atol=0.01)


@pytest.mark.parametrize("fields", [PAPER, RECIPE])
def test_it_begins_near_the_big_one_and_learning_brings_it_nearer(
    distiller: MakeDistiller, examples: list[Example], fields: dict[str, Any]
) -> None:
    d = distiller(0.4, **fields)
    fresh = d.errors()
    begin(d, examples)
    begun = d.errors()
    reports = run(d)
    learned = d.errors()
    for kind in ("keys", "values"):
        assert begun[f"valid_error_{kind}"] < 0.6 * fresh[f"valid_error_{kind}"]
        assert learned[f"valid_error_{kind}"] < begun[f"valid_error_{kind}"]
    assert reports[-1]["valid_error_keys"] == pytest.approx(learned["valid_error_keys"])
    assert reports[-1]["loss"] < reports[0]["loss"]
    assert "valid_error_values" in Fuser.load(d.folder).provenance.metrics


def test_gates_are_the_big_ones_and_what_is_shut_stays_shut(
    distiller: MakeDistiller, examples: list[Example]
) -> None:
    d = distiller(0.5, {"iters": 3})
    d.teacher.fuser.set_gate(0, 1, False)
    begin(d, examples)
    run(d)
    assert Fuser.load(d.folder).gates.tolist() == d.teacher.fuser.gates.tolist()
    assert not d.teacher.fuser.gates.all()


def test_the_message_gate_is_learned_from_the_big_one(
    distiller: MakeDistiller, examples: list[Example]
) -> None:
    d = distiller(0.4, {"iters": 30, "message_gate_weight": 1.0}, **RECIPE)
    d.teacher.fuser.message_head.bias = d.teacher.fuser.message_head.bias - 6
    begin(d, examples)
    run(d)
    assert d.errors()["valid_error_cache_keys"] == 0  # both add nothing
    small = C2C(d.c2c.receiver, d.c2c.sharer, Fuser.load(d.folder))
    e = examples[0]
    changed = small.prefill(e.receiver_ids, e.sharer_ids, e.index.tolist(), e.message.tolist())
    alone = d.teacher.prefill(e.receiver_ids, e.sharer_ids, e.index.tolist(), e.message.tolist())
    for a, b in zip(changed, alone, strict=True):
        assert mx.array_equal(a.state[0], b.state[0])


@pytest.mark.parametrize("fields", [PAPER, RECIPE])
def test_parts_of_a_long_batch_are_as_the_whole(
    distiller: MakeDistiller,
    examples: list[Example],
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d = distiller(0.4, **fields)
    begin(d, examples)
    whole = d.errors()
    monkeypatch.setattr("c2c_mlx.device.fuser_pass", lambda weights: 1)
    assert d.errors() == pytest.approx(whole, rel=1e-4)


# --- the command


@pytest.fixture
def big(config: FuserConfig, tmp_path: Path) -> Path:
    fuser = new_fuser(replace(config, **PAPER), "open", 3)
    fuser.provenance = replace(fuser.provenance, licence="mit", data=("first",))
    fuser.save(tmp_path / "big")
    return tmp_path / "big"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    rows = [{"prompt": f"say {i}" + " please" * (i % 4), "completion": f"{i}"} for i in range(18)]
    for name, some in (("train", rows), ("valid", rows[:9])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A recipe of few answers for the verdict, which would take most of the time."""
    (tmp_path / "few.yaml").write_text("answers: 2\n")
    return tmp_path / "few.yaml"


@pytest.fixture
def call(tiny: Path, chats: Path, few: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(fuser: object, *arguments: object, data: object = chats) -> tuple[int, str, str]:
        command = ["shrink", fuser, "--data", data, "--batch-size", "4", "--recipe", few]
        command += ["--sharer", tiny / "sharer", "--receiver", tiny / "receiver", *arguments]
        code = weights.main([str(a) for a in command])
        return code, *capsys.readouterr()

    return call


def test_a_small_fuser_is_one_like_any_other(
    call: Call, big: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "a small one", tmp_path / "run.yaml"
    recipe.write_text("preset: tiny\nfuse_response: true\n")  # of a new fuser, which this is not
    given = ["--to", "30%", "--iters", "6", "--recipe", recipe]
    code, said, err = call(big, *given, "--out", out)
    assert code == 0, err
    assert "before it learns: off by keys" in err
    for text in (
        "million parameters (2",
        "share of a first token: ",
        "loss on 9 chats that it did not learn from: ",
        f"--mode c2c --fuser '{out}' --json small.json; c2c-eval --compare small.json big.json",
    ):
        assert text in said
    found = json.loads((out / "shrunk.json").read_text())
    assert found["small"]["parameters"] <= 0.3 * found["big"]["parameters"]
    low, high = found["difference"]["ci95"]
    assert low <= found["difference"]["mean"] <= high
    assert 0 < found["small"]["first_token"] < 1 and 0 < found["error"]["keys"] < 1
    fuser = Fuser.load(out)
    assert count(fuser.config) == found["small"]["parameters"]
    assert fuser.provenance.source == f"c2c-weights shrink {big} --to 0.3"
    assert (fuser.provenance.licence, fuser.provenance.data[0]) == ("mit", "first")
    assert "valid_error_keys" in (out / "README.md").read_text()
    assert weights.main(["verify", str(out)]) == 0 == weights.main(["show", str(out)])
    capsys.readouterr()
    code = weights.main(["quantize", str(out), str(tmp_path / "packed")])
    assert code == 2 and "too narrow to be packed" in capsys.readouterr().err
    assert train.main(["--plot", str(out)]) == 0


def test_without_chats_to_measure_on(call: Call, big: Path, chats: Path, tmp_path: Path) -> None:
    (chats / "valid.jsonl").unlink()
    code, said, err = call(big, "--to", "30%", "--iters", "1", "--out", tmp_path / "small")
    assert code == 0, err
    assert "there were no chats to measure it on" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "0.1%"], "can't be made so small"),
        (["--to", "5%", "--iters", "0"], "iters must be at least 1"),
        (["--to", "5%", "--data", "nowhere"], "nowhere"),
        (["--to", "5%", "--time", "soon"], "--time soon"),
        (["--to", "5%", "--sharer", str(TINY / "receiver")], "sharer"),
        (["--to", "5%", "--recipe", "nothing.yaml"], "cannot read nothing.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    call: Call, big: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, said, err = call(big, "--out", tmp_path / "small", *arguments)
    assert (code, said) == (2, "")
    assert words in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    ("source", "hub_id"),
    [
        ("c2c-train --receiver qwen", "mlx-community/Qwen3-0.6B-4bit"),
        ("converted from org/fuser", "Qwen/Qwen3-0.6B"),
    ],
)
def test_the_models_are_those_that_the_fuser_was_trained_on(
    config: FuserConfig,
    tiny: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    hub_id: str,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fuser = new_fuser(replace(config, receiver=replace(config.receiver, name="qwen")), "open", 3)
    fuser.provenance = Provenance(source=source)
    fuser.save(tmp_path / "big")
    given = ["--sharer", str(tiny / "sharer"), "--data", str(chats), "--out", str(tmp_path / "o")]
    assert weights.main(["shrink", str(tmp_path / "big"), "--to", "30%", *given]) == 2
    assert f"could not fetch {hub_id}: " in capsys.readouterr().err


def test_a_fuser_that_does_nothing_has_nothing_to_imitate(
    call: Call, config: FuserConfig, tmp_path: Path
) -> None:
    Fuser(config).save(tmp_path / "fresh")
    code, _, err = call(tmp_path / "fresh", "--to", "30%", "--out", tmp_path / "small")
    assert code == 2 and "every gate is shut" in err.splitlines()[-1]


@pytest.mark.parametrize("share", ["0%", "100%", "5", "five", "-5%"])
def test_a_share_is_between_nothing_and_all(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        weights.main(["shrink", "fuser", f"--to={share}"])
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "is no share between 0 and 1" in line


@pytest.mark.slow
def test_ctrl_c_leaves_a_fuser_and_resume_goes_on(
    call: Call, tiny: Path, big: Path, chats: Path, few: Path, tmp_path: Path
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    common = ["--to", "30%", "--iters", "30"]
    command = [sys.executable, "-m", "c2c_mlx.commands.weights", "shrink", str(big)]
    command += ["--data", str(chats), "--batch-size", "4", "--recipe", str(few)]
    command += ["--sharer", str(tiny / "sharer")]
    command += ["--receiver", str(tiny / "receiver"), *common, "--out", str(cut)]
    said: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 10/"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, said
    assert "Traceback" not in "".join(said)
    stopped = Fuser.load(cut)
    assert 10 <= stopped.provenance.steps < 30
    code, out, err = call(big, *common, "--out", cut, "--resume")
    assert code == 0 and "loss on 9 chats" in out, err
    assert call(big, *common, "--out", whole)[0] == 0
    a, b = (dict(mx.load(str(f / "fuser.safetensors"))) for f in (cut, whole))
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_another_fuser_can_not_be_resumed_from(
    call: Call, big: Path, config: FuserConfig, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    assert call(big, "--to", "30%", "--iters", "2", "--out", out)[0] == 0
    other = new_fuser(replace(config, **PAPER), "open", 4)
    other.save(tmp_path / "other")
    code, _, err = call(tmp_path / "other", "--to", "30%", "--iters", "4", "--out", out, "--resume")
    assert code == 2 and "weights of the big fuser" in err.splitlines()[-1]
