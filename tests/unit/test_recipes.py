"""Recipes: those of the package, somebody's own, and what is taken where nobody says."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import pytest
from hub_server import Hub
from huggingface_hub import constants

from c2c_mlx import Fuser, events
from c2c_mlx.commands import train
from c2c_mlx.config import Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.training import own_chats, recipe
from c2c_mlx.training.files import ChatRow, answers_for, read_hub, read_source
from c2c_mlx.training.recipes.pack import pack
from c2c_mlx.training.run import described
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.session_file import SessionFile

TINY = Path(__file__).parents[1] / "golden" / "data" / "e2e" / "qwen3_llama"
PAIR = ["--sharer", str(TINY / "sharer"), "--receiver", str(TINY / "receiver")]
SHORT = ["--iters", "4", "--batch-size", "4", "--preset", "tiny", "--rows", "3"]
SHORT += ["--answers", "2"]
DATA_SET = "databricks/databricks-dolly-15k"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "home"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: Any) -> tuple[int, str, str]:
        code = train.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the data sets library really asks."""
    datasets = pytest.importorskip("datasets")
    with Hub() as hub:
        online(monkeypatch, hub.address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        yield hub


def online(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# --- what the package has


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_of_the_package_describes_a_run(name: str) -> None:
    text = (recipe.FOLDER / f"{name}.yaml").read_text()
    assert re.search(r"^why: >\n( .+\n){3}", text) and "\nlicence: " in text
    values = recipe.read(name)
    run = described({"sharer": "s", "receiver": "r", "out": "o"} | values)
    assert run.licence
    for source, weight in run.sources:
        assert weight
        if source.startswith("package:"):
            rows, valid = read_source(source, unanswered=True)
            assert len(rows) > 50 and 8 <= len(valid) <= 16


def test_the_text_in_the_package_is_small_and_says_whose_it_is() -> None:
    folder = recipe.FOLDER / "reading"
    assert sum(p.stat().st_size for p in folder.rglob("*.xz")) < 4e6
    text = (folder / "ATTRIBUTION.md").read_text()
    assert all(f"`{part.name}`" in text for part in folder.iterdir() if part.is_dir())


def test_the_list_of_recipes(call: Call) -> None:
    code, out, _ = call("--recipe", "list")
    assert code == 0 and {"chat", "mine", "reading"} <= set(out.split("\n"))
    assert DATA_SET in out and "CC BY-SA 3.0" in out and str(recipe.FOLDER) in out


# --- which one is taken


def test_offline_the_text_of_the_package_is_taken_and_a_run_remembers_it(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = tmp_path / "run"
    code, _, err = call(*PAIR, *SHORT, "--answer-tokens", "2", "--out", out)
    assert code == 0, err
    assert err.splitlines()[0].startswith("no --data: the recipe reading, whose text is here, for")
    found = Fuser.load(out).provenance
    assert "package:reading/trivia" in found.data and "Tatoeba" in found.data_licence
    assert "OpenTriviaQA CC BY-SA 4.0" in (out / "README.md").read_text()
    told = recipe.read(str(out / "run.yaml"))
    assert (told["rows"], told["answer_with"]) == (3, "receiver")
    # Nothing is said again; that the hub can be had now changes nothing.
    hub.repositories[DATA_SET] = {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    code, _, err = call("--resume", "--out", out, "--iters", "6")
    assert code == 0 and "no --data" not in err and "iters was 4, is 6 from here on" in err


def test_the_hub_is_taken_where_it_answers(hub: Hub) -> None:
    hub.repositories[DATA_SET] = {}
    assert recipe.default()[0] == "chat"
    assert hub.requests[-1] == f"GET /api/datasets/{DATA_SET}/auth-check"
    del hub.repositories[DATA_SET]
    assert recipe.default()[0] == "reading"


def test_a_hub_that_is_out_of_reach_or_silent_does_not_keep_anybody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recipe, "_PATIENCE", 0.5)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        online(monkeypatch, address)
        name, line = recipe.default()
        assert name == "reading" and "does not answer" in line
    for thread in threading.enumerate():
        if thread.name == recipe.ASKING:
            thread.join()
    assert recipe.default()[0] == "reading"  # nobody listens there any more
    assert time.monotonic() - began < 30


def test_without_the_library_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install 'c2c-mlx[datasets]'" in recipe.default()[1]


# --- somebody's own


def test_later_recipes_override_earlier_ones_and_flags_override_all(
    call: Call, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"why: because\nsharer: {TINY / 'sharer'}\nreceiver: {TINY / 'receiver'}\niters: 99\n"
        "data: [package:reading/trivia]\npreset: tiny\nrows: 5\n"
    )
    given = ["--recipe", "reading", "--config", tmp_path / "mine.yaml", "--iters", "2"]
    code, _, err = call(*given, "--out", tmp_path / "run")
    assert code == 0 and "5 chats, 5 for validation" in err
    found = Fuser.load(tmp_path / "run").provenance
    assert (found.data, found.steps) == (("package:reading/trivia",), 2)
    assert found.data_licence == ""  # that of reading is another data's


def test_a_fuser_to_start_from_takes_the_place_of_the_one_that_a_recipe_describes(
    call: Call, tmp_path: Path
) -> None:
    pair = ["--sharer", TINY / "sharer", "--receiver", TINY / "receiver", *SHORT, "--answers", "0"]
    (tmp_path / "r.yaml").write_text(
        "data: [package:reading/trivia]\nlicence: one\nfuser_config: {dropout: 0.25}\n"
    )
    given = [*pair, "--recipe", tmp_path / "r.yaml"]
    assert call(*given, "--out", tmp_path / "first")[0] == 0
    (tmp_path / "r.yaml").write_text(
        "data: [package:reading/questions]\nlicence: other\nfuser_config: {dropout: 0.5}\n"
    )
    code, _, err = call(*given, "--fuser", tmp_path / "first", "--out", tmp_path / "second")
    assert code == 0, err
    found = Fuser.load(tmp_path / "second")
    assert found.config.dropout == 0.25
    assert found.provenance.data == ("package:reading/trivia", "package:reading/questions")
    assert found.provenance.data_licence == "one; other"


def test_answers_of_another_receiver_are_not_this_ones() -> None:
    rows = [
        ChatRow([user("q"), assistant("a")]),
        ChatRow([user("q"), assistant("a")], own=True, cut=True, by="smollm2-135m"),
        ChatRow([user("f"), assistant("a")], by="smollm2-135m", answer_to=[user("e")]),
        ChatRow([user("f"), assistant("a")], by="smollm2-135m"),
    ]
    assert answers_for(rows, "HuggingFaceTB/SmolLM2-135M-Instruct") == rows
    assert answers_for(rows, "qwen") == [
        rows[0],
        ChatRow([user("q")]),
        ChatRow([user("f")], answer_to=[user("e")]),
    ]


def test_what_was_asked_in_the_app(home: Path) -> None:
    with pytest.raises(C2CError, match="holds a question: chat in the app first"):
        read_source("mine:sessions", unanswered=True)
    talk = Conversation(Pair("r", ("s",), ("f",)), system="be brief")
    for question, answer in (("one?", "first"), ("two?", ""), ("three?", "third")):
        talk.begin(question, ["c2c", "receiver"], ())
        for mode, text in (("c2c", answer), ("receiver", "another")):
            talk.record(events.Finished(mode, text, "", "stop", None))
    file = SessionFile()
    file.save(talk)
    file.close()
    (home / "sessions" / "broken.json").write_text("{")
    rows, valid = read_source("mine:sessions", unanswered=True)
    system = {"role": "system", "content": "be brief"}
    first = [system, user("one?")]
    second = [*first, assistant("first"), user("two?")]
    third = [*second, assistant("another"), user("three?")]
    assert [row.messages for row in rows] == [first, second, third] and valid == []
    assert len(list(own_chats.rows())) == 3


def test_a_run_goes_on_whatever_was_asked_since(call: Call, home: Path, tmp_path: Path) -> None:
    def ask(number: int) -> None:
        session = {"system": "", "turns": [{"question": f"What is {number}?", "answers": {}}]}
        (home / "sessions" / f"{number}.json").write_text(json.dumps(session))

    (home / "sessions").mkdir(parents=True)
    for number in range(1, 25):
        ask(number)
    given = [*PAIR, "--recipe", "mine", "--preset", "tiny", "--answer-tokens", "4"]
    out = tmp_path / "run"
    code, _, err = call(*given, "--iters", "2", "--out", out)
    assert code == 0, err
    ask(0)
    code, _, err = call("--resume", "--out", out, "--iters", "3")
    assert code == 0 and Fuser.load(out).provenance.steps == 3, err
    assert Fuser.load(out).provenance.data == ("mine:sessions",)


def test_packing_says_who_answered(tmp_path: Path) -> None:
    foreign = {"messages": [user("f"), assistant("a")], "answer_to": "e", "lang": "fr"}
    parts = {
        "reading": [foreign],
        "english": [{"messages": [user("q"), assistant("b")], "own": True, "cut": True}],
        "translation": [{"messages": [user("t"), assistant("c")], "lang": "fr"}],
        "conversations": [{"messages": [user("q"), assistant("b"), *foreign["messages"]]}],
        "dropped": [foreign],
    }
    for name, rows in parts.items():
        for split in ("train", "valid"):
            path = tmp_path / "out" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(tmp_path / "out", tmp_path / "packed", "smollm2-135m")
    assert not (tmp_path / "packed" / "dropped").exists()
    found = {n: read_source(str(tmp_path / "packed" / n))[0][0] for n in parts if n != "dropped"}
    assert {n: (r.by, r.own, r.cut, bool(r.answer_to)) for n, r in found.items()} == {
        "reading": ("smollm2-135m", False, False, True),
        "english": ("smollm2-135m", True, True, False),
        "translation": ("", False, False, False),
        "conversations": ("smollm2-135m", False, False, True),
    }


def test_a_packed_file_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.xz").write_bytes(b"not xz")
    with pytest.raises(C2CError, match=r"cannot read .*train\.jsonl\.xz"):
        read_source(str(tmp_path))


# --- the hub


@pytest.mark.parametrize("limit", [2, None])
def test_rows_come_from_the_hub(hub: Hub, limit: int | None) -> None:
    row = {"instruction": "i", "context": "c", "response": "r", "category": "open_qa"}
    hub.repositories["org/name"] = {"data.jsonl": (json.dumps(row) + "\n").encode() * 3}
    train_rows, valid = read_source("org/name", limit=limit)
    assert [r.messages for r in train_rows] == [[user("i\n\nc"), assistant("r")]] * (limit or 3)
    assert valid == []


def test_what_the_hub_refuses_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/gated"] = {"data.jsonl": b"{}"}
    hub.gated.add("org/gated")
    with pytest.raises(C2CError, match="accept its terms at https://huggingface.co/datasets/org"):
        read_hub("org/gated", 3)
    with pytest.raises(C2CError, match="the hub has no org/missing: check the spelling"):
        read_hub("org/missing", 3)
    hub.repositories["org/empty"] = {"README.md": b""}
    with pytest.raises(C2CError, match="--data org/empty: cannot be loaded from the hub"):
        read_hub("org/empty", 3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", True)
    with pytest.raises(C2CError, match="the download of org/name needs the hub: unset HF_HUB_OFF"):
        read_hub("org/name", 3)


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "+5E-4", ".05e-2"])
def test_a_number_is_one_however_it_is_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"learning_rate: {text}\nout: 5e-4x")
    found = recipe.read(str(tmp_path / "run.yaml"))
    assert found == {"learning_rate": 0.0005, "out": "5e-4x"}


def test_what_is_left_empty_is_no_folder(tmp_path: Path) -> None:
    recipe.write(tmp_path / "run.yaml", {"fuser": "", "data": [str(tmp_path)]})
    assert recipe.read(str(tmp_path / "run.yaml")) == {"fuser": "", "data": [str(tmp_path)]}


def test_data_may_have_a_weight_or_none(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {chats: 0.8, more: }")
    assert recipe.read(str(tmp_path / "run.yaml"))["data"] == ["chats=0.8", "more"]
