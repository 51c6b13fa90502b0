"""Records -> a result (what the JSON file holds) -> tables for people. No MLX here."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.task import Item, Task
from c2c_mlx.talk import relay

Record = dict[str, Any]
Result = dict[str, Any]

FEW_GROUPS = 4  # as many are shown in the terminal; the files have all
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
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


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


# --- files --------------------------------------------------------------------------------------


def write(path: Path, result: Result, report: str) -> None:
    """Writes a result and, beside it, its report; neither is ever half there.

    Raises:
        C2CError: if one of them is there already or can't be written.
    """
    check_free(path)
    data = json.dumps(result, ensure_ascii=False, indent=1) + "\n"
    for target, text in ((path, data), (report_path(path), report)):
        partial = target.with_name(f".{target.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise C2CError(f"{target}: cannot write ({e.strerror})") from None


def report_path(path: Path) -> Path:
    """Where the report of a result stands."""
    return path.with_suffix(".md")


def check_free(path: Path) -> None:
    """Refuses a place where a result is.

    Raises:
        C2CError: if there is a file already, or no folder for it.
    """
    for target in (path, report_path(path)):
        if target.exists():
            raise C2CError(f"--json {path}: {target} is there already; name another file")
    if not path.parent.is_dir():
        raise C2CError(f"--json {path}: there is no folder {path.parent}")


def read(path: Path) -> Result:
    """Reads a result.

    Raises:
        C2CError: if it is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result["modes"], dict) or not isinstance(result["items"], list):
            raise TypeError
        return dict(result)
    except OSError as e:
        raise C2CError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise C2CError(f"{path}: not a result of c2c-eval --json") from None


# --- two results --------------------------------------------------------------------------------


def compare(a: tuple[Result, str], b: tuple[Result, str], seed: int) -> Result:
    """The difference between two results, a mode of each, item by item.

    Raises:
        C2CError: if a mode is not there, or the items are not the same.
    """
    for result, mode in (a, b):
        if mode not in result["modes"]:
            raise C2CError(f"no mode {mode} in that result; it has {', '.join(result['modes'])}")
    if a[0]["items"] != b[0]["items"]:
        raise C2CError(
            "the two results are of different items: the same --task, --limit and --seed"
        )
    items = a[0]["items"]
    records = [
        {r["id"]: r["scores"] for r in result["modes"][mode]["items"]} for result, mode in (a, b)
    ]
    found: Result = {}
    for name in a[0]["modes"][a[1]]["scores"]:
        found[name] = {}
        for group in ("", *a[0]["groups"]):
            ids = [i["id"] for i in items if not group or i["group"] == group]
            x, y = ({i: of[i][name] for i in ids if name in of[i]} for of in records)
            found[name][group or "all"] = {
                "a": scoring.mean(list(x.values()), seed),
                "b": scoring.mean(list(y.values()), seed),
                "difference": scoring.difference(x, y, seed),
            }
    return found


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
