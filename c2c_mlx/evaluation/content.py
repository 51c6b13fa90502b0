"""Whether an answer follows its own prompt: the right one among the answers to similar prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

from c2c_mlx.errors import C2CError

Result = dict[str, Any]


def scores(result: Result, mode: str) -> dict[str, dict[str, float]]:
    """How many of a set's prompts make their own answer the likeliest.

    The choices of each prompt of a set are the answers to all of them, in the prompts' order. Some
    answers are likely whatever is asked, so each is taken relative to its mean over the prompts.

    Args:
        result: of `c2c-eval --method text`, multiple choice whose rows are whole sets, one behind
            the other; each begins with a row whose first choice is right.
        mode: whose answers.

    Returns:
        Per group ("" is all): set -> the share of its prompts, a set being named by its first item.

    Raises:
        C2CError: if these are no whole sets, or the mode did not answer all of them.
    """
    asked, answered = result["items"], result["modes"][mode]["items"]
    starts = [n for n, item in enumerate(asked) if item["reference"] == "A"]
    found: dict[str, dict[str, float]] = {"": {}}
    for start, stop in zip(starts, [*starts[1:], len(asked)], strict=True):
        nats = [record.get("nats", []) for record in answered[start:stop]]
        if any(len(of) != stop - start for of in nats):
            raise C2CError(
                f"item {asked[start]['id']}: no whole set of prompts that share their answers"
            )
        share = float(right(np.array(nats)).mean())
        for group in {"", asked[start]["group"]}:
            found.setdefault(group, {})[asked[start]["id"]] = share
    return found


def right(nats: np.ndarray) -> np.ndarray:
    """Which prompts make their own answer the likeliest.

    Args:
        nats: -log p of each answer under each prompt, [prompts, answers]; the diagonal is right.

    Returns:
        Booleans, [prompts].
    """
    relative = nats - nats.mean(axis=0)
    return relative.argmin(axis=1) == np.arange(len(nats))
