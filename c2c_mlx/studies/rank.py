"""How many directions do keys and values use, in both models and in the fused cache?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.report import table
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.studies.study import Result, Work, interval
from c2c_mlx.talk.links import link
from c2c_mlx.text.alignment import TokenAlignment

PARTS = 5  # of the items; each gives one figure, so that there is an interval


def effective_rank(gram: np.ndarray) -> float:
    """The exponential of the entropy of normalised singular values (Roy and Vetterli, 2007).

    Args:
        gram: [D, D], the Gram matrix of the rows whose rank it is; no mean is taken off.

    Returns:
        Between 1 and D; k where k singular values are the same and all others 0.
    """
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    if not values.any():
        return 0.0
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


class Grams:
    """Gram matrices of a cache's keys and values per layer, summed over positions.

    Attributes:
        positions: that have been added.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._sums: np.ndarray | None = None

    def add(self, cache: kv.Cache, layers: Sequence[int], positions: Sequence[int]) -> None:
        """Adds positions of a cache of one sequence."""
        if not positions:
            return
        low, high = min(positions), max(positions) + 1
        stacked = mx.stack(list(kv.read(cache, layers, low, high))).astype(mx.float32)
        stacked = stacked[..., mx.array([p - low for p in positions]), :]
        # [2, L, 1, H, N, D] -> [2, L, N, H*D]
        rows = np.array(stacked[:, :, 0].transpose(0, 1, 3, 2, 4).flatten(3)).astype(np.float64)
        grams = rows.swapaxes(-1, -2) @ rows
        self._sums = grams if self._sums is None else self._sums + grams
        self.positions += len(positions)

    def ranks(self) -> list[list[float]]:
        """[2][L] effective ranks, keys before values."""
        assert self._sums is not None
        return [[effective_rank(gram) for gram in kind] for kind in self._sums]


def run(work: Work) -> Result:
    """Effective ranks over the positions that are fused: both models' own, and the fused cache's.

    Raises:
        C2CError: if there are fewer items than parts, or the sharer is elsewhere.
    """
    if work.sharers[0].is_elsewhere:  # it sends those of its layers that are fused
        raise C2CError("c2c-study rank looks at all of a sharer's layers: name one that is here")
    if len(work.items) < PARTS:
        raise C2CError(f"--task: {len(work.items)} items to study; there must be {PARTS} or more")
    links = [link(work.receiver, *pair) for pair in zip(work.sharers, work.fusers, strict=True)]
    aligned = work.aligned(links)
    parts = [list(part) for part in np.array_split(np.arange(len(work.items)), PARTS)]
    for number, part in enumerate(parts):
        if str(number) not in work.log.records.get("ranks", {}):
            prompts = [aligned[work.items[i].id] for i in part]
            found = _ranks(work, links, prompts, part[0])
            work.log.append([{"mode": "ranks", "id": str(number)} | found])
    of_parts = [work.log.records["ranks"][str(n)] for n in range(PARTS)]
    caches: Result = {}
    for name in of_parts[0]["ranks"]:
        ranks = np.array([of["ranks"][name] for of in of_parts])  # [P, 2, L]
        caches[name] = {
            "width": of_parts[0]["widths"][name],
            "layers": ranks.mean(axis=0).tolist(),
            "means": {
                kind: scoring.mean(ranks[:, at].mean(axis=-1).tolist(), work.seed)
                for at, kind in enumerate(("keys", "values"))
            },
        }
    layers = [r for r, _ in links[0].fuser.config.layer_map]
    every = kv.attention_layers(kv.make_cache(work.receiver.model))
    rows = [every.index(layer) for layer in sorted({*layers})]
    own, fused = (
        np.array([of["ranks"][name] for of in of_parts])[..., rows]
        for name in ("receiver", "fused")
    )
    change = {
        kind: scoring.mean((fused - own)[:, at].mean(axis=-1).tolist(), work.seed)
        for at, kind in enumerate(("keys", "values"))
    }
    return {
        "positions": [of["positions"] for of in of_parts],
        "caches": caches,
        "fused_layers": layers,
        "fused_minus_receiver": change,
    }


def _ranks(
    work: Work, links: Sequence[C2C], part: Sequence[list[TokenAlignment]], done: int
) -> Result:
    """One part's ranks."""
    fused = FusedCache(*links, order=work.order)
    grams = {name: Grams() for name in ("receiver", "fused", "sharer")}
    for number, prompts in enumerate(part, done + 1):
        cache = fused.extend(prompts)
        asked = np.flatnonzero(prompts[0].message[:-1] >= 0).tolist()
        read = sorted({*prompts[0].index[:-1][asked].tolist()})
        of_receiver = kv.attention_layers(cache)
        grams["receiver"].add(fused.own.cache, of_receiver, asked)
        grams["fused"].add(cache, of_receiver, asked)
        shared = fused.sharers[0].cache
        grams["sharer"].add(shared, kv.attention_layers(shared), read)
        work.progress("rank", number, len(work.items))
    shapes = {"receiver": work.receiver.shape, "sharer": work.sharers[0].shape}
    widths = {name: shapes.get(name, work.receiver.shape).width for name in grams}
    return {
        "ranks": {name: of.ranks() for name, of in grams.items()},
        "widths": widths,
        "positions": grams["receiver"].positions,
    }


def report(result: Result) -> str:
    """One row per cache, and what fusing changes."""
    rows = [
        [name, str(of["width"]), *(interval(of["means"][k], 1, "") for k in ("keys", "values"))]
        for name, of in result["caches"].items()
    ]
    change = result["fused_minus_receiver"]
    rows.append(
        ["fused minus receiver, fused layers", "", *(interval(change[k], 2) for k in change)]
    )
    heads = ["cache", "width", "keys [95 %]", "values [95 %]"]
    positions = result["positions"]
    return (
        f"Means over layers, of {len(positions)} parts with {min(positions)} to {max(positions)} "
        "positions of messages each. A part with few positions for its width bounds every rank, "
        f"the same for all caches.\n\n{table(heads, rows)}\n"
    )


def draw(result: Result, figure: Any) -> None:
    """Ranks over layers, keys and values."""
    colours = {"receiver": "#999999", "fused": "#0072b2", "sharer": "#e69f00"}
    for at, axes in enumerate(figure.subplots(1, 2)):
        for name, of in result["caches"].items():
            axes.plot(of["layers"][at], label=name, color=colours[name], marker=".")
        axes.set_title(("keys", "values")[at])
        axes.set_xlabel("layer")
        axes.set_ylabel("effective rank")
    axes.legend()
