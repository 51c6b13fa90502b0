"""Is a cache better that was computed behind examples, without being longer? (paper, 3.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.modes import write
from c2c_mlx.evaluation.report import NAMES, table
from c2c_mlx.studies import examples
from c2c_mlx.studies.study import Result, Work, interval, scored, weigh

ALONE, FEW_SHOT, ENRICHED = "receiver", "few-shot", "enriched"
CONDITIONS = (ALONE, FEW_SHOT, ENRICHED)
MAX_TOKENS = 64


def run(work: Work) -> Result:
    """The receiver alone, with examples in its context, and with their traces in its cache."""
    shown, items = examples.draw(work.items, work.shots, work.seed)
    enriching = examples.Enriching(work.receiver, shown)
    todo = work.missing(items, CONDITIONS)
    for number, item in enumerate(todo, len(items) - len(todo) + 1):
        caches = enriching(item)
        each = dict(zip(CONDITIONS, (caches.alone, caches.few_shot, caches.enriched), strict=True))
        readings = {name: caches.reading(work.receiver, cache) for name, cache in each.items()}
        answers = weigh(work.task, item, readings.items(), work.receiver.tokenizer)
        texts = {name: "" for name in CONDITIONS}
        if not item.choices:
            written = write(list(readings.values()), MAX_TOKENS)
            texts = {name: w.text for name, w in zip(CONDITIONS, written, strict=True)}
        found = []
        for name, answer in answers.items():
            scores = scored(item, answer)
            if not item.choices:
                scores = work.task.score(item, replace(answer, text=texts[name]), None) | scores
            longer = caches.few_shot_tokens if name == FEW_SHOT else caches.prompt_tokens
            found.append(
                {"mode": name, "id": item.id, "scores": scores, "prompt_tokens": longer}
                | {"text": texts[name]}
            )
        work.log.append(found)
        work.progress("enrich", number, len(items))
    names = list(work.log.records[ALONE][items[0].id]["scores"])
    conditions: Result = {}
    for name in CONDITIONS:
        of = [work.log.records[name][item.id] for item in items]
        conditions[name] = {
            "scores": {
                score: scoring.mean(list(work.scores(name, score, items).values()), work.seed)
                for score in names
            },
            "vs_receiver": {score: work.difference(name, ALONE, items, score) for score in names},
            "cache_tokens": sum(r["prompt_tokens"] for r in of) / len(of),
            "items": of,
        }
    return {"shots": work.shots, "examples": [e.id for e in shown], "conditions": conditions}


def report(result: Result) -> str:
    """A table with one row per condition."""
    found = result["conditions"]
    names = list(found[ALONE]["scores"])
    heads = ["condition", "cache positions"]
    heads += [f"{NAMES.get(n, n)} [95 %]" for n in names] + [f"{n} minus receiver" for n in names]
    rows = [
        [name, f"{of['cache_tokens']:.1f}"]
        + [interval(of["scores"][n], sign="") for n in names]
        + [interval(of["vs_receiver"][n]) if name != ALONE else "" for n in names]
        for name, of in found.items()
    ]
    return (
        f"{result['shots']} examples, the same for every question; {len(found[ALONE]['items'])} "
        "questions. *few-shot*: the examples stand in the cache. *enriched*: the question's "
        "positions were computed behind them, then the examples' were dropped and the keys moved "
        f"back, so the cache is as long as the receiver's own.\n\n{table(heads, rows)}\n"
    )


def draw(result: Result, figure: Any) -> None:
    """One panel per score."""
    found = result["conditions"]
    names = list(found[ALONE]["scores"])
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        means = [of["scores"][name]["mean"] for of in found.values()]
        ends = [of["scores"][name]["ci95"] for of in found.values()]
        errors = [[m - e[0] for m, e in zip(means, ends, strict=True)]]
        errors += [[e[1] - m for m, e in zip(means, ends, strict=True)]]
        axes.bar(list(found), means, yerr=errors, color=["#999999", "#56b4e9", "#0072b2"])
        axes.set_title(NAMES.get(name, name), fontsize=9)
