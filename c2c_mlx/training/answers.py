"""Answers for rows that are only a prompt, given once by one of the two models and kept on disk."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import batch_generate

from c2c_mlx import atomic, device
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.models import memory
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.text import thoughts
from c2c_mlx.text.rendering import Refused, Tokenizer, render
from c2c_mlx.text.tokens import tokenize
from c2c_mlx.training.dataset import refusals
from c2c_mlx.training.date import on_a_fixed_day
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.fingerprint import of_weights
from c2c_mlx.training.layouts import Messages

BATCH = 64
_THINKING = 8  # at a time, where thoughts come first: they are many times as long as answers

Answer = tuple[str, bool]  # text, and whether it was cut at the limit


def answer_rows(
    rows: list[ChatRow],
    lm: LanguageModel,
    path: Path,
    max_tokens: int,
    own: bool,
    progress: Callable[[int, int], None],
    until: float = math.inf,
    longest: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
    at_once: Callable[[int], int] = lambda positions: memory.WRITTEN,
) -> list[ChatRow]:
    """Answers the rows that end with the user, greedily; the others come back as they are.

    Where a row says what is to be answered (`answer_to`), that is what the model sees, and the
    answer is never the receiver's own: it could not give it to what it sees itself.

    Args:
        rows: chats.
        lm: the model that answers; an answer ends at its stop strings, too.
        path: JSON lines of earlier answers; new ones are appended as they come, so an interrupted
            run loses one batch.
        max_tokens: an answer that is longer is cut there. Thoughts of a model that can't but think,
            or begins to by itself, are no part of it; what it has not thought through within their
            budget has no answer.
        own: whether `lm` is the receiver.
        progress: called with answers known and wanted.
        until: on the clock of `time.monotonic`; no batch begins after it.
        longest: tokens of a prompt; what is longer will not be learned from, and is not answered.
        say: told which rows are not answered, and why.
        at_once: how many answers there is memory for, given the positions that the longest takes.

    Returns:
        The rows, without those that nothing was answered to.

    Raises:
        C2CError: if answers can't be kept.
    """
    if not any(map(_is_open, rows)):
        return rows
    # Another model, or another limit, has other answers.
    by = [of_weights(lm.model), max_tokens]
    known = _read(path)
    keys = [_key(by, _asked(row)) if _is_open(row) else "" for row in rows]
    prompts: dict[str, list[int]] = {}
    if time.monotonic() <= until:
        unknown = [(key, row) for key, row in zip(keys, rows, strict=True) if key not in known]
        prompts = _prompts(unknown, on_a_fixed_day(lm.tokenizer), longest, say)
    wanted = (known.keys() & {*keys}) | prompts.keys()
    missing = sorted(prompts, key=lambda key: len(prompts[key]))
    marks = thoughts.marks(lm.tokenizer)
    thinking = {key for key in missing if thoughts.begins_thinking(lm.tokenizer, prompts[key])}
    batches = _parted(missing, _THINKING if thinking else BATCH)
    # Not the short ones first: what there is time for is like the rest.
    waiting = [batches[at] for at in np.random.default_rng(0).permutation(len(batches))]
    unfinished = 0
    while waiting and time.monotonic() <= until:
        some = waiting.pop(0)
        begun, rest = _begun(lm.model, [prompts[key] for key in some])
        limits = [max_tokens + thoughts.BUDGET * (key in thinking) for key in some]
        n = at_once(len(prompts[some[-1]]) + max(limits))  # they are sorted
        answers = batch_generate(
            lm.model,
            lm.tokenizer,
            rest,
            prompt_caches=begun,
            max_tokens=limits,
            return_token_ids=True,
            completion_batch_size=n,
            prefill_batch_size=min(n, memory.READ),
            prefill_step_size=device.prefill_chunk(),
        )
        assert answers.token_ids is not None
        fresh: dict[str, Answer] = {}
        opened = []  # thoughts by the model itself; these are asked again, with room for them
        for key, text, ids in zip(some, answers.texts, answers.token_ids, strict=True):
            written: Answer | None = (text, len(ids) >= max_tokens)
            if key in thinking:
                written = _behind_thoughts(ids, lm.tokenizer, max_tokens)
            elif marks and text.lstrip().startswith(marks[0]):
                opened.append(key)
                continue
            if written:
                fresh[key] = ended(*written, lm.stop_strings)
            else:
                unfinished += 1
        thinking |= {*opened}
        waiting = _parted(opened, _THINKING) + waiting
        _keep(path, fresh)
        known |= fresh
        progress(len(known.keys() & wanted), len(wanted))
    if unfinished:
        say(f"{unfinished} prompts take more than {thoughts.BUDGET} tokens of thought: left out")
    return [
        _answered(row, known[key], own) if key else row
        for row, key in zip(rows, keys, strict=True)
        if not key or key in known
    ]


def _prompts(
    rows: list[tuple[str, ChatRow]],
    tokenizer: Tokenizer,
    longest: float,
    say: Callable[[str], None],
) -> dict[str, list[int]]:
    """By their keys what the model sees of open rows, but of those that can't be learned from."""
    found: dict[str, list[int]] = {}
    refused: dict[str, str] = {}
    too_long = 0
    for key, row in rows:
        if not key or key in found:
            continue
        try:
            seen = tokenize(render(_asked(row), tokenizer), tokenizer)
            own = tokenize(render(row.messages, tokenizer), tokenizer) if row.answer_to else seen
        except Refused as e:
            refused.setdefault(row.where, str(e))
            continue
        if len(own) <= longest:
            found[key] = seen
        else:
            too_long += 1
    if too_long:
        say(f"{too_long} prompts are longer than {longest} tokens: left out, and not answered")
    if refused:
        say(refusals(refused))
    return found


def _parted(keys: list[str], size: int) -> list[list[str]]:
    return [keys[at : at + size] for at in range(0, len(keys), size)]


def _begun(model: nn.Module, prompts: list[list[int]]) -> tuple[list[kv.Cache], list[list[int]]]:
    """A cache per prompt over what all of them begin with, prefilled once, and the prompts' rests.

    A template's system prompt is most of a short prompt.
    """
    shared = list(os.path.commonprefix(prompts))[: min(map(len, prompts)) - 1]
    cache = kv.make_cache(model)
    if shared:
        model(mx.array(shared)[None], cache=cache)
        mx.eval([c.state for c in cache])
    return [copy.deepcopy(cache) for _ in prompts], [p[len(shared) :] for p in prompts]


def _behind_thoughts(ids: list[int], tokenizer: Any, most: int) -> Answer | None:
    """What was written behind thoughts, of `most` tokens at most; None if they did not end."""
    marks = thoughts.marks(tokenizer)
    assert marks  # its prompt ends with the first one, or it began with that
    end = marks[1]
    n = bisect_left(range(len(ids) + 1), True, key=lambda n: end in tokenizer.decode(ids[:n]))
    if n > len(ids):
        return None
    return tokenizer.decode(ids[: n + most]).partition(end)[2], len(ids) - n >= most


def unanswered(rows: list[ChatRow]) -> int:
    """How many of the rows have no answer."""
    return sum(map(_is_open, rows))


def ended(text: str, cut: bool, stop_strings: tuple[str, ...]) -> Answer:
    """What a model wrote, up to the first stop string; behind one, nothing was cut off."""
    at = min((at for s in stop_strings if (at := text.find(s)) >= 0), default=-1)
    return (text.strip(), cut) if at < 0 else (text[:at].strip(), False)


def _is_open(row: ChatRow) -> bool:
    return row.messages[-1]["role"] == "user"


def _asked(row: ChatRow) -> Messages:
    return row.answer_to or row.messages


def _answered(row: ChatRow, answer: Answer, own: bool) -> ChatRow:
    text, cut = answer
    messages = [*row.messages, {"role": "assistant", "content": text}]
    return replace(row, messages=messages, own=row.own or (own and not row.answer_to), cut=cut)


def _key(by: list[object], messages: Messages) -> str:
    return json.dumps([*by, messages], ensure_ascii=False)


def _read(path: Path) -> dict[str, Answer]:
    if not path.exists():
        return {}
    known = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            key, text, cut = json.loads(line.decode())
        except ValueError:
            continue  # the last line of a run that was killed while writing, in a character even
        known[key] = (text, cut)
    return known


def _keep(path: Path, fresh: dict[str, Answer]) -> None:
    lines = (json.dumps([key, *a], ensure_ascii=False) + "\n" for key, a in fresh.items())
    try:
        atomic.append(path, "".join(lines))
    except OSError as e:
        raise C2CError(
            f"{path}: cannot keep answers ({e.strerror}); those before are there: make room, then "
            "start the run again"
        ) from None
