"""How a row of somebody's data becomes a chat: the layouts that are known. No MLX here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from c2c_mlx.errors import C2CError

Messages = list[dict[str, str]]
Row = Mapping[str, Any]

KNOWN = (
    "'messages' (role, content), 'conversations' (from, value), 'prompt' with 'completion', "
    "'instruction' with 'output', 'question' with 'answer' (and 'input' or 'context')"
)
# Question and answer, by the names that data sets give them; mlx-lm's first.
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_ABOUT = ("input", "context")  # what a question is about; a prompt says it itself
_FIELDS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "context"),
    *("output", "response", "question", "answer", "system", "history"),
)
# Who speaks, in 'conversations'; several names are around for each.
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class UnknownLayout(C2CError):
    """A row that is in no layout, by the names of its fields."""


def renamed(row: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """A row with its fields under names that are known.

    Args:
        row: one row of a data set.
        fields: known name -> the row's own name for it; a row without that field stays as it is.
    """
    return row | {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Checks what `renamed` is to do.

    Raises:
        ValueError: for a name that no layout has, or that is no text.
    """
    for ours, theirs in fields.items():
        if ours not in _FIELDS:
            raise ValueError(f"fields: '{ours}' is not one of {', '.join(_FIELDS)}")
        if not isinstance(theirs, str):
            raise ValueError(f"fields: what '{ours}' is called must be a text, not {theirs!r}")


def chat_of(row: Row, where: str) -> Messages:
    """A row's chat, with an answer at its end or not.

    What mlx-lm would read is read as it would: `prompt` with `completion` comes before `messages`.
    Then come conversations and the other pairs, and last a question alone. What a row calls its
    `system` prompt comes first, unless the chat has one; `history` comes before a question.

    Raises:
        UnknownLayout: beginning with `where`, if the row is in no layout that is known.
        C2CError: beginning with `where`, if it is in one, and broken.
    """
    chat, system = _chat(row, where), row.get("system")
    if not isinstance(system, str) or not system.strip() or any(_is_system(m) for m in chat):
        return chat
    return [said("system", system), *chat]


def _is_system(message: dict[str, str]) -> bool:
    return message["role"] == "system"


def _chat(row: Row, where: str) -> Messages:
    if _has(row, *_PAIRS[0]):
        return _asked(row, *_PAIRS[0], where)
    if _has(row, "messages"):
        return messages_of(row["messages"], where, "'messages'")
    if _has(row, "conversations"):
        return _conversation(row["conversations"], where)
    for question, answer in _PAIRS[1:]:
        if _has(row, question, answer):
            return _asked(row, question, answer, where)
    for question, _ in _PAIRS:
        if isinstance(row.get(question), str):
            return _asked(row, question, None, where)
    raise UnknownLayout(
        f"{where}: of its fields ({', '.join(row) or 'none'}) no chat can be made: needs {KNOWN}"
    )


def messages_of(given: Any, where: str, name: str) -> Messages:
    """A list of messages with role and content, and nothing else in them.

    Raises:
        C2CError: beginning with `where`, and calling the list `name`.
    """
    if not isinstance(given, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in given
    ):
        raise C2CError(
            f"{where}: {name} must be a list of messages, each with role and content (a text)"
        )
    return [said(m["role"], m["content"]) for m in given]


def said(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def _has(row: Row, *names: str) -> bool:
    """Whether a row has all of these; a table has a null where a row has no such field."""
    return all(row.get(name) is not None for name in names)


def _asked(row: Row, question: str, answer: str | None, where: str) -> Messages:
    about = () if question == "prompt" else _ABOUT
    names = [question, *(name for name in about if _has(row, name) and row[name] != "")]
    texts = [row[name] for name in (*names, *([answer] if answer else []))]
    if not all(isinstance(text, str) for text in texts):
        which = " and ".join(f"'{name}'" for name in (*names, *([answer] if answer else [])))
        raise C2CError(f"{where}: {which} must be texts")
    chat = [*_history(row, where), said("user", "\n\n".join(row[name] for name in names))]
    return [*chat, said("assistant", row[answer])] if answer else chat


def _history(row: Row, where: str) -> Messages:
    """The turns before a question, each a question and its answer."""
    chat: Messages = []
    for turn in row.get("history") or ():
        match turn:
            case [str(asked), str(answered)]:
                chat += [said("user", asked), said("assistant", answered)]
            case _:
                raise C2CError(f"{where}: 'history' must be a list of [question, answer]")
    return chat


def _conversation(given: Any, where: str) -> Messages:
    if isinstance(given, list) and all(isinstance(m, dict) and "from" not in m for m in given):
        return messages_of(given, where, "'conversations'")
    chat = []
    for m in given if isinstance(given, list) else [None]:
        speaker, value = (m.get("from"), m.get("value")) if isinstance(m, dict) else (None, None)
        if speaker not in _ROLES or not isinstance(value, str):
            raise C2CError(
                f"{where}: 'conversations' must be a list of objects with 'from' (one of "
                f"{', '.join(_ROLES)}) and 'value'"
            )
        chat.append(said(_ROLES[speaker], value))
    return chat


def example(row: Row) -> str:
    """What one might type for this row: a guess from what its fields hold."""
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"messages={name}"
    texts = [name for name, value in row.items() if isinstance(value, str)]
    question, answer = texts[:2] if len(texts) > 1 else ("QUESTION", "ANSWER")
    return f"prompt={question},completion={answer}"
