"""Packs a recipe's text for the package: compressed, and with a word on whose answers these are.

`python -m c2c_mlx.training.recipes.pack OUT FOLDER` reads what make_reading wrote into OUT.
"""

from __future__ import annotations

import json
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from c2c_mlx.atomic import overwriting
from c2c_mlx.errors import C2CError

Row = dict[str, Any]

MEASURED = 16  # rows of each part that a run measures on: more would cost it more than they tell
MOST = 4_000_000  # bytes of all files
_KEYS = ("messages", "answer_to", "own", "cut")


def pack(source: Path, folder: Path, receiver: str) -> int:
    """Writes PART/train.jsonl.xz and valid.jsonl.xz for every part that has both.

    Args:
        source: PART/train.jsonl and PART/valid.jsonl, for each part.
        folder: where they go.
        receiver: alias of the model that gave the answers which no person gave.

    Returns:
        Bytes of all that was written.

    Raises:
        C2CError: if that is more than the package may carry.
    """
    parts = [p.parent for p in sorted(source.glob("*/train.jsonl"))]
    parts = [part for part in parts if part.name != "dropped"]
    rows = {
        (part.name, split): _rows(part / f"{split}.jsonl")
        for part in parts
        for split in ("train", "valid")
    }
    # What a prompt's answer was given to, for the conversations that end with it.
    twins = {_asked(row): row["answer_to"] for some in rows.values() for row in some if _twin(row)}
    total = 0
    for (part, split), some in rows.items():
        some = some[:MEASURED] if split == "valid" else some
        lines = [json.dumps(_packed(r, twins, receiver), ensure_ascii=False) for r in some]
        packed = lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9)
        total += len(packed)
        if total > MOST:
            raise C2CError(f"{folder}: more than {MOST} bytes; leave rows out")
        (folder / part).mkdir(parents=True, exist_ok=True)
        with overwriting(folder / part / f"{split}.jsonl.xz") as partial:
            partial.write_bytes(packed)
    return total


def _packed(row: Row, twins: dict[str, Any], receiver: str) -> Row:
    kept = {key: row[key] for key in _KEYS if row.get(key)}
    if not row.get("own") and (twin := twins.get(_asked(row))):
        kept["answer_to"] = twin
    return kept | ({"by": receiver} if kept.get("own") or kept.get("answer_to") else {})


def _asked(row: Row) -> str:
    """What the user said last."""
    return str(row["messages"][-2]["content"])


def _twin(row: Row) -> bool:
    return bool(row.get("answer_to")) and len(row["messages"]) == 2


def _rows(path: Path) -> list[Row]:
    lines: Iterable[str] = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2]), "smollm2-135m"), "bytes")
