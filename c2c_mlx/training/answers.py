"""Answers for rows that are only a prompt, given once by one of the two models and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

from mlx_lm.generate import batch_generate

from c2c_mlx.models.load import LanguageModel
from c2c_mlx.training.data import Chat, Messages

BATCH = 32

Answer = tuple[str, bool]  # text, and whether it was cut at the limit


def answer_rows(
    rows: list[Chat],
    lm: LanguageModel,
    path: Path,
    max_tokens: int,
    own: bool,
    progress: Callable[[int, int], None],
) -> list[Chat]:
    """Answers the rows that end with the user, greedily; the others come back as they are.

    Args:
        rows: chats.
        lm: the model that answers.
        path: JSON lines of earlier answers; new ones are appended as they come, so an interrupted
            run loses one batch.
        max_tokens: an answer that is longer is cut there.
        own: whether `lm` is the receiver.
        progress: called with answers known and wanted.
    """
    known = _read(path)
    wanted = {_key(row.messages): row.messages for row in rows if _is_open(row)}
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
            lm.model,
            lm.tokenizer,
            [prompts[key] for key in keys],
            max_tokens=max_tokens,
            return_token_ids=True,
        )
        assert answers.token_ids is not None
        fresh: dict[str, Answer] = {
            key: (text.strip(), len(ids) >= max_tokens)
            for key, text, ids in zip(keys, answers.texts, answers.token_ids, strict=True)
        }
        _append(path, fresh)
        known |= fresh
        progress(len(wanted) - len(missing) + at + len(keys), len(wanted))
    return [
        _answered(row, known[_key(row.messages)], own) if _is_open(row) else row for row in rows
    ]


def _is_open(row: Chat) -> bool:
    return row.messages[-1]["role"] == "user"


def _answered(row: Chat, answer: Answer, own: bool) -> Chat:
    text, cut = answer
    messages = [*row.messages, {"role": "assistant", "content": text}]
    return replace(row, messages=messages, own=own, cut=cut)


def _key(messages: Messages) -> str:
    return json.dumps(messages, ensure_ascii=False)


def _read(path: Path) -> dict[str, Answer]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            key, text, cut = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing
        known[key] = (text, cut)
    return known


def _append(path: Path, answers: dict[str, Answer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for key, answer in answers.items():
            file.write(json.dumps([key, *answer], ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
