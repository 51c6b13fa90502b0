"""What a trained fuser is worth on chats that it did not learn from, in figures and a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from c2c_mlx import atomic
from c2c_mlx.bootstrap import interval

FILE = "verdict.json"
FEWEST = 8  # chats; an interval over fewer says more than is known

# What C2C is compared with, by the names of the file; each has its loss and its difference.
_OTHERS = ("receiver", "shuffled", "zeroed")

Verdict = dict[str, Any]
Losses = Mapping[str, Sequence[float]]  # nats per chat: "valid" (C2C) and any of `_OTHERS`


def judge(losses: Losses, tokens: Sequence[int], seed: int, control: bool = False) -> Verdict:
    """The verdict over chats that each way of answering was measured on.

    Args:
        losses: of C2C ("valid"), the receiver alone ("receiver"), C2C with another chat's sharer
            ("shuffled") and with one that says nothing ("zeroed"): summed over each chat's answer.
        tokens: of each chat's answer.
        seed: of the bootstrap over chats.
        control: whether the fuser learned with nothing to read.

    Returns:
        What `verdict.json` holds: losses and their differences (C2C minus the other) in nats per
        token, with 95 % intervals, and a sentence. Without chats, nulls and why.
    """
    total = sum(tokens)
    found: Verdict = {"chats": len(tokens), "tokens": total}
    for name in ("valid", *_OTHERS):
        known = name in losses and total
        found[f"{name}_loss"] = sum(losses[name]) / total if known else None
    for name in _OTHERS:
        found[f"vs_{name}"] = None
        if name in losses and total:
            pairs = zip(losses["valid"], losses[name], strict=True)
            differences = [own - other for own, other in pairs]
            found[f"vs_{name}"] = {
                "mean": sum(differences) / total,
                "ci95": interval(differences, seed, tokens),
            }
    return found | {"verdict": _sentence(found, control)}


def write(folder: Path, verdict: Verdict) -> None:
    """Writes `verdict.json`.

    Raises:
        OSError: if it can't be written.
    """
    with atomic.overwriting(folder / FILE) as partial:
        partial.write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")


def _sentence(found: Verdict, control: bool) -> str:
    chats = found["chats"]
    if chats < FEWEST:
        few = f"only {chats} chats" if chats else "no chats"
        return f"Not judged: there are {few} to measure on that it did not learn from."
    losses = f"loss {found['valid_loss']:.3f} against {found['receiver_loss']:.3f} per token"
    on = f"on {chats} chats that it did not learn from,"
    change = f"{losses}, {_difference(found['vs_receiver'])}"
    if control:
        return f"The control, which reads nothing: {on} {change}."
    if not _is_better(found, "receiver"):
        how = "worse than" if found["vs_receiver"]["ci95"][0] > 0 else "no better than"
        return f"Not worth using: {on} C2C is {how} the receiver alone ({change})."
    same = [
        f"{what} ({_difference(found[f'vs_{name}'])})"
        for name, what in (
            ("shuffled", "with another chat's sharer"),
            ("zeroed", "with a sharer that says nothing"),
        )
        if not _is_better(found, name)
    ]
    if same:
        return (
            f"Not worth using: {on} C2C is better than the receiver alone ({change}), "
            f"but no better than {' and '.join(same)}: it is not what the sharer read that helps."
        )
    return (
        f"Worth using: {on} C2C is better than the receiver alone ({change}), and what the "
        f"sharer read is what helps: {_difference(found['vs_shuffled'])} to another chat's, "
        f"{_difference(found['vs_zeroed'])} to none."
    )


def _is_better(found: Verdict, other: str) -> bool:
    """Whether C2C surely loses less."""
    return bool(found[f"vs_{other}"]["ci95"][1] < 0)


def _difference(of: Verdict) -> str:
    low, high = of["ci95"]
    return f"{of['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
