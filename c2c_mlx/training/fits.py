"""What a run leaves open is made to fit the device: batches, recomputation, lengths, prefills."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import device
from c2c_mlx.config import TrainConfig
from c2c_mlx.models.memory import Need
from c2c_mlx.models.paths import size
from c2c_mlx.text.rendering import Refused, Tokenizer
from c2c_mlx.text.tokens import Strategy
from c2c_mlx.training.dataset import make_example
from c2c_mlx.training.date import on_a_fixed_day
from c2c_mlx.training.files import ChatRow

CHOSEN = ("batch_size", "accumulate", "grad_checkpoint", "max_tokens")  # a checkpoint keeps them
_SHORTEST = 128  # tokens; a limit below that leaves too much out
_BUSY = 4  # chats at a time that keep a device busy
_LONGEST = 32  # chats that are looked at, by their prompts and by their answers

Lengths = list[tuple[int, int]]  # tokens of some chats' prompts and answers, the longest first


@dataclass(frozen=True)
class Fit:
    """What was chosen for a run.

    Attributes:
        config: the run's, with what was chosen.
        need: of memory, so.
        why: in one line.
    """

    config: TrainConfig
    need: Need
    why: str


def fit(
    config: TrainConfig,
    given: Sequence[str],
    lengths: Lengths,
    need: Callable[[TrainConfig, Lengths], Need],
) -> Fit:
    """The nearest to what was wanted that fits; a step learns from as many chats in all of them.

    All processes of a run ask together, and get what fits the one with the least room.

    Args:
        config: what is wanted.
        given: its fields that stay as they are.
        lengths: from `longest`.
        need: what a run takes whose batches have these shapes.
    """

    def needed(config: TrainConfig) -> Need:
        return need(config, shapes(config, lengths))

    config = _with_room(config, given)
    wanted = needed(config)
    if _fits(wanted):
        return Fit(config, wanted, f"batches: {told(config)}, which fits")
    why = f"{config.batch_size} at a time would take {wanted.total / 1e9:.1f} GB"
    for less in (config, *_ladder(config, given)):
        found = needed(less)
        if _fits(found):
            return Fit(less, found, f"batches: {told(less)}; {why}")
    fitting = (c for c in _ladder(config, ()) if needed(c).total <= wanted.limit)
    if other := next(fitting, None):
        found = replace(found, advice=f"{flags(config, other)} will")
    return Fit(less, found, f"batches: {told(less)}; no less was left open")


def _fits(need: Need) -> bool:
    """Whether every process of the run has room for it."""
    return not mx.distributed.all_sum(mx.array(int(need.total > need.limit))).item()


def smaller(config: TrainConfig) -> TrainConfig | None:
    """The next run that needs less and learns from the same chats; None if there is none."""
    return next(_ladder(config, ("max_tokens",)), None)


def _ladder(config: TrainConfig, given: Sequence[str]) -> Iterator[TrainConfig]:
    """Runs that need ever less, the nearest first, with what is given as it is.

    A few chats at a time keep a device as busy as many, so splitting them costs next to nothing;
    recomputing layers takes time, and a batch of one wastes more. The longest chats go last, and
    never for the sake of a batch that is given.
    """
    is_split = not {"batch_size", "accumulate"} & set(given)
    while True:
        c = config
        if is_split and c.batch_size > _BUSY:
            config = _halved(c)
        elif not c.grad_checkpoint and "grad_checkpoint" not in given:
            config = replace(c, grad_checkpoint=True)
        elif is_split and c.batch_size > 1:
            config = _halved(c)
        elif is_split and c.max_tokens // 2 >= _SHORTEST and "max_tokens" not in given:
            config = replace(c, max_tokens=c.max_tokens // 2)
        else:
            return
        yield config


def _halved(c: TrainConfig) -> TrainConfig:
    """At most half of a batch, of which a step's chats are a whole number."""
    per_step = c.batch_size * c.accumulate
    rows = next(n for n in range(c.batch_size // 2, 0, -1) if per_step % n == 0)
    return replace(c, batch_size=rows, accumulate=per_step // rows)


def flags(config: TrainConfig, other: TrainConfig) -> str:
    """What to add to the command of `config` for `other`."""
    found = []
    if other.grad_checkpoint and not config.grad_checkpoint:
        found.append("--grad-checkpoint")
    if other.batch_size != config.batch_size:
        found.append(f"--batch-size {other.batch_size} --accumulate {other.accumulate}")
    if other.max_tokens != config.max_tokens:
        found.append(f"--max-tokens {other.max_tokens}")
    return " ".join(found)


def too_large(where: str, config: TrainConfig, less: TrainConfig | None, is_kept: bool) -> str:
    """What to do about a run that did not fit.

    Args:
        where: it was.
        config: the run's.
        less: the next smaller one, if there is one.
        is_kept: whether a checkpoint goes on with that.
    """
    what = f"{where} did not fit into the memory"
    if less is None:
        return f"{what}: start again in another --out with a smaller --max-tokens or --preset"
    wanted = flags(config, less)
    if is_kept:
        return f"{what}: --resume goes on there with {wanted}, from the same chats a step"
    return f"{what}: {wanted} needs less, and learns from the same chats"


def interrupted(where: str, is_kept: bool) -> str:
    """What to do about a run that macOS interrupted; as `too_large`."""
    goes_on = "--resume goes on there" if is_kept else "start it again"
    return f"macOS interrupted the GPU at {where}: {goes_on}; {device.UNDISTURBED}"


def told(config: TrainConfig) -> str:
    """How a run goes through its chats, for people."""
    parts = [f"{config.batch_size} chats at a time"]
    if config.accumulate > 1:
        parts.append(f"{config.accumulate} times a step")
    if config.grad_checkpoint:
        parts.append("layers recomputed")
    return f"{', '.join(parts)}, of up to {config.max_tokens} tokens"


# --- how long chats are -------------------------------------------------------------------------


def longest(
    rows: Sequence[ChatRow],
    receiver: Tokenizer,
    sharer: Tokenizer,
    alignment: Strategy,
    answer_tokens: int,
) -> Lengths:
    """The longest of many chats, found by their characters: ids of all of them would take minutes.

    Args:
        rows: at least one.
        receiver: the receiver's tokenizer.
        sharer: the sharer's tokenizer.
        alignment: the fuser's field of that name.
        answer_tokens: of an answer that is yet to be written.

    Returns:
        Of each the longer one of its two prompts, and its answer; nothing of a chat that a template
        refuses.
    """
    tokenizers = on_a_fixed_day(receiver), on_a_fixed_day(sharer)

    def pair(row: ChatRow) -> tuple[int, int] | None:
        unanswered = row.messages[-1]["role"] != "assistant"
        if unanswered:
            row = replace(row, messages=[*row.messages, {"role": "assistant", "content": ""}])
        try:
            e = make_example(row, *tokenizers, alignment)
        except Refused:
            return None
        prompt = max(len(e.receiver_ids), len(e.sharer_ids))
        return prompt, answer_tokens if unanswered else len(e.response_ids)

    found: dict[int, tuple[int, int]] = {}
    for measure in (_asked, _answered):
        order = sorted(range(len(rows)), key=lambda i: -measure(rows[i]))
        found |= islice(((i, n) for i in order if (n := pair(rows[i]))), _LONGEST)
    return sorted(found.values(), reverse=True)


def _asked(row: ChatRow) -> int:
    return sum(len(m["content"]) for m in row.messages) - _answered(row)


def _answered(row: ChatRow) -> int:
    last = row.messages[-1]
    return len(last["content"]) if last["role"] == "assistant" else 0


def shapes(config: TrainConfig, lengths: Lengths) -> Lengths:
    """Of the batches that these chats make; what is left out as too long counts as just not so."""
    kept = [tuple(min(n, config.max_tokens) for n in pair) for pair in lengths]
    groups = [kept[at : at + config.batch_size] for at in range(0, len(kept), config.batch_size)]
    return [(max(p for p, _ in group), max(a for _, a in group)) for group in groups]


# --- kept prefills ------------------------------------------------------------------------------


def _with_room(config: TrainConfig, given: Sequence[str]) -> TrainConfig:
    """A run whose kept prefills leave half of what is free on their disk."""
    if not config.prefill_cache or "prefill_cache_gb" in given:
        return config
    folder = Path(os.path.expanduser(config.prefill_cache)).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    room = (size(folder) + shutil.disk_usage(there).free / 2) / 1e9
    return replace(config, prefill_cache_gb=min(config.prefill_cache_gb, round(room, 1)))
