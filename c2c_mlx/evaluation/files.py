"""JSON lines -> items; what a file's rows look like decides which task it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.agreement import Agreement
from c2c_mlx.evaluation.choice import LETTERS, Choice, Method
from c2c_mlx.evaluation.reference import Reference
from c2c_mlx.evaluation.task import Item, Messages, Task

FORMS = "'question' with 'choices' and 'answer', 'messages', 'prompt' with or without 'completion'"


def read(path: Path, method: Method) -> tuple[Task, list[Item]]:
    """Reads a file of one kind of rows.

    Args:
        path: JSON lines; `lang` or `subject` of a row is its group.
        method: of multiple choice.

    Raises:
        C2CError: naming the file and the line that can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028 in a text
    except (OSError, UnicodeDecodeError) as e:
        raise C2CError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    items: list[Item] = []
    kinds: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            kind, item = _item(line, str(number), where)
            kinds.setdefault(kind, where)
            items.append(item)
            if len(kinds) > 1:
                first = next(iter(kinds))
                raise C2CError(f"{where}: a row of kind {kind} among rows of kind {first}")
    if not items:
        raise C2CError(f"{path} is empty: it needs one JSON object per line")
    task = make(next(iter(kinds)), method)
    return task, [task.asked(item) for item in items]


def make(kind: str, method: Method) -> Task:
    """The task that scores items of this kind."""
    if kind == "choice":
        return Choice(method)
    return Reference() if kind == "chat" else Agreement()


def _item(line: str, number: str, where: str) -> tuple[str, Item]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise C2CError(f"{where}: not JSON") from None
    if not isinstance(row, dict):
        raise C2CError(f"{where}: needs {FORMS}")
    group = next((row[k] for k in ("lang", "subject") if isinstance(row.get(k), str)), "")
    if "choices" in row:
        return "choice", choice_item(row, number, group, where)
    messages = _messages(row, where)
    if messages[-1]["role"] == "user":
        return "agreement", Item(number, messages, group=group)
    *messages, last = messages
    if not last["content"].strip():
        raise C2CError(f"{where}: the reference answer is empty")
    return "chat", Item(number, messages, last["content"], group=group)


def choice_item(row: dict[str, Any], number: str, group: str, where: str) -> Item:
    """A multiple-choice row; `answer` is an index from 0 on, or a letter.

    Raises:
        C2CError: beginning with `where`.
    """
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise C2CError(f"{where}: 'question' must be a text")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise C2CError(f"{where}: 'choices' must be a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise C2CError(f"{where}: {len(choices)} choices; there must be 2 to {len(LETTERS)}")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        answer = letters[answer]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise C2CError(f"{where}: 'answer' must be 0 to {len(choices) - 1}, or a letter")
    return Item(number, [{"role": "user", "content": question}], answer, tuple(choices), group)


def _messages(row: dict[str, Any], where: str) -> Messages:
    """The whole chat, the reference answer last if there is one."""
    if "prompt" in row:
        said = [row["prompt"], *([row["completion"]] if "completion" in row else [])]
        if not all(isinstance(text, str) for text in said):
            raise C2CError(f"{where}: 'prompt' and 'completion' must be texts")
        roles = ("user", "assistant")
        messages = [{"role": r, "content": t} for r, t in zip(roles, said, strict=False)]
    else:
        given = row.get("messages")
        if not isinstance(given, list) or not all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in given
        ):
            raise C2CError(f"{where}: needs {FORMS}")
        messages = [{"role": m["role"], "content": m["content"]} for m in given]
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not asked or asked[-1]["role"] != "user" or not asked[-1]["content"].strip():
        raise C2CError(f"{where}: a message of the user must come before the answer")
    return messages
