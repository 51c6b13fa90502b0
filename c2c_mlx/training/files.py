"""Chats in files and in data sets of the hub, in mlx-lm's forms. No MLX here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.models import hub

Messages = list[dict[str, str]]

TRAIN, VALID = "train.jsonl", "valid.jsonl"


@dataclass(frozen=True)
class ChatRow:
    """One conversation to learn from; the last message is what the receiver is to say.

    Attributes:
        messages: role and content, in order.
        own: the answer is the receiver's own, so the sharer has nothing to add.
        cut: the answer was cut at a limit: that it ends there is not taught.
        answer_to: what the answering model sees of a row without an answer, where it is not what
            the fused receiver sees: the same in another language, with a document, a better prompt.
        where: file and line, for messages.
    """

    messages: Messages
    own: bool = False
    cut: bool = False
    answer_to: Messages | None = None
    where: str = field(default="", compare=False)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads JSON lines; lines without any text are passed over.

    Yields:
        File and line for messages, and the line's object.

    Raises:
        C2CError: if the file can't be read or is empty, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028 in a text
    except (OSError, UnicodeDecodeError) as e:
        raise C2CError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    n_rows = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise C2CError(f"{where}: not JSON") from None
        if not isinstance(row, dict):
            raise C2CError(f"{where}: not a JSON object")
        n_rows += 1
        yield where, row
    if not n_rows:
        raise C2CError(f"{path} is empty: it needs one JSON object per line")


def chat_of(row: dict[str, Any], where: str) -> Messages:
    """A row's chat, with an answer at its end or not: whatever mlx-lm would read it as.

    `prompt` with `completion` comes before `messages`, and these before a `prompt` alone.

    Raises:
        C2CError: beginning with `where`, if the row is in none of these forms.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise C2CError(f"{where}: 'prompt' and 'completion' must be texts")
        return [_said("user", prompt), _said("assistant", completion)]
    if (messages := row.get("messages")) is not None:
        return _messages(messages, where, "'messages'")
    if isinstance(prompt, str):
        return [_said("user", prompt)]
    raise C2CError(f"{where}: needs 'messages' (role, content) or 'prompt' and 'completion'")


def read_rows(path: Path, unanswered: bool = False) -> list[ChatRow]:
    """Reads a file of chats; a row may also hold `answer_to` (text or messages), `own` and `cut`.

    Args:
        path: the file.
        unanswered: whether rows without an answer are let through.

    Raises:
        C2CError: naming the file and the line that can't be read.
    """
    return [_row(row, where, unanswered) for where, row in read_objects(path)]


def read_source(name: str, unanswered: bool = False) -> tuple[list[ChatRow], list[ChatRow]]:
    """Chats to learn from, and to measure on if there are any, from a folder or the hub.

    Args:
        name: a folder with `train.jsonl` and perhaps `valid.jsonl`, or a data set's hub id.
        unanswered: whether rows without an answer are let through.

    Raises:
        C2CError: if there is no such source, or a row of it can't be read.
    """
    folder = Path(name)
    if not folder.is_dir() and hub.is_hub_id(name):
        return _read_hub(name, unanswered)
    if not (folder / TRAIN).is_file():
        raise C2CError(f"--data {name}: no {TRAIN} there; see c2c-train --help for its format")
    valid = folder / VALID
    return (
        read_rows(folder / TRAIN, unanswered),
        read_rows(valid, unanswered) if valid.is_file() else [],
    )


def _read_hub(name: str, unanswered: bool) -> tuple[list[ChatRow], list[ChatRow]]:
    try:
        import datasets
    except ImportError:
        raise C2CError(
            f"--data {name}: a data set of the hub needs pip install 'c2c-mlx[datasets]'"
        ) from None
    try:
        splits = list(datasets.get_dataset_split_names(name))
        found = {
            split: datasets.load_dataset(name, split=split)
            for split in ("train", "validation")
            if split in splits
        }
    except Exception as e:  # whatever the hub, the network and its file formats raise
        line = " ".join(str(e).split())[:200]
        raise C2CError(f"--data {name}: cannot be loaded from the hub ({line})") from None
    if not found.get("train"):
        raise C2CError(
            f"--data {name}: has no rows to train on, only {', '.join(splits) or 'nothing'}; write "
            f"those that you want into a folder's {TRAIN}"
        )
    train, valid = (
        [
            _row(row, f"{name} ({split}), row {n}", unanswered)
            for n, row in enumerate(found.get(split, []))
        ]
        for split in ("train", "validation")
    )
    return train, valid


def _row(row: Any, where: str, unanswered: bool) -> ChatRow:
    messages = chat_of(row, where)
    if not messages or (len(messages) < 2 and messages[-1]["role"] != "user"):
        raise C2CError(f"{where}: the assistant's message must come after at least one more")
    role = messages[-1]["role"]
    if role != "assistant" and not (unanswered and role == "user"):
        raise C2CError(
            f"{where}: the last message must be the assistant's; --answer-with has rows that end "
            "with the user's answered"
        )
    flags = {name: row.get(name) or False for name in ("own", "cut")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise C2CError(f"{where}: '{name}' must be true or false")
    return ChatRow(messages, **flags, answer_to=_answer_to(row, where), where=where)


def _answer_to(row: dict[str, Any], where: str) -> Messages | None:
    if (given := row.get("answer_to")) is None:
        return None
    if isinstance(given, str):
        return [_said("user", given)]
    messages = _messages(given, where, "'answer_to'")
    if not messages or messages[-1]["role"] != "user":
        raise C2CError(f"{where}: 'answer_to' must end with a message of the user")
    return messages


def _messages(given: Any, where: str, name: str) -> Messages:
    if not isinstance(given, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in given
    ):
        raise C2CError(f"{where}: {name} must be a list of messages, each with role and content")
    return [_said(m["role"], m["content"]) for m in given]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
