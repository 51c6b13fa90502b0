"""What C2C and what it is compared with lose, and say, on chats that are only measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.text import thoughts
from c2c_mlx.text.rendering import Tokenizer, fast_tokenizer
from c2c_mlx.text.tokens import end_ids
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.answers import ended
from c2c_mlx.training.batch import Batch, collate
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.prefills import Prefiller

Losses = dict[str, list[float]]  # by name, nats per chat
Measured = tuple[Losses, list[int]]  # and the tokens of each chat's answer
Answers = dict[str, list[str]]  # by name, each chat's

_NAMES = {
    "valid": "valid_loss",
    **{name: f"valid_{name}_loss" for name in ("receiver", "shuffled", "zeroed")},
}


def losses(
    c2c: C2C, prefiller: Prefiller, chats: list[Example], batch_size: int, zeroed: bool = False
) -> Measured:
    """The loss of each chat: C2C's, the receiver's alone, and C2C's with a shuffled sharer.

    Args:
        c2c: both models and the fuser.
        prefiller: reads prompts with both models.
        chats: at least one.
        batch_size: chats that are read at a time.
        zeroed: whether C2C is also measured with a sharer that says nothing.

    Returns:
        Losses ("valid", "receiver", "shuffled", "zeroed"), and the tokens of each chat's answer;
        the chats are in the order of `by_length`, the same in all.
    """
    found: Losses = {}
    for name, batch, cache, state in _ways(c2c, prefiller, chats, batch_size, zeroed):
        each = step_loss.response_losses(prefiller.receiver, cache, batch, state)
        found.setdefault(name, []).extend(float(x) for x in np.array(each))
    return found, [len(e.response_ids) for e in by_length(chats)]


def per_token(losses: Losses, tokens: list[int]) -> dict[str, float]:
    """What `losses` found as metrics tell it: the mean over all tokens, in nats."""
    return {_NAMES[name]: sum(each) / sum(tokens) for name, each in losses.items()}


def answers(
    c2c: C2C,
    prefiller: Prefiller,
    chats: list[Example],
    batch_size: int,
    tokenizer: Tokenizer,
    stop_strings: tuple[str, ...],
    most: int,
) -> Answers:
    """Greedy answers to each chat's prompt, in the ways that `losses` measures, and what is wanted.

    Prompts alone are fused. There are none where the receiver thinks first, be it made to or by
    itself: thoughts take many times `most`.

    Args:
        c2c: both models and the fuser.
        prefiller: reads prompts with both models.
        chats: at least one.
        batch_size: chats that are answered at a time.
        tokenizer: the receiver's.
        stop_strings: text that ends an answer.
        most: tokens of an answer, at most.

    Returns:
        Texts by name ("wanted", of at most `most` tokens as well, and the names of `losses`), in
        the order of `by_length`; or nothing.
    """
    if any(thoughts.begins_thinking(tokenizer, e.receiver_ids) for e in chats):
        return {}
    ends = end_ids(tokenizer)
    chats = [replace(e, heard=None) for e in chats]
    wanted = [[i for i in e.response_ids if i not in ends][:most] for e in by_length(chats)]
    ids = {"wanted": wanted}
    for name, batch, cache, _ in _ways(c2c, prefiller, chats, batch_size, True, computed=True):
        some = decode(c2c.receiver, cache, batch.inputs[:, 0], ends, most)
        ids.setdefault(name, []).extend(some)
    fast, marks = fast_tokenizer(tokenizer), thoughts.marks(tokenizer)
    texts = {
        name: [ended(fast.decode(some), False, stop_strings)[0] for some in each]
        for name, each in ids.items()
    }
    thinks = marks and any(t.startswith(marks[0]) for each in texts.values() for t in each)
    return {} if thinks else texts


def spread(chats: list[Example], n: int) -> list[Example]:
    """At most n of the chats, of every source some: they stand one source after the other."""
    n = min(n, len(chats))
    return [chats[i * len(chats) // n] for i in range(n)]


def by_length(chats: list[Example]) -> list[Example]:
    """The order in which chats are measured: batches need little padding."""
    return sorted(chats, key=lambda e: (len(e.receiver_ids), len(e.response_ids)))


def decode(
    model: nn.Module, cache: kv.Cache, last: np.ndarray, ends: Collection[int], most: int
) -> list[list[int]]:
    """Goes on greedily from a batch's caches, which grow.

    Args:
        model: an mlx-lm model.
        cache: over the prompts but their last ids, [B] rows.
        last: [B], those ids.
        ends: ids that end an answer; they are not part of it.
        most: tokens of an answer, at most.
    """
    found: list[list[int]] = [[] for _ in last]
    going = set(range(len(found)))
    ids = mx.array(last)[:, None]  # [B, 1]
    for _ in range(most):
        ids = mx.argmax(model(ids, cache=cache)[:, -1], axis=-1)[:, None]
        mx.eval(ids, kv.arrays(cache))
        for row, token in enumerate(map(int, np.array(ids[:, 0]))):
            if row in going and token in ends:
                going.remove(row)
            elif row in going:
                found[row].append(token)
        if not going:
            break
    return found


def _ways(
    c2c: C2C,
    prefiller: Prefiller,
    chats: list[Example],
    size: int,
    zeroed: bool,
    computed: bool = False,
) -> Iterator[tuple[str, Batch, kv.Cache, mx.array | None]]:
    """Batches in the order of `by_length`, with the receiver's cache as each way of asking has it.

    The last is the responses' state, see `Prefills`; where all is to be `computed`, there is none,
    and the receiver's caches hold all of its layers.

    With a shuffled sharer a chat is fed by the sharer of the next longer one, whatever batch that
    is in; a single chat has nobody to swap with, and is not shuffled.
    """
    c2c.fuser.eval()
    rows = by_length(chats)
    others = [e.with_sharer_of(o) for e, o in zip(rows, rows[1:] + rows[:1], strict=True)]
    for at in range(0, len(rows), size):
        batch = collate(rows[at : at + size], c2c.fuser.config.positions)
        prefills = prefiller.whole(batch) if computed else prefiller(batch)
        state = prefills.state
        yield "valid", batch, step_loss.fuse(c2c, prefills.own, prefills.sharer, batch)[0], state
        if len(rows) > 1:
            other = collate(others[at : at + size], c2c.fuser.config.positions)
            sharer = prefiller.sharer(other, computed)
            yield "shuffled", other, step_loss.fuse(c2c, prefills.own, sharer, other)[0], state
        if zeroed:
            nothing = step_loss.zeroed(c2c, batch)
            yield "zeroed", batch, step_loss.fuse(c2c, prefills.own, nothing, batch)[0], state
        yield "receiver", batch, [c.copy() for c in prefills.own], state
        mx.clear_cache()
