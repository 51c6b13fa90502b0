"""Prompts of two models as ids, and what their caches hold: what tests of fusing need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from c2c_mlx import C2C
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.text.alignment import TokenAlignment

POSITIONS = ["all", "from_first_message", "messages"]
MakeC2C = Callable[..., C2C]
Prompt = tuple[list[int], list[int], np.ndarray, np.ndarray]


def prompt(*turns: Sequence[int]) -> Prompt:
    """As of a chat: two ids of opening, then each message's text followed by two template ids.

    The sharer's template is one id longer, and its tokens are half as many.
    """
    ids, other, index, messages = [1, 2], [3, 4, 5], [0, 0], [-1, -1]
    for number, text in enumerate(turns):
        first = len(other)
        other += [t + 7 for t in text[::2]]
        ids += text
        index += [first + i // 2 for i in range(len(text))]
        messages += [number] * len(text)
        ids, other = [*ids, 6, 7 + number % 2], [*other, 8, 9, 10 + number % 2]
        index += [index[-1]] * 2
        messages += [-1, -1]
    return ids, other, np.array(index, np.int32), np.array(messages, np.int32)


FIRST, ANSWER, SECOND = list(range(20, 31)), list(range(50, 58)), list(range(80, 89))


def greedy(model: nn.Module, last: list[int], cache: kv.Cache, n: int = 6) -> list[int]:
    steps = generate_step(mx.array(last), model, max_tokens=n, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def contents(cache: kv.Cache) -> kv.StackedKV:
    return kv.read(cache, kv.attention_layers(cache), 0, kv.length(cache))


def assert_same(found: kv.Cache, expected: kv.Cache, tolerance: float = 0.0) -> None:
    assert kv.length(found) == kv.length(expected)
    for a, b in zip(contents(found), contents(expected), strict=True):
        assert mx.abs(a - b).max().item() <= tolerance


def differs(found: kv.Cache, expected: kv.Cache) -> bool:
    pairs = zip(contents(found), contents(expected), strict=True)
    return any(mx.abs(a - b).max().item() > 1e-3 for a, b in pairs)


def open_message_gates(c2c: C2C) -> None:
    c2c.fuser.message_head.bias = mx.full(c2c.fuser.message_head.bias.shape, 3.0)


def scratch(c2c: C2C, chat: Prompt) -> kv.Cache:
    return FusedCache(c2c).extend([aligned(chat)])


def aligned(chat: Prompt) -> TokenAlignment:
    ids, other, index, messages = chat
    return TokenAlignment(ids, other, index, messages)


def shifted(prompt: TokenAlignment) -> TokenAlignment:
    """As another sharer with longer text would read it."""
    return replace(prompt, sharer_ids=[9, *prompt.sharer_ids], index=prompt.index + 1)


def for_each(chat: Prompt) -> list[TokenAlignment]:
    prompt = aligned(chat)
    return [prompt, shifted(prompt), prompt]


class Follow:
    """An answer of which two ids at a time become one of the sharer's, which then still changes."""

    def __init__(self, prompt: TokenAlignment) -> None:
        self.prompt, self.ids = prompt, []

    def add(self, ids: Sequence[int]) -> TokenAlignment:
        self.ids += ids
        pairs = [self.ids[i : i + 2] for i in range(0, len(self.ids), 2)]
        end, number = len(self.prompt.sharer_ids), self.prompt.message.max() + 1
        index = [end + i // 2 for i in range(len(self.ids))]
        return TokenAlignment(
            [*self.prompt.receiver_ids, *self.ids],
            [*self.prompt.sharer_ids, *(sum(pair) % 500 for pair in pairs)],
            np.append(self.prompt.index, index).astype(np.int32),
            np.append(self.prompt.message, [number] * len(self.ids)).astype(np.int32),
        )


def assert_same_stats(grown: FusedCache, fresh: FusedCache, text: TokenAlignment) -> None:
    """A turn's stats, and those of its last position, are what a prefill of its text tells."""
    fresh.extend([text])
    for since in (0, len(text.receiver_ids) - 2):
        found, expected = grown.stats(since=since), fresh.stats(since=since)
        assert found is not None and expected is not None
        assert found.start == expected.start >= since
        for name in ("weight", "own", "change"):
            a, b = getattr(found, name), getattr(expected, name)
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
        assert found.change.any()
