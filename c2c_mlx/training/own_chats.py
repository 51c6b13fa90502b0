"""What was asked in the app, from the session files that it left here. No MLX here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.models import paths
from c2c_mlx.training.layouts import Messages, said

# Whose answers stand before a question, in this order: what C2C remembers, else what others said.
_REMEMBERED = ("c2c", "relay", "receiver", "sharer")


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every question of the saved sessions once, behind what had been said before it, unanswered.

    Yields:
        File and turn for messages, and a row of `messages`.

    Raises:
        C2CError: if there is no question in any session.
    """
    folder = paths.data_home() / "sessions"
    seen: set[str] = set()
    for path in sorted(folder.glob("[!.]*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            chats = list(_chats(document))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # damaged, or of another version: the app says so where it lists them
        for number, chat in enumerate(chats, 1):
            if (key := repr(chat)) not in seen:
                seen.add(key)
                yield f"{path}, turn {number}", {"messages": chat}
    if not seen:
        raise C2CError(f"no session in {folder} holds a question: chat in the app first, c2c-chat")


def _chats(document: dict[str, Any]) -> Iterator[Messages]:
    """A session's questions, each with the conversation that it was asked in."""
    system = document["system"]
    before: Messages = [said("system", str(system))] if system else []
    for turn in document["turns"]:
        asked = said("user", str(turn["question"]))
        yield [*before, asked]
        takes = turn.get("takes") or [turn]  # of the format before this one
        answers = {mode: a["text"] for take in takes for mode, a in take["answers"].items()}
        kept = next((a for m in _REMEMBERED if (a := str(answers.get(m, "")).strip())), None)
        if kept:  # a question without an answer is not remembered
            before += [asked, said("assistant", kept)]
