"""What is each of a fuser's slices worth in loss, and do the app's bars show it?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import c2c_mlx.blas  # noqa: F401

import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.modes import Reading
from c2c_mlx.evaluation.report import table
from c2c_mlx.evaluation.task import Item
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.studies.study import Result, Work, halves, interval, records, weigh
from c2c_mlx.talk.links import link
from c2c_mlx.text.alignment import TokenAlignment

WHOLE, SHUT = "all open", "all shut"
BARS = "bars"  # the log's records of what the app shows
Slice = tuple[int, int]  # kind, index into the layer map


def run(work: Work) -> Result:
    """Closes one slice at a time on half of the items, and opens the best ones on the others.

    Raises:
        C2CError: if there is not just one fuser, or none of its gates is open.
    """
    if len(work.fusers) != 1:
        raise C2CError("c2c-study gates looks at one fuser: name one --sharer")
    fuser = work.fusers[0]
    was_open = fuser.gates.copy()
    every = [(kind, at) for kind in fuser.kinds for at in range(was_open.shape[1])]
    open_slices = [s for s in every if was_open[s]]
    if not open_slices:
        raise C2CError("all gates of this fuser are shut: there is nothing to study")
    first, second = halves(work.items, work.seed)
    links = [link(work.receiver, work.sharers[0], fuser)]
    aligned, fused = work.aligned(links), FusedCache(*links)

    def weigh_all(items: Sequence[Item], some: dict[str, list[Slice]], what: str) -> None:
        conditions = {WHOLE: open_slices, SHUT: []} | some
        todo = work.missing(items, list(conditions))
        for number, item in enumerate(todo, len(items) - len(todo) + 1):
            prompts = aligned[item.id]
            bars = _bars(work, fused, prompts, open_slices)
            readings = _readings(work, fused, prompts, conditions)
            answers = weigh(work.task, item, readings, work.receiver.tokenizer)
            work.log.append([{"mode": BARS, "id": item.id} | bars, *records(item, answers)])
            work.progress(what, number, len(items))

    try:
        without = {
            _name(work, s): [other for other in open_slices if other != s] for s in open_slices
        }
        weigh_all(first, without, "one slice shut")
        bars = [work.log.records[BARS][item.id] for item in first]
        weights, changes = (np.mean([b[k] for b in bars], axis=0) for k in ("weights", "changes"))
        slices = [_slice(work, s, bool(was_open[s]), first, weights[s], changes[s]) for s in every]
        best_first: dict[str, Callable[[Result], float]] = {
            "worth": lambda of: -of["worth"]["mean"],
            "weight": lambda of: -of["weight"],
            "change": lambda of: -of["change"],
        }
        orders: dict[str, list[Slice]] = {
            order: [tuple(of["slice"]) for of in sorted(slices, key=key) if of["open"]]
            for order, key in best_first.items()
        }
        counts = sorted({k for k in (1, 2, 3, 5, 8, 12, 20, 30, 45) if k < len(open_slices)})
        many = {f"first {k} by {o}": of[:k] for o, of in orders.items() for k in counts}
        weigh_all(second, many, "slices cumulated")
    finally:
        _set(work, [s for s in every if was_open[s]])
    open_ones = [of for of in slices if of["open"]]
    worth = [of["worth"]["mean"] for of in open_ones]
    cumulated = [
        {
            "order": order,
            "count": k,
            "difference": work.difference(f"first {k} by {order}", SHUT, second),
        }
        for order in orders
        for k in counts
    ]
    return {
        "items": [len(first), len(second)],
        "slices": slices,
        "whole": work.difference(WHOLE, SHUT, second),
        "cumulated": cumulated,
        "rank_correlation": {
            bar: _spearman(worth, [of[bar] for of in open_ones]) for bar in ("weight", "change")
        },
    }


def _name(work: Work, at: Slice) -> str:
    receiver, sharer = work.fusers[0].config.layer_map[at[1]]
    return f"without {('keys', 'values')[at[0]]} {receiver} <- {sharer}"


def _slice(
    work: Work, at: Slice, is_open: bool, items: Sequence[Item], weight: float, change: float
) -> Result:
    receiver, sharer = work.fusers[0].config.layer_map[at[1]]
    worth: Result = {"mean": 0.0, "ci95": [0.0, 0.0], "items": len(items)}
    if is_open:
        worth = work.difference(_name(work, at), WHOLE, items)
    return {
        "slice": list(at),
        "kind": ("keys", "values")[at[0]],
        "receiver_layer": receiver,
        "sharer_layer": sharer,
        "open": is_open,
        "worth": worth,
        "weight": float(weight),
        "change": float(change),
    }


def _set(work: Work, open_slices: Sequence[Slice]) -> None:
    fuser = work.fusers[0]
    for kind, at in np.argwhere(np.ones_like(fuser.gates)).tolist():
        if kind in fuser.kinds:
            fuser.set_gate(kind, at, (kind, at) in open_slices)


def _bars(
    work: Work, fused: FusedCache, prompts: Sequence[TokenAlignment], open_slices: Sequence[Slice]
) -> dict[str, Any]:
    """What the app would show of a prompt: [K][L] weights, and changes."""
    _set(work, open_slices)
    fused.fuse_anew()
    fused.extend(prompts)
    stats, shape = fused.stats(), work.fusers[0].gates.shape
    weights = stats.mean_weight if stats else np.zeros(shape)
    changes = stats.relative_change.mean(axis=-1) if stats else np.zeros(shape)
    return {"weights": weights.tolist(), "changes": changes.tolist()}


def _readings(
    work: Work,
    fused: FusedCache,
    prompts: Sequence[TokenAlignment],
    conditions: Mapping[str, Sequence[Slice]],
) -> Iterator[tuple[str, Reading]]:
    """A prompt's cache with just the slices of each condition open; both models read once."""
    ids = prompts[0].receiver_ids
    for name, open_slices in conditions.items():
        _set(work, open_slices)
        fused.fuse_anew()
        cache = copy.deepcopy(fused.extend(prompts))
        yield name, Reading(work.receiver, cache, ids[-1], len(ids))


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of the ranks; None where one of the two says nothing."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    x, y = map(_ranks, (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(of: Sequence[float]) -> np.ndarray:
    """Places by size; equals share the mean of theirs."""
    _, at, n = np.unique(of, return_inverse=True, return_counts=True)
    return (np.cumsum(n) - (n - 1) / 2)[at]


def report(result: Result) -> str:
    """The slices in order of worth, and how far few of them get."""
    heads = ["slice", "open", "worth: NLL when shut [95 %]", "weight", "change"]
    ordered = sorted(result["slices"], key=lambda of: -of["worth"]["mean"])
    rows = [
        [
            f"{of['kind']} {of['receiver_layer']} <- {of['sharer_layer']}",
            "yes" if of["open"] else "no",
            interval(of["worth"], 4) if of["open"] else "",
            f"{of['weight']:.3f}",
            f"{of['change']:.3f}",
        ]
        for of in ordered
    ]
    many = [
        [f"{of['count']} by {of['order']}", interval(of["difference"])]
        for of in result["cumulated"]
    ]
    many.append(["all that are open", interval(result["whole"])])
    first, second = result["items"]
    told = [
        f"{bar} {r:+.2f}" if r is not None else f"{bar}: nothing to correlate"
        for bar, r in result["rank_correlation"].items()
    ]
    return (
        f"Worth is how much the NLL rises when the slice alone is shut, on {first} items; "
        f"cumulated on {second} others.\n\n{table(heads, rows)}\n\n"
        f"Rank correlation of worth with what the app shows: {', '.join(told)}.\n\n"
        f"{table(['slices open', 'NLL minus all shut [95 %]'], many)}\n"
    )


def draw(result: Result, figure: Any) -> None:
    """Worth per slice, worth against the app's weight, and three orders of opening."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    for kind, colour, shift in (("keys", "#0072b2", -0.2), ("values", "#e69f00", 0.2)):
        of_kind = [of for of in result["slices"] if of["kind"] == kind]
        x = [of["receiver_layer"] + shift for of in of_kind]
        worth = [of["worth"]["mean"] for of in of_kind]
        left.bar(x, worth, 0.4, color=colour, label=kind)
        middle.scatter([of["weight"] for of in of_kind], worth, color=colour)
    left.set_xlabel("receiver layer")
    left.set_ylabel("worth: NLL when shut")
    left.legend()
    middle.set_xlabel("weight, as the app shows it")
    for order, style in (("worth", "-"), ("weight", "--"), ("change", ":")):
        points = [of for of in result["cumulated"] if of["order"] == order]
        x = [of["count"] for of in points]
        y = [of["difference"]["mean"] for of in points]
        right.plot(x, y, style, marker=".", label=f"by {order}")
    right.axhline(result["whole"]["mean"], color="black", linewidth=0.5)
    right.set_xlabel("slices open")
    right.set_ylabel("NLL minus all shut")
    right.legend()
