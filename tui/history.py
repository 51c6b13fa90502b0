"""The questions of earlier conversations, for the prompt: one file in the user's data folder."""

from __future__ import annotations

import json
from pathlib import Path

from c2c_mlx import atomic
from c2c_mlx.errors import C2CError
from c2c_mlx.models import paths
from c2c_mlx.tui import storage

LIMIT = 500  # questions
LONGEST = 4000  # characters; a text pasted into a question is not worth carrying along


def path() -> Path:
    """Where questions are kept."""
    return paths.data_home() / "history.json"


def load() -> list[str]:
    """The questions, the latest last; none if the file can't be read as what it should be."""
    try:
        kept = storage.read_json(path())
    except C2CError:
        return []
    texts = [q for q in kept if isinstance(q, str)] if isinstance(kept, list) else []
    # Half a surrogate pair is valid JSON, but no terminal takes it.
    return [q.encode(errors="replace").decode() for q in texts[-LIMIT:]]


def add(question: str) -> None:
    """Puts a question at the end; another app may have added to the file since it was read here.

    Raises:
        C2CError: if the disk won't have it.
    """
    if len(question) <= LONGEST:
        kept = [q for q in load() if q != question]
        atomic.write_text(path(), json.dumps([*kept, question][-LIMIT:], indent=0))
