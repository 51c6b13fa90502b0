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
LEAST = 0.01  # nats per token; what is gained with certainty may still be nothing to speak of
ANSWER_TOKENS = 32  # of a greedy answer, at most

# What C2C is compared with, by the names of the file; each has its loss and its difference.
_OTHERS = ("receiver", "shuffled", "zeroed", "twin")

Verdict = dict[str, Any]
Losses = Mapping[str, Sequence[float]]  # nats per chat: "valid" (C2C) and any of `_OTHERS`
Texts = Mapping[str, Sequence[str]]  # "wanted", "valid" (C2C's) and any of `_OTHERS`


def judge(
    losses: Losses,
    tokens: Sequence[int],
    seed: int,
    control: bool = False,
    answers: Texts | None = None,
) -> Verdict:
    """The verdict over chats that each way of answering was measured on.

    Args:
        losses: of C2C ("valid"), the receiver alone ("receiver"), C2C with another chat's sharer
            ("shuffled") and with one that says nothing ("zeroed"), and of a fuser that learned with
            nothing to read ("twin"): summed over each chat's answer.
        tokens: of each chat's answer.
        seed: of the bootstrap over chats.
        control: whether the fuser learned with nothing to read.
        answers: to some of the chats, and what was wanted; they are scored by chrF, if sacrebleu is
            there. Empty: the receiver thinks first, so there are none.

    Returns:
        What `verdict.json` holds: losses and their differences (C2C minus the other) in nats per
        token, with 95 % intervals, likewise of the answers' chrF, what both were computed from, and
        a sentence. Without chats, nulls and why.
    """
    total = sum(tokens)
    found: Verdict = {"chats": len(tokens), "tokens": total}
    for name in ("valid", *_OTHERS):
        known = name in losses and total
        found[f"{name}_loss"] = sum(losses[name]) / total if known else None
    for name in _OTHERS:
        found[f"vs_{name}"] = None
        if name in losses and total:
            found[f"vs_{name}"] = difference(losses["valid"], losses[name], tokens, seed)
    found["answers"] = _compared(answers, seed) if answers else answers
    found["verdict"] = _sentence(found, control)
    if answers == {}:
        found["verdict"] += " No answers are compared, for the receiver thinks before it answers."
    found["each"] = {"tokens": list(tokens), **{name: list(x) for name, x in losses.items()}}
    return found


def difference(
    own: Sequence[float], other: Sequence[float], tokens: Sequence[int], seed: int
) -> Verdict:
    """Of two losses on the same chats, nats per token, with its interval over chats."""
    each = [a - b for a, b in zip(own, other, strict=True)]
    return {"mean": sum(each) / sum(tokens), "ci95": interval(each, seed, tokens)}


def with_twin(found: Verdict, losses: Sequence[float], seed: int) -> Verdict:
    """A verdict, with what a twin lost on the same chats in the same order."""
    each = dict(found["each"])
    tokens = each.pop("tokens")
    answers = found["answers"] and found["answers"]["texts"]
    return judge(each | {"twin": losses}, tokens, seed, answers=answers)


def write(folder: Path, verdict: Verdict) -> None:
    """Writes `verdict.json`.

    Raises:
        OSError: if it can't be written.
    """
    with atomic.overwriting(folder / FILE) as partial:
        partial.write_text(json.dumps(verdict, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Verdict:
    """What `write` wrote; empty if that is not there, or of an older version."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("each") else {}


def _compared(texts: Texts, seed: int) -> Verdict | None:
    """Mean sentence chrF of each way to answer, and its differences; None without sacrebleu."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        return None
    metric, wanted = CHRF(), texts["wanted"]
    scores = {
        name: [metric.sentence_score(a, [w]).score for a, w in zip(said, wanted, strict=True)]
        for name, said in texts.items()
        if name != "wanted"
    }
    found: Verdict = {"chats": len(wanted)}
    found["chrf"] = {name: sum(each) / len(each) for name, each in scores.items()}
    for name in _OTHERS:
        if name in scores:
            pairs = zip(scores["valid"], scores[name], strict=True)
            better = [own - other for own, other in pairs]
            found[f"vs_{name}"] = {
                "mean": sum(better) / len(better),
                "ci95": interval(better, seed),
            }
    return found | {"texts": {name: list(said) for name, said in texts.items()}}


def _sentence(found: Verdict, control: bool) -> str:
    chats = found["chats"]
    if chats < FEWEST:
        few = f"only {chats} chats" if chats else "no chats"
        return f"Not judged: there are {few} to measure on that it did not learn from."
    losses = f"loss {found['valid_loss']:.3f} against {found['receiver_loss']:.3f} per token"
    on = f"on {chats} chats that it did not learn from,"
    change = f"{losses}, {_difference(found['vs_receiver'])}"
    said = _said(found["answers"])
    if control:
        return f"The control, which reads nothing: on {chats} chats {change}."
    better = _is_better(found, "receiver")
    if not better or found["vs_receiver"]["mean"] > -LEAST:
        how = "worse than" if found["vs_receiver"]["ci95"][0] > 0 else "no better than"
        how = "hardly better than" if better else how
        return f"Not worth using: {on} C2C is {how} the receiver alone ({change}){said}."
    if said and found["answers"]["vs_receiver"]["ci95"][1] < 0:
        return (
            f"Not worth using: {on} C2C finds the answers likelier than the receiver alone does "
            f"({change}), but gives worse ones{said}."
        )
    same = [
        f"{what} ({_difference(found[f'vs_{name}'])})"
        for name, what in (
            ("shuffled", "with another chat's sharer"),
            ("zeroed", "with a sharer that says nothing"),
            ("twin", "a twin that learned with nothing to read"),
        )
        if found[f"vs_{name}"] and not _is_better(found, name)
    ]
    if same:
        return (
            f"Not worth using: {on} C2C is better than the receiver alone ({change}), but no "
            f"better than {' and '.join(same)}: it is not what the sharer read that helps{said}."
        )
    twin = ""
    if found["vs_twin"]:
        twin = f", {_difference(found['vs_twin'])} to a twin that learned with nothing to read"
    return (
        f"Worth using: {on} C2C is better than the receiver alone ({change}), and what the "
        f"sharer read is what helps: {_difference(found['vs_shuffled'])} to another chat's, "
        f"{_difference(found['vs_zeroed'])} to none{twin}{said}."
    )


def _said(answers: Verdict | None) -> str:
    """What the answers themselves show, as the end of a sentence."""
    if not answers or answers["chats"] < FEWEST:
        return ""
    low, high = answers["vs_receiver"]["ci95"]
    how = "closer" if low > 0 else "further" if high < 0 else "no closer"
    chrf = answers["chrf"]
    to = "from" if how == "further" else "to"
    return (
        f"; its answers to {answers['chats']} of them are {how} {to} what was wanted than the "
        f"receiver's (chrF {chrf['valid']:.1f} against {chrf['receiver']:.1f}, "
        f"{answers['vs_receiver']['mean']:+.1f} [{low:+.1f}, {high:+.1f}])"
    )


def _is_better(found: Verdict, other: str) -> bool:
    """Whether C2C surely loses less."""
    return bool(found[f"vs_{other}"]["ci95"][1] < 0)


def _difference(of: Verdict) -> str:
    low, high = of["ci95"]
    return f"{of['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
