"""What the app remembers from one start to the next: its theme, and what was asked."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from c2c_mlx import paths
from c2c_mlx.errors import C2CError
from c2c_mlx.tui import storage

QUESTIONS = 500  # the latest ones


class Memory:
    """A small file that nobody misses: a damaged one is an empty one, a full disk is no error.

    Args:
        path: where it is; None: everything is forgotten when the app is left.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.theme, self.questions = self._read()

    @classmethod
    def of_user(cls) -> Memory:
        """The one in the user's data folder."""
        return cls(paths.data_home() / "app.json")

    def keep_theme(self, name: str) -> None:
        """Begins with this theme the next time."""
        _, questions = self._read()  # another app may have been asked meanwhile
        self._write(name, questions)

    def keep_question(self, question: str) -> None:
        """Offers this question the next time, the latest one first."""
        theme, questions = self._read()
        self._write(theme, [*(q for q in questions if q != question), question])

    def _read(self) -> tuple[str, list[str]]:
        found: Any = None
        if self.path is not None:
            with suppress(C2CError):
                found = storage.read_json(self.path)
        if not isinstance(found, dict):
            return "", []
        theme, questions = found.get("theme"), found.get("questions")
        kept = [q for q in questions if isinstance(q, str)] if isinstance(questions, list) else []
        return theme if isinstance(theme, str) else "", kept

    def _write(self, theme: str, questions: list[str]) -> None:
        if self.path is not None:
            with suppress(C2CError):
                kept = {"theme": theme, "questions": questions[-QUESTIONS:]}
                storage.write(self.path, json.dumps(kept, ensure_ascii=False) + "\n")
