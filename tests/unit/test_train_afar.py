"""A sharer on another machine in training: the same fuser as of one that is here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from serving_jobs import serving, sharing

from c2c_mlx import C2C, LanguageModel, load_model
from c2c_mlx.commands import train
from c2c_mlx.config import Pair
from c2c_mlx.fusers import trained
from c2c_mlx.fusion import kv
from c2c_mlx.models import remote
from c2c_mlx.training import sharer as sharers
from c2c_mlx.training.batch import pad

STEPS = ["--iters", "6", "--batch-size", "3", "--preset", "tiny", "--report-every", "2"]
STEPS += ["--answers", "1"]


@pytest.fixture(scope="module")
def url(tiny_pair: Pair) -> Iterator[str]:
    with sharing(tiny_pair.sharers[0]) as engine, serving(engine, shares=True) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(remote.API_KEY, raising=False)
    return tmp_path / "home"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    rows = [
        {"prompt": f"say {i}" + " please" * (i % 4), "completion": f"{i}" + " so" * (i % 3)}
        for i in range(18)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize("most_prefix", [0, 3])
def test_a_block_is_laid_out_as_one_that_was_read_here(
    receiver: LanguageModel, sharer: LanguageModel, make_fuser: Any, url: str, most_prefix: int
) -> None:
    fuser = make_fuser(receiver.model, sharer.model)
    here, there = (C2C(receiver.model, lm.model, fuser) for lm in (sharer, load_model(url)))
    prompts = pad([[5, 6, 7, *range(20, 20 + n)] for n in [4, 1, 9] * 4], most_prefix)
    ours, theirs = (sharers.prefill(c2c, prompts, {}) for c2c in (here, there))
    width = prompts.ids.shape[1]
    for row, n in enumerate(prompts.padding):
        counts = np.r_[: prompts.prefix, prompts.prefix + n : width]
        for kind in (0, 1):
            a, b = (
                np.array(kv.read(cache, here.sharer_layers, 0, width)[kind].astype(mx.float32))
                for cache in (ours, theirs)
            )
            np.testing.assert_allclose(a[:, row][:, :, counts], b[:, row][:, :, counts], atol=1e-4)


def test_a_run_learns_the_same(
    tiny_pair: Pair, url: str, chats: Path, tmp_path: Path, cache_folder: Path, capsys: Any
) -> None:
    metrics = []
    for name, sharer in (("here", tiny_pair.sharers[0]), ("there", url)):
        out = tmp_path / name
        pair = ["--receiver", tiny_pair.receiver, "--sharer", sharer, "--data", str(chats)]
        assert train.main([*pair, *STEPS, "--out", str(out)]) == 0
        rows = (out / "metrics.jsonl").read_text().splitlines()
        metrics.append([(row["step"], row["loss"]) for row in map(json.loads, rows)])
        assert train.main([*pair, *STEPS, "--iters", "8", "--out", str(out), "--resume"]) == 0
    np.testing.assert_allclose(*metrics, rtol=1e-3)
    about = json.loads((tmp_path / "there" / "config.json").read_text())
    assert "http" not in about["sharer"]["name"] and about["sharer"]["name"]
    pair = ["--receiver", tiny_pair.receiver, "--sharer", url, "--data", str(chats)]
    assert train.main([*pair, *STEPS]) == 0
    (run,) = (cache_folder / "trained").iterdir()
    assert run.name == trained.pair_name(tiny_pair.receiver, tiny_pair.sharers[0])
    capsys.readouterr()
    (chats / "train.jsonl").write_text('{"prompt": "say it"}\n' * 9)
    assert train.main([*pair, *STEPS, "--answer-with", "sharer"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("c2c-train: ")]
    assert "read from afar, and writes nothing here" in line


def test_one_that_is_not_there_is_one_line(tiny_pair: Pair, chats: Path, capsys: Any) -> None:
    pair = ["--receiver", tiny_pair.receiver, "--sharer", "http://127.0.0.1:9"]
    assert train.main([*pair, "--data", str(chats), *STEPS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sharer http://127.0.0.1:9: " in line and "--mode" not in line
