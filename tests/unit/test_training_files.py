"""Chats on disk: what is read as what, and which line a mistake is in."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants

from c2c_mlx.errors import C2CError
from c2c_mlx.training.files import ChatRow, read_hub, read_objects, read_source
from c2c_mlx.training.layouts import chat_of


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


def read_rows(path: Path, **options: Any) -> list[ChatRow]:
    assert path.name == "train.jsonl"
    return read_source(str(path.parent), **options)[0]


def write(path: Path, *rows: Any) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")], "id": 3},
        "",
        {"prompt": "2 + 2?", "completion": "4"},
    )
    rows = read_rows(path)
    assert rows == [
        ChatRow([{"role": "system", "content": "s"}, user("q"), assistant("a")]),
        ChatRow([user("2 + 2?"), assistant("4")]),
    ]
    assert [row.where for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


def test_a_mark_of_utf_8_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '\ufeff{"prompt": "q", "completion": "a"}')
    assert read_rows(path) == [ChatRow([user("q"), assistant("a")])]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_array_is_called_so(tmp_path: Path, indent: int | None) -> None:
    rows = [{"prompt": "q", "completion": "a"}]
    path = write(tmp_path / "train.jsonl", json.dumps(rows, indent=indent))
    with pytest.raises(C2CError, match=r"is one array: .* `jq -c '\.\[\]' train\.jsonl`"):
        read_rows(path)


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0c", "\r\n", "a\tb"])
def test_a_text_may_hold_any_character(tmp_path: Path, odd: str) -> None:
    row = json.dumps({"prompt": f"a{odd}b", "completion": "c"}, ensure_ascii=False)
    path = tmp_path / "train.jsonl"
    path.write_bytes(f"{row}\r\n{row}".encode())
    assert read_rows(path) == [ChatRow([user(f"a{odd}b"), assistant("c")])] * 2


LAYOUTS = [
    ({"messages": [user("q"), assistant("a")], "prompt": "an identifier"}, "q"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q"),
    ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, "q"),
    ({"conversations": [user("q"), assistant("a")]}, "q"),
    ({"prompt": "q", "completion": "a"}, "q"),
    ({"instruction": "q", "input": "", "output": "a"}, "q"),
    ({"instruction": "q", "output": "a"}, "q"),
    (
        {"instruction": "q", "input": "about", "output": "a", "text": "### Instruction"},
        "q\n\nabout",
    ),
    ({"instruction": "q", "context": "about", "response": "a", "category": "c"}, "q\n\nabout"),
    ({"question": "q", "answer": "a", "messages": None}, "q"),
]


@pytest.mark.parametrize(("row", "asked"), LAYOUTS)
def test_layouts_that_are_known(tmp_path: Path, row: Any, asked: str) -> None:
    assert read_rows(write(tmp_path / "train.jsonl", row)) == [
        ChatRow([user(asked), assistant("a")])
    ]


def test_a_conversation_keeps_its_system_prompt_and_its_turns(tmp_path: Path) -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")]
    row = {"conversations": [{"from": who, "value": text, "weight": 1} for who, text in turns]}
    [chat] = read_rows(write(tmp_path / "train.jsonl", row))
    assert chat.messages == [
        {"role": "system", "content": "s"},
        *(user("q"), assistant("a"), user("r"), assistant("b")),
    ]


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize(("row", "asked"), LAYOUTS)
def test_layouts_through_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Any, asked: str, limit: int | None
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "train.jsonl", *[row] * 3)
    write(tmp_path / "validation.jsonl", row)
    parts = [{"split": s, "path": f"{s}.jsonl"} for s in ("train", "validation")]
    card = json.dumps({"configs": [{"config_name": "default", "data_files": parts}]})
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    train, valid = read_hub(str(tmp_path), limit)
    assert (len(train), len(valid)) == (limit or 3, 1)
    assert [chat_of(row, where) for where, row in train] == [[user(asked), assistant("a")]] * len(
        train
    )


def test_of_a_data_set_only_so_many_rows_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((name, options))
        for i in range(3):
            yield {"question": f"q{i}", "answer": "a"}
        raise AssertionError("more was read than was asked for")

    hub = ModuleType("datasets")
    hub.get_dataset_split_names = lambda name, revision: ["train"]  # type: ignore[attr-defined]
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    train, valid = read_source("org/name@abc", limit=3)
    assert [row.messages[0]["content"] for row in train] == ["q0", "q1", "q2"]
    assert (train[0].where, valid) == ("org/name@abc (train), row 0", [])
    assert asked == [("org/name", {"split": "train", "revision": "abc", "streaming": True})]


@pytest.mark.parametrize(
    ("row", "before", "asked"),
    [
        ({"question": "q", "context": "It was 1999.", "answer": "a"}, [], "q\n\nIt was 1999."),
        ({"question": "q", "context": "", "answer": "a"}, [], "q"),
        ({"instruction": "q", "input": "i", "response": "a"}, [], "q\n\ni"),
        ({"instruction": "q", "context": "c"}, [], "q\n\nc"),
        ({"prompt": "q", "completion": "a", "context": "c"}, [], "q"),
        ({"prompt": "q", "completion": "a", "system": "Be brief."}, [SYSTEM], "q"),
        ({"messages": [user("q"), assistant("a")], "system": "Be brief."}, [SYSTEM], "q"),
        ({"messages": [SYSTEM, user("q")], "system": "Be long."}, [SYSTEM], "q"),
        ({"conversations": [{"from": "human", "value": "q"}], "system": None}, [], "q"),
        (
            {"instruction": "q", "output": "a", "history": [["x", "y"]], "system": "Be brief."},
            [SYSTEM, user("x"), assistant("y")],
            "q",
        ),
        ({"instruction": "q", "output": "a", "history": [], "system": ""}, [], "q"),
    ],
)
def test_what_a_question_is_about_comes_along(
    row: dict[str, Any], before: list[dict[str, str]], asked: str
) -> None:
    chat = chat_of(row, "here")
    assert chat[: len(before) + 1] == [*before, user(asked)]
    assert chat[len(before) + 1 :] in ([assistant("a")], [])


def test_a_field_has_another_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl", {"query": "q", "reply": "a"}, {"prompt": "p", "reply": "b"}
    )
    rows = read_rows(path, fields={"prompt": "query", "completion": "reply"})
    assert rows == [ChatRow([user("q"), assistant("a")]), ChatRow([user("p"), assistant("b")])]


def test_rows_without_an_answer_are_let_through_on_request(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "q"},
        {"messages": [user("q")]},
        {"messages": [user("q"), assistant("a"), user("r")]},
        {"prompt": "q", "completion": "a"},
    )
    lasts = [row.messages[-1]["role"] for row in read_rows(path, unanswered=True)]
    assert lasts == ["user", "user", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("1", "not a JSON object"),
        ({}, "of its fields (none) no chat can be made: needs 'messages'"),
        ({"query": "q", "reply": "a", "id": 3}, "of its fields (query, reply, id)"),
        ({"query": "q", "reply": "a", "id": 3}, "--fields prompt=query,completion=reply"),
        ({"id": "x", "turns": [user("q")]}, "--fields messages=turns"),
        ({"conversations": "hi"}, "'conversations' must be a list of objects"),
        ({"conversations": [{"from": "bing", "value": "?"}]}, "one of system, human, user, gpt"),
        ({"conversations": [{"from": "human", "value": None}]}, "and 'value'"),
        ({"instruction": "i", "input": 3, "output": "o"}, "'instruction' and 'input' and 'output'"),
        ({"question": "q", "answer": 2}, "'question' and 'answer' must be texts"),
        ({"question": "q", "answer": "a", "history": "q"}, "a list of [question, answer]"),
        ({"question": "q", "answer": "a", "history": [["q"]]}, "a list of [question, answer]"),
        ({"question": "q"}, "--answer-with"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": 3}, assistant("a")]}, "each with role and"),
        ({"messages": []}, "after at least one more"),
        ({"messages": [assistant("a")]}, "after at least one more"),
        ({"messages": [user("q")]}, "the last message must be the assistant's"),
        ({"prompt": "q"}, "--answer-with"),
        ({"prompt": "q", "completion": 4}, "must be texts"),
        ({"prompt": "q", "completion": "a", "cut": "yes"}, "'cut' must be true or false"),
        ({"prompt": "q", "completion": "a", "by": 3}, "'by' must be the name of the model"),
        ({"prompt": "q", "completion": "a", "answer_to": 3}, "'answer_to' must be a list"),
        ({"prompt": "q", "completion": "a", "answer_to": [assistant("a")]}, "end with a message"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    good = {"prompt": "q", "completion": "a"}
    path = write(tmp_path / "train.jsonl", good, "", row, good)
    with pytest.raises(C2CError) as e:
        read_rows(path)
    assert str(e.value).startswith(f"{path}, line 3: ")
    assert message in str(e.value)


def test_a_file_that_cannot_be_read_or_is_empty(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="cannot read .*missing.jsonl: No such file"):
        list(read_objects(tmp_path / "missing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(C2CError, match=r"cannot read .*latin\.jsonl"):
        list(read_objects(tmp_path / "latin.jsonl"))
    with pytest.raises(C2CError, match=r"empty\.jsonl is empty"):
        list(read_objects(write(tmp_path / "empty.jsonl", "")))


def test_a_file_is_not_looked_for_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(C2CError, match=r"--data data/train\.jsonl: a file; give the folder"):
        read_source("data/train.jsonl")


def test_a_folder_may_lie_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "train.jsonl", {"prompt": "a", "completion": "b"})
    assert len(read_source("~")[0]) == 1


def test_a_row_with_prompt_and_messages_is_read_as_mlx_lm_reads_it(tmp_path: Path) -> None:
    chat = [user("q"), assistant("a")]
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "an identifier", "messages": chat},
        {"prompt": "p", "completion": "c", "messages": chat},
    )
    assert read_rows(path) == [ChatRow(chat), ChatRow([user("p"), assistant("c")])]


def test_a_row_may_say_what_its_answer_is_to(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "s"}, user("What is your name?")]
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "Wie heißt du?", "answer_to": "What is your name?"},
        {"messages": [user("Wie heißt du?")], "answer_to": asked, "own": False},
        {"prompt": "q", "completion": "a", "own": True, "cut": True},
    )
    rows = read_rows(path, unanswered=True)
    assert [row.answer_to for row in rows] == [[user("What is your name?")], asked, None]
    assert [(row.own, row.cut) for row in rows] == [(False, False)] * 2 + [(True, True)]
