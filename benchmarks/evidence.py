"""Results of c2c-eval side by side, in Markdown: means, and C2C minus each of the others, paired.

python benchmarks/evidence.py C2C=main.json twin=twin.json:c2c-zeroed receiver=base.json:receiver
python benchmarks/evidence.py --content C2C=content.json twin=zeros.json:c2c-zeroed \
    English=english.json:receiver

The first one is compared with all others. Groups of `lang` are told as a whole, too: "fr" is
"fr new" and "fr trained". With --content the score is how many prompts of a set make their own
answer the likeliest of its set (`c2c_mlx.evaluation.content`), and the intervals draw sets.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from c2c_mlx.evaluation import content, report, result, scoring
from c2c_mlx.evaluation.task import MODES

Values = dict[str, dict[str, dict[str, float]]]  # score, group, item or set


def values(path: Path, mode: str, as_sets: bool) -> Values:
    """What a mode of a result scored, per score and group."""
    found = result.read(path)
    if mode not in found["modes"]:
        raise SystemExit(f"{path} has no mode {mode}; it has {', '.join(found['modes'])}")
    if as_sets:
        return {"content": whole_languages(content.scores(found, mode))}
    records = {r["id"]: r["scores"] for r in found["modes"][mode]["items"]}
    scored: Values = {}
    for item in found["items"]:
        for name, score in records[item["id"]].items():
            for group in {"", item["group"]}:
                scored.setdefault(name, {}).setdefault(group, {})[item["id"]] = score
    return {name: whole_languages(groups) for name, groups in scored.items()}


def whole_languages(groups: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """With the groups' first words as groups, too."""
    found: dict[str, dict[str, float]] = {}
    for group in sorted(groups):
        found.setdefault(group.partition(" ")[0], {}).update(groups[group])
        found.setdefault(group, {}).update(groups[group])
    return found


def tell(name: str, sides: dict[str, dict[str, dict[str, float]]]) -> str:
    """One score: a table of means, and one of differences."""
    first, *others = sides
    groups = [g for g in sides[first] if all(g in side for side in sides.values())]
    means, differences = [], []
    for group in groups or [""]:
        n = str(len(sides[first][group]))
        row, compared = [group or "all", n], [group or "all"]
        for side in sides.values():
            row.append(shown(name, scoring.mean(list(side.get(group, {}).values()), 0), ""))
        for other in others:
            both = sides[first][group], sides[other].get(group, {})
            compared.append(shown(name, scoring.difference(*both, 0), "+"))
        means.append(row)
        differences.append(compared)
    heads = [f"{first} minus {other}" for other in others]
    parts = [report.table([name, "n", *sides], means)]
    if others:
        parts.append(report.table([name, *heads], differences))
    return "\n\n".join(parts)


def shown(name: str, score: dict[str, Any], sign: str) -> str:
    """A mean with its interval where it is a difference, alone where it is not."""
    if not score:
        return ""
    digits = 1 if name in ("chrf", "bleu") else 3
    if not sign:
        return f"{score['mean']:.{digits}f}"
    mean, low, high = (f"{x:+.{digits}f}" for x in (score["mean"], *score["ci95"]))
    return f"{mean} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sides", nargs="+", metavar="NAME=OUT[:MODE]", help="mode c2c if not said")
    parser.add_argument("--content", action="store_true", help="of sets of prompts")
    args = parser.parse_args()
    found: dict[str, Values] = {}
    for side in args.sides:
        name, _, place = side.partition("=")
        path, _, mode = place.rpartition(":")
        path, mode = (path, mode) if mode in MODES else (place, "c2c")
        found[name] = values(Path(path), mode, args.content)
    for score in next(iter(found.values())):
        print(tell(score, {name: of[score] for name, of in found.items() if score in of}), "\n")


if __name__ == "__main__":
    main()
