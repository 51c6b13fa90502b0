"""Which layers gain when a cache is enriched, one at a time and together? (paper, section 3.1)."""

from __future__ import annotations

from typing import Any

import c2c_mlx.blas  # noqa: F401

from c2c_mlx.evaluation.report import table
from c2c_mlx.studies import examples
from c2c_mlx.studies.study import Result, Work, halves, interval, records, weigh

ALONE = "receiver"


def run(work: Work) -> Result:
    """Enriches one layer at a time on one half of the questions, then many on the other half."""
    shown, items = examples.draw(work.items, work.shots, work.seed)
    enriching = examples.Enriching(work.receiver, shown)
    first, second = halves(items, work.seed)
    layers = enriching.layers
    alone: dict[str, list[int]] = {ALONE: []}
    singly = {f"layer {layer}": [layer] for layer in layers}
    _weigh_all(work, enriching, first, alone | singly, "one layer")
    single: list[Result] = [
        {"layer": layer, "difference": work.difference(f"layer {layer}", ALONE, first)}
        for layer in layers
    ]
    ranked: list[int] = [
        of["layer"] for of in sorted(single, key=lambda of: of["difference"]["mean"])
    ]
    counts = sorted({k for k in (1, 2, 3, 5, 10, 15, 20, 30, 40) if k < len(layers)})
    many = {f"best {k}": ranked[:k] for k in counts}
    many |= {f"worst {k}": ranked[-k:] for k in counts}
    many[f"all {len(layers)}"] = ranked
    _weigh_all(work, enriching, second, alone | many, "many layers")
    together = [
        {
            "condition": name,
            "side": name.split()[0],
            "count": len(of),
            "layers": sorted(of),
            "difference": work.difference(name, ALONE, second),
        }
        for name, of in many.items()
    ]
    return {
        "shots": work.shots,
        "questions": [len(first), len(second)],
        "single": single,
        "ranked": ranked,
        "together": together,
    }


def _weigh_all(
    work: Work, enriching: examples.Enriching, items: Any, chosen: dict[str, list[int]], what: str
) -> None:
    """Weighs every item from its cache, enriched in the layers of each condition."""
    todo = work.missing(items, list(chosen))
    for number, item in enumerate(todo, len(items) - len(todo) + 1):
        caches = enriching(item)
        readings = (
            (name, caches.reading(work.receiver, caches.mixed(layers)))
            for name, layers in chosen.items()
        )
        answers = weigh(work.task, item, readings, work.receiver.tokenizer)
        work.log.append(records(item, answers))
        work.progress(what, number, len(items))


def report(result: Result) -> str:
    """The best and the worst layers, and what they come to together."""
    by_layer = {of["layer"]: of["difference"] for of in result["single"]}
    ranked = result["ranked"]
    shown = ranked if len(ranked) <= 10 else [*ranked[:5], *ranked[-5:]]
    one = [[str(layer), interval(by_layer[layer], 4)] for layer in shown]
    many = [[of["condition"], interval(of["difference"])] for of in result["together"]]
    first, second = result["questions"]
    head = "NLL minus receiver alone [95 %]"
    return (
        f"{result['shots']} examples. Layers were ranked on {first} questions and cumulated on "
        f"{second} others; below 0 is better.\n\n{table(['layer', head], one)}\n\n"
        f"{table(['enriched', head], many)}\n"
    )


def draw(result: Result, figure: Any) -> None:
    """A bar per layer, and two curves over the number of enriched layers."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    means = [of["difference"]["mean"] for of in result["single"]]
    ends = [of["difference"]["ci95"] for of in result["single"]]
    names = [of["layer"] for of in result["single"]]
    errors = [
        [m - e[0] for m, e in zip(means, ends, strict=True)],
        [e[1] - m for m, e in zip(means, ends, strict=True)],
    ]
    left.bar(names, means, yerr=errors, color="#0072b2", ecolor="#999999")
    left.set_xlabel("the one enriched layer")
    left.set_ylabel("NLL minus receiver alone")
    last = result["together"][-1]
    for side, colour in (("best", "#0072b2"), ("worst", "#d55e00")):
        points = [of for of in result["together"] if of["side"] == side] + [last]
        x = [of["count"] for of in points]
        right.plot(x, [of["difference"]["mean"] for of in points], marker="o", color=colour)
        low, high = zip(*(of["difference"]["ci95"] for of in points), strict=True)
        right.fill_between(x, low, high, color=colour, alpha=0.2, label=f"{side} layers")
    right.axhline(0, color="black", linewidth=0.5)
    right.set_xlabel("enriched layers")
    right.legend()
