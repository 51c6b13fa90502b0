"""Records -> a result (what the JSON file holds) -> tables for people. No MLX here."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.task import Item, Task
from c2c_mlx.talk import relay

Record = dict[str, Any]
Result = dict[str, Any]

FEW_GROUPS = 4  # as many are shown in the terminal; the files have all
_WIDE = 10_000  # characters: more than any row has, so that no cell is cut or broken
NAMES = {"chrf": "chrF", "bleu": "BLEU", "nll": "NLL (nats per receiver token)"}


def summarise(
    task: Task,
    items: Sequence[Item],
    records: Mapping[str, Mapping[str, Record]],
    about: Mapping[str, Any],
    seed: int,
) -> Result:
    """The whole result.

    Args:
        task: what scored the records.
        items: the items, in order.
        records: per mode and item.
        about: whatever else is to be said of the run.
        seed: of the bootstrap.
    """
    groups = sorted({item.group for item in items} - {""})
    members = {group: [i for i in items if i.group == group] for group in groups}
    own = records.get("receiver")
    modes = {}
    for mode, found in records.items():
        modes[mode] = {
            "scores": _scores(task, items, found, own, seed),
            "groups": {
                g: {"scores": _scores(task, of, found, own, seed)} for g, of in members.items()
            },
            "latency": _latency(found.values()),
            "tokens": _tokens(found.values()),
            "failed": {name: r["error"] for name, r in found.items() if "error" in r},
            "items": [found[item.id] for item in items],
        }
    asked = [
        {"id": i.id, "group": i.group, "prompt": i.messages, "reference": i.reference}
        for i in items
    ]
    return {**about, "kind": task.kind, "groups": groups, "modes": modes, "items": asked}


def _scores(
    task: Task,
    items: Sequence[Item],
    found: Mapping[str, Record],
    own: Mapping[str, Record] | None,
    seed: int,
) -> dict[str, Any]:
    corpus = task.corpus(items, [found[item.id]["text"] for item in items])
    scores = {}
    for name in task.scores:
        values = _values(found, items, name)
        scores[name] = scoring.mean(list(values.values()), seed)
        if name in corpus:
            scores[name]["corpus"] = corpus[name]
        if own is not None and own is not found:
            receivers = _values(own, items, name)
            scores[name]["vs_receiver"] = scoring.difference(values, receivers, seed)
    return scores


def _values(found: Mapping[str, Record], items: Sequence[Item], name: str) -> dict[str, float]:
    of_items = {item.id: found[item.id]["scores"] for item in items}
    return {i: scores[name] for i, scores in of_items.items() if name in scores}


def _latency(records: Any) -> dict[str, float | int]:
    """Medians over the items that were asked one by one."""
    timed = [r for r in records if "first_token_s" in r]
    if not timed:
        return {}
    return {
        "first_token_s": statistics.median(r["first_token_s"] for r in timed),
        "total_s": statistics.median(r["total_s"] for r in timed),
        "items": len(timed),
    }


def _tokens(records: Any) -> dict[str, float]:
    """Means per item."""
    good = [r for r in records if "error" not in r]
    names = ("prompt_tokens", "generated_tokens", "relayed_tokens")
    return {n: statistics.fmean(r[n] for r in good) for n in names if good and n in good[0]}


# --- tables -------------------------------------------------------------------------------------


def tables(result: Result, every_group: bool) -> str:
    """Tables that read well as they are, and as Markdown."""
    groups = result["groups"] if every_group or len(result["groups"]) <= FEW_GROUPS else []
    parts = [
        score_table(name, result["modes"], groups)
        for name in next(iter(result["modes"].values()))["scores"]
    ]
    return "\n\n".join([*parts, _cost_table(result["modes"]), *_notes(result["modes"])])


def score_table(name: str, modes: Mapping[str, Any], groups: Sequence[str]) -> str:
    """One score of every mode, over all items and per group."""
    rows = []
    for group in ("", *groups):
        for mode, of_mode in modes.items():
            of = of_mode["groups"][group] if group else of_mode
            score = of["scores"][name]
            cells = [group or "all", mode, str(score.get("items", 0)), _with_ends(name, score, "")]
            cells.append(_with_ends(name, score.get("vs_receiver", {}), "+"))
            if "corpus" in score:
                cells.append(f"{score['corpus']:.1f}")
            rows.append(cells)
    heads = ["items of", "mode", "n", f"{NAMES.get(name, name)} [95 %]", "minus receiver [95 %]"]
    if len(rows[0]) > len(heads):
        heads.append("corpus")
    return table(heads, rows)


def _cost_table(modes: Mapping[str, Any]) -> str:
    heads = ["mode", "first token s", "total s", "prompt tokens", "written", "relayed", "failed"]
    rows = []
    for mode, of in modes.items():
        latency, tokens = of["latency"], of["tokens"]
        rows.append(
            [
                mode,
                *(f"{latency[k]:.3f}" if latency else "" for k in ("first_token_s", "total_s")),
                *(
                    f"{tokens[k]:.1f}" if k in tokens else ""
                    for k in ("prompt_tokens", "generated_tokens", "relayed_tokens")
                ),
                str(len(of["failed"])),
            ]
        )
    return table(heads, rows)


def _notes(modes: Mapping[str, Any]) -> list[str]:
    failed = [
        f"{mode}, item {i}: {why}" for mode, of in modes.items() for i, why in of["failed"].items()
    ]
    relayed = [r for r in modes.get("relay", {}).get("items", []) if "relayed_text" in r]
    nothing = Counter(
        relay.why_nothing(r["relayed_tokens"]) for r in relayed if not r["relayed_text"]
    )
    timed = next(iter(modes.values()))["latency"].get("items", 0)
    notes = [f"Seconds are medians over {timed} items that were asked one by one."] if timed else []
    if nothing:
        why = ", ".join(f"{n} x {reason}" for reason, n in nothing.items())
        notes.append(
            f"The relay's text is empty for {nothing.total()} of {len(relayed)} items: {why}."
        )
    if failed:
        notes.append("Failed, and counted as wrong:\n" + "\n".join(f"- {line}" for line in failed))
    return notes


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of even width."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*heads, box=box.MARKDOWN)
    for row in rows:
        drawn.add_row(*row)
    console = Console(width=_WIDE, force_terminal=False, markup=False, emoji=False)
    with console.capture() as text:
        console.print(drawn)
    return text.get().strip()


def _with_ends(name: str, score: Mapping[str, Any], sign: str) -> str:
    if not score.get("items"):
        return ""
    digits = 1 if name in ("chrf", "bleu") else 3
    numbers = [f"{x:{sign}.{digits}f}" for x in (score["mean"], *score["ci95"])]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def markdown(result: Result) -> str:
    """The report that stands beside the JSON file."""
    about = {k: v for k, v in result.items() if isinstance(v, (str, int, float))}
    facts = [*about.items(), *result["versions"].items()]
    lines = "\n".join(f"- {name}: {value}" for name, value in facts)
    return f"# c2c-eval: {result['task']}\n\n{lines}\n\n{tables(result, every_group=True)}\n"


def compare_table(found: Result, names: Sequence[str]) -> str:
    """What `compare` found, for people."""
    rows = [
        [NAMES.get(name, name), group, str(of["difference"].get("items", 0))]
        + [
            _with_ends(name, of["a"], ""),
            _with_ends(name, of["b"], ""),
            _with_ends(name, of["difference"], "+"),
        ]
        for name, groups in found.items()
        for group, of in groups.items()
    ]
    return table(["score", "items of", "n", *names, "difference [95 %]"], rows)
