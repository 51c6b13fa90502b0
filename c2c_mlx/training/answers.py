"""Answers for rows that are only a prompt, given once by one of the two models and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

from mlx_lm.generate import batch_generate

from c2c_mlx.models import LanguageModel
from c2c_mlx.training.data import Messages

BATCH = 32


def answer_rows(
    rows: list[Messages],
    lm: LanguageModel,
    path: Path,
    max_tokens: int,
    progress: Callable[[int, int], None],
) -> list[Messages]:
    """Answers the rows that end with the user, greedily; the others come back as they are.

    Args:
        rows: chats.
        lm: the model that answers.
        path: JSON lines of earlier answers; new ones are appended as they come, so an interrupted
            run loses one batch.
        max_tokens: an answer that is longer is cut there.
        progress: called with answers known and wanted.
    """
    known = _read(path)
    wanted = {_key(row): row for row in rows if row[-1]["role"] == "user"}
    missing = [key for key in wanted if key not in known]
    prompts = {
        key: lm.tokenizer.apply_chat_template(
            wanted[key], add_generation_prompt=True, enable_thinking=False
        )
        for key in missing
    }
    missing.sort(key=lambda key: len(prompts[key]))
    for at in range(0, len(missing), BATCH):
        keys = missing[at : at + BATCH]
        answers = batch_generate(
            lm.model, lm.tokenizer, [prompts[key] for key in keys], max_tokens=max_tokens
        ).texts
        fresh = dict(zip(keys, (a.strip() for a in answers), strict=True))
        _append(path, fresh)
        known |= fresh
        progress(len(wanted) - len(missing) + at + len(keys), len(wanted))
    return [
        [*row, {"role": "assistant", "content": known[_key(row)]}]
        if row[-1]["role"] == "user"
        else row
        for row in rows
    ]


def _key(row: Messages) -> str:
    return json.dumps(row, ensure_ascii=False)


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            key, answer = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing
        known[key] = answer
    return known


def _append(path: Path, answers: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for item in answers.items():
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
