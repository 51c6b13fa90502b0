"""Fusers that were trained here: where they go, and which of a pair's fusers a command takes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from c2c_mlx.commands import train, weights
from c2c_mlx.config import Pair
from c2c_mlx.errors import NoFuserError
from c2c_mlx.fusers import disk, store, trained
from c2c_mlx.models import registry
from c2c_mlx.training import checkpoints


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def put(fuser: Path, receiver: str, sharer: str) -> Path:
    run = trained.next_run(receiver, sharer)
    shutil.copytree(fuser, run)
    return run


def test_a_pair_is_called_by_aliases_where_there_are_any(tmp_path: Path) -> None:
    assert trained.pair_name("mlx-community/Llama-3.2-1B-Instruct-4bit", "qwen") == "llama+qwen"
    assert trained.pair_name("org/m", "qwen") == "org--m+qwen"
    (folder := tmp_path / "My Model").mkdir()
    assert re.fullmatch(r"My-Model-[0-9a-f]{6}\+qwen", trained.pair_name(str(folder), "qwen"))


def test_models_that_are_called_alike_have_fusers_of_their_own(
    tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "m")
    own = put(Path(tiny_pair.fusers[0]), ".", "gemma3-270m")
    monkeypatch.chdir(tmp_path)
    assert store.find_for_pair("a/m", "gemma3-270m", None) == own
    with pytest.raises(NoFuserError):
        store.find_for_pair("b/m", "gemma3-270m", None)
    assert trained.pair_name("org1/m", "qwen") != trained.pair_name("org2/m", "qwen")


def test_the_latest_is_the_pairs_own(tiny_pair: Pair) -> None:
    fuser, pair = Path(tiny_pair.fusers[0]), (tiny_pair.receiver, tiny_pair.sharers[0])
    with pytest.raises(NoFuserError):
        store.find_for_pair(*pair, None)
    first, second = put(fuser, *pair), put(fuser, *pair)
    (unfinished := trained.next_run(*pair)).mkdir()
    assert trained.runs(*pair) == [first, second, unfinished]
    assert store.find_for_pair(*pair, None) == second
    assert store.find_for_pair(*pair, f"{trained.pair_name(*pair)}/1") == first
    with pytest.raises(NoFuserError):
        store.find_for_pair(*pair[::-1], None)  # the reverse has none of it


def test_a_run_makes_room_for_the_next_if_it_came_to_nothing_and_is_over() -> None:
    first = trained.next_run("qwen", "llama")
    with checkpoints.alone_in(first):
        assert checkpoints.place("qwen", "llama") == trained.next_run("qwen", "llama") != first
    assert checkpoints.place("qwen", "llama") == first


def test_shipped_before_own_before_published(tiny_pair: Pair) -> None:
    fuser = Path(tiny_pair.fusers[0])
    put(fuser, *registry.default_pair())
    entry = store.find_entry("smollm2-135m+gemma3-270m")
    assert entry and store.find_for_pair(*registry.default_pair(), None) == entry.shipped
    own = put(fuser, "qwen", "llama")  # for which one is published
    assert store.find_for_pair("qwen", "llama", None) == own


def test_the_list_says_which_fuser_a_pair_gets(
    tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    fuser = Path(tiny_pair.fusers[0])
    for _ in range(2):
        put(fuser, *registry.default_pair())  # for which one is shipped
        put(fuser, "qwen", "llama")  # for which one is published
    put(fuser, "gemma3-270m", "smollm2-135m")
    assert weights.main(["list"]) == 0
    listed = capsys.readouterr().out.partition("\nfusers")[2].splitlines()[1:-1]
    marked = {line.split()[1] for line in listed if line.startswith("* ")}
    assert {"smollm2-135m+gemma3-270m", "qwen+llama/2", "gemma3-270m+smollm2-135m/1"} <= marked
    assert not marked & {"smollm2-135m+gemma3-270m/2", "qwen+llama/1", "qwen+llama"}
    assert "qwen+qwen2.5" in marked  # published, and none was trained here


def test_train_without_a_place_then_list_and_remove(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"prompt": f"say {i}", "completion": f"{i}"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    sharer, receiver = tiny_pair.sharers[0], tiny_pair.receiver
    arguments = ["--sharer", sharer, "--receiver", receiver, "--data", str(tmp_path)]
    assert train.main([*arguments, "--iters", "2", "--batch-size", "2", "--preset", "tiny"]) == 0
    said = capsys.readouterr().err
    name = f"{trained.pair_name(receiver, sharer)}/1"
    assert f"--fuser {name}" in re.sub(r"\s+", " ", said)
    folder = store.find_for_pair(receiver, sharer, None)
    assert disk.read_description(folder)[1].steps == 2
    assert train.main([*arguments, "--preset", "small", "--resume"]) == 2
    assert (
        "fuser_config.hidden_dim was 64" in capsys.readouterr().err
    )  # it found the run, which was another one
    assert train.main([*arguments, "--iters", "3", "--resume"]) == 0  # the rest as it was told
    assert disk.read_description(folder)[1].steps == 3
    capsys.readouterr()
    assert weights.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(rf"\* {re.escape(name)} +\S+ \wB +trained here", listed)
    with checkpoints.alone_in(folder):
        assert weights.main(["remove", name]) == 2
        assert "a run is going on there" in capsys.readouterr().err
    assert weights.main(["remove", name]) == 0
    assert trained.latest(receiver, sharer) is None
