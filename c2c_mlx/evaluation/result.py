"""A result as a file: written once, read again, and compared with another one item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from c2c_mlx import atomic
from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import scoring

Result = dict[str, Any]


def write(path: Path, result: Result, report: str) -> None:
    """Writes a result and, beside it, its report; neither is ever half there.

    Raises:
        C2CError: if one of them is there already or can't be written.
    """
    check_free(path)
    atomic.write_text(path, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    atomic.write_text(report_path(path), report)


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
