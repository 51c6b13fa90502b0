"""JSON lines -> items; what a file's rows look like decides which task it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.agreement import Agreement
from c2c_mlx.evaluation.choice import LETTERS, Choice, Method
from c2c_mlx.evaluation.fact import Fact
from c2c_mlx.evaluation.reference import Reference
from c2c_mlx.evaluation.task import Item, Task
from c2c_mlx.training.files import read_objects
from c2c_mlx.training.layouts import UnknownLayout, chat_of


def read(path: Path, method: Method) -> tuple[Task, list[Item]]:
    """Reads a file of one kind of rows.

    Args:
        path: JSON lines, multiple choice or chats in the layouts that `c2c-train` reads, with
            `accept` for questions of fact; `lang` or `subject` of a row is its group, and `cut`
            says that its answer was cut at a limit.
        method: of multiple choice.

    Raises:
        C2CError: naming the file and the line that can't be read.
    """
    items: list[Item] = []
    kinds: dict[str, str] = {}
    for where, row in read_objects(path):
        kind, item = _item(row, where.rpartition(" ")[2], where)
        kinds.setdefault(kind, where)
        items.append(item)
        if len(kinds) > 1:
            first = next(iter(kinds))
            raise C2CError(f"{where}: a row of kind {kind} among rows of kind {first}")
    task = make(next(iter(kinds)), method)
    return task, [task.asked(item) for item in items]


def make(kind: str, method: Method) -> Task:
    """The task that scores items of this kind."""
    if kind == "choice":
        return Choice(method)
    if kind == "fact":
        return Fact()
    return Reference() if kind == "chat" else Agreement()


def _item(row: dict[str, Any], number: str, where: str) -> tuple[str, Item]:
    group = next((row[k] for k in ("lang", "subject") if isinstance(row.get(k), str)), "")
    if "choices" in row:
        return "choice", choice_item(row, number, group, where)
    try:
        messages = chat_of(row, where)
    except UnknownLayout as e:
        raise C2CError(f"{e}, or 'choices' with 'question' and 'answer'") from None
    asked = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not asked or asked[-1]["role"] != "user" or not asked[-1]["content"].strip():
        raise C2CError(f"{where}: a message of the user must come before the answer")
    if "accept" in row:
        accept = row["accept"]
        said = isinstance(accept, list) and all(isinstance(x, str) and x.strip() for x in accept)
        if not said or not accept:
            raise C2CError(f"{where}: 'accept' must be a list of texts")
        return "fact", Item(number, asked, " | ".join(accept), tuple(accept), group)
    if asked == messages:
        return "agreement", Item(number, messages, group=group)
    if not messages[-1]["content"].strip():
        raise C2CError(f"{where}: the reference answer is empty")
    cut = row.get("cut", False) is True
    return "chat", Item(number, asked, messages[-1]["content"], group=group, cut=cut)


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
