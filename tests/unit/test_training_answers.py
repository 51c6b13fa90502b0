"""Answers given to rows that have none: what the model sees, and where its answer ends."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from chat_sessions import thinker

from c2c_mlx import LanguageModel, load_model
from c2c_mlx.errors import C2CError
from c2c_mlx.text import thoughts
from c2c_mlx.training.answering import Answered, answered
from c2c_mlx.training.answers import BATCH, answer_rows, ended
from c2c_mlx.training.files import ChatRow, Messages
from c2c_mlx.training.run import RunConfig

Answer = Callable[..., list[ChatRow]]


@pytest.fixture
def answer(receiver: LanguageModel, tmp_path: Path) -> Answer:
    def answer(
        *rows: ChatRow, lm: LanguageModel = receiver, own: bool = True, n: int = 4, **options: Any
    ) -> list[ChatRow]:
        path = tmp_path / "answers.jsonl"
        return answer_rows(list(rows), lm, path, n, own, lambda done, total: None, **options)

    return answer


def ask(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def test_a_row_is_answered_by_what_its_answer_is_to(answer: Answer) -> None:
    twin = ask("What is your name?")
    foreign, english = answer(ChatRow(ask("Wie heißt du?"), answer_to=twin), ChatRow(twin))
    assert foreign.messages[:-1] == ask("Wie heißt du?")
    assert foreign.messages[-1] == english.messages[-1]
    assert foreign.messages[-1]["role"] == "assistant"
    # What the receiver answers to something else, it could not answer here.
    assert (foreign.own, english.own) == (False, True)


def test_what_cannot_be_learned_from_is_not_answered(
    answer: Answer, receiver: LanguageModel, tmp_path: Path
) -> None:
    lm = load_model(receiver.path)
    lm.tokenizer.chat_template = (
        "{% if messages[1:] %}{{ raise_exception('one at a time') }}{% endif %}"
        + lm.tokenizer.chat_template
    )
    short, long = ChatRow(ask("count")), ChatRow(ask("count " * 50))
    twice = ChatRow(ask("count") * 2, where="chats, line 3")
    foreign = ChatRow(ask("zähle " * 50), answer_to=ask("one"))
    brief = replace(foreign, messages=ask("zähle"))
    said: list[str] = []
    rows = short, long, twice, foreign, brief
    found = answer(*rows, lm=lm, longest=40, say=said.append)
    # An answer to two rows is given if one of them is short.
    assert [row.messages[:-1] for row in found] == [r.messages for r in (short, foreign, brief)]
    assert said[0].startswith("2 prompts are longer than 40 tokens")
    assert said[1].startswith("1 chats are left out, the first chats, line 3: the chat template")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert answer(*rows, until=0) == found, "resumed, with what there is"
    (known,) = answer(long)  # as an earlier version did
    assert answer(long, longest=40) == [known]


def test_an_answer_that_is_there_stays(answer: Answer) -> None:
    row = ChatRow([*ask("q"), {"role": "assistant", "content": "a"}], answer_to=ask("other"))
    assert answer(row) == [row]


@pytest.mark.parametrize(
    ("text", "cut", "expected"),
    [
        (" Paris.\nQuestion: And of Italy?", True, ("Paris.", False)),
        (" Paris.\n\nParis is large", True, ("Paris.", False)),
        (" Paris is the capital of", True, ("Paris is the capital of", True)),
        (" Paris.", False, ("Paris.", False)),
    ],
)
def test_an_answer_ends_at_the_first_stop_string(
    text: str, cut: bool, expected: tuple[str, bool]
) -> None:
    assert ended(text, cut, ("\nQuestion:", "\n\n")) == expected


def test_a_base_model_is_not_learned_from_beyond_its_answer(
    receiver: LanguageModel, answer: Answer, tmp_path: Path
) -> None:
    base = replace(receiver, has_own_template=False)
    (whole,) = answer(ChatRow(ask("count")), n=24)
    text = whole.messages[-1]["content"]
    assert len(text) > 4 and whole.cut
    (tmp_path / "answers.jsonl").unlink()

    class Stopping(LanguageModel):
        stop_strings = (text[3:5],)  # type: ignore[assignment]

    stopping = Stopping(**{k: v for k, v in vars(base).items() if k in base.__dataclass_fields__})
    (row,) = answer(ChatRow(ask("count")), lm=stopping, n=24)
    assert row.messages[-1]["content"] == text[: text.find(text[3:5])].strip() and not row.cut


@pytest.fixture
def counted(answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the receiver answers, whole, where thoughts have little room."""
    monkeypatch.setattr(thoughts, "BUDGET", 20)
    (whole,) = answer(ChatRow(ask("count")), n=24)
    (tmp_path / "answers.jsonl").unlink()
    text: str = whole.messages[-1]["content"]
    return text


def test_thoughts_are_not_taught(
    receiver: LanguageModel, answer: Answer, tmp_path: Path, counted: str
) -> None:
    """As of a model whose template begins them, asked to or not."""
    lm = replace(receiver, tokenizer=thinker(receiver, "assistant", end := counted[3:5]))
    (row,) = answer(ChatRow(ask("count")), lm=lm)
    content = row.messages[-1]["content"]
    behind = counted.partition(end)[2].strip()
    assert 0 < len(content) < len(behind) and behind.startswith(content) and row.cut
    said: list[str] = []
    lm = replace(receiver, tokenizer=thinker(receiver, "assistant", "<never>"))
    (tmp_path / "answers.jsonl").unlink()
    assert answer(ChatRow(ask("count")), lm=lm, say=said.append) == []
    assert said == ["1 prompts take more than 20 tokens of thought: left out"]


def test_thoughts_that_a_model_opens_by_itself_are_not_taught(
    receiver: LanguageModel, answer: Answer, tmp_path: Path, counted: str
) -> None:
    lm = replace(receiver, tokenizer=thinker(receiver, counted[:2], end := counted[3:5]))
    (row,) = answer(ChatRow(ask("count")), lm=lm)
    content, behind = row.messages[-1]["content"], counted.partition(end)[2].strip()
    assert 0 < len(content) < len(behind) and behind.startswith(content) and row.cut
    said: list[str] = []
    lm = replace(receiver, tokenizer=thinker(receiver, counted[:2], "<never>"))
    (tmp_path / "answers.jsonl").unlink()
    assert answer(ChatRow(ask("count")), lm=lm, say=said.append) == []
    assert said == ["1 prompts take more than 20 tokens of thought: left out"]


def test_another_model_or_limit_answers_anew(
    receiver: LanguageModel, sharer: LanguageModel, answer: Answer, tmp_path: Path
) -> None:
    row = ChatRow(ask("count"))
    first = answer(row)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert answer(row) == first and len(lines) == 1
    assert len(answer(row, n=9)[0].messages[-1]["content"]) > len(first[0].messages[-1]["content"])
    answer(row, lm=sharer)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 3


def test_an_answer_that_was_torn_costs_only_itself(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = answer(ChatRow(ask("count")))
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])  # killed while writing
    answer(ChatRow(ask("and again")))
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])
    assert answer(ChatRow(ask("count"))) == first
    assert path.read_text().splitlines() == lines
    path.write_bytes(path.read_bytes() + '["né'.encode()[:-1])  # inside of a character
    assert answer(ChatRow(ask("count"))) == first


def test_a_full_disk_is_one_line(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(C2CError, match=r"answers\.jsonl: cannot keep .*No space left") as e:
        answer(ChatRow(ask("count")))
    assert "\n" not in str(e.value)


def test_a_plan_without_time_for_answers_is_that_of_a_run(
    receiver: LanguageModel, tmp_path: Path
) -> None:
    run = RunConfig("", "", ("chats",), str(tmp_path), answer_with="receiver", answer_tokens=4)

    def planned(seconds: float) -> Answered:
        return answered(
            run,
            [[ChatRow(ask(f"count to {n}")) for n in range(70)]],
            [ChatRow(ask("measured"))],
            (receiver, receiver),
            lambda done, total: None,
            lambda line: None,
            resume=False,
            dry=True,
            deadline=time.monotonic() + seconds,
            room=1 << 30,
        )

    none = planned(-1.0)
    assert none.parts == [[]] and none.seconds == 0
    assert [row.messages[-1]["role"] for row in none.valid] == ["assistant"]
    assert len(planned(600).parts[0]) == 70


@pytest.mark.parametrize("dry", [False, True])
def test_a_large_part_to_measure_on_does_not_take_the_time(
    receiver: LanguageModel, tmp_path: Path, dry: bool
) -> None:
    run = RunConfig("", "", ("chats",), str(tmp_path), answer_with="receiver", answer_tokens=4)
    found = answered(
        run,
        [[ChatRow(ask("learned from"))]],
        [ChatRow(ask(f"count to {n}")) for n in range(3 * BATCH)],
        (receiver, receiver),
        lambda done, total: None,
        lambda line: None,
        resume=False,
        dry=dry,
        deadline=time.monotonic() - 1 if not dry else None,
        room=1 << 30,
    )
    assert len(found.valid) == (3 * BATCH if dry else BATCH)
    n_answers = len((tmp_path / "answers-receiver.jsonl").read_text().splitlines())
    assert n_answers == (BATCH + 1 if dry else BATCH)


@pytest.mark.parametrize("room", [0, 10_000_000])
def test_answers_take_no_more_memory_than_there_is(
    receiver: LanguageModel, tmp_path: Path, room: int
) -> None:
    run = RunConfig("", "", ("chats",), str(tmp_path), answer_with="receiver", answer_tokens=4)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = answered(
        run,
        [[ChatRow(ask(f"{n} " + "and on " * 100)) for n in range(64)]],
        [],
        (receiver, receiver),
        lambda done, total: None,
        lambda line: None,
        resume=False,
        dry=False,
        deadline=None,
        room=room,
    )
    assert len(found.parts[0]) == 64
    # Of one at a time where there is no room; estimates are right within 15 %.
    assert mx.get_peak_memory() - before < 1.15 * (room or 3_000_000)
