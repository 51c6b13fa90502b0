"""Chats on disk: what is read as what, and which line a mistake is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from c2c_mlx.errors import C2CError
from c2c_mlx.training.files import ChatRow, read_rows


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


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


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x0c", "\r\n", "a\tb"])
def test_a_text_may_hold_any_character(tmp_path: Path, odd: str) -> None:
    row = json.dumps({"prompt": f"a{odd}b", "completion": "c"}, ensure_ascii=False)
    path = tmp_path / "train.jsonl"
    path.write_bytes(f"{row}\r\n{row}".encode())
    assert read_rows(path) == [ChatRow([user(f"a{odd}b"), assistant("c")])] * 2


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
        ("[1]", "not a JSON object"),
        ({}, "needs 'messages'"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, "'messages' must be a list"),
        ({"messages": [{"role": "user", "content": 3}, assistant("a")]}, "each with role and"),
        ({"messages": []}, "after at least one more"),
        ({"messages": [assistant("a")]}, "after at least one more"),
        ({"messages": [user("q")]}, "the last message must be the assistant's"),
        ({"prompt": "q"}, "--answer-with"),
        ({"prompt": "q", "completion": 4}, "must be texts"),
        ({"prompt": "q", "completion": "a", "cut": "yes"}, "'cut' must be true or false"),
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
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(C2CError, match=r"cannot read .*latin\.jsonl"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(C2CError, match=r"empty\.jsonl is empty"):
        read_rows(write(tmp_path / "empty.jsonl", ""))


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
