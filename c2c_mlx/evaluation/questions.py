"""The name of a file or of a benchmark -> a task, and as many of its items as are wanted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation import files, hub_tasks
from c2c_mlx.evaluation.choice import Method
from c2c_mlx.evaluation.task import Item, Task


def load(name: str, method: Method) -> tuple[Task, list[Item]]:
    """Reads a file, or fetches a benchmark.

    Args:
        name: of either.
        method: of multiple choice.

    Raises:
        C2CError: if the name is neither's, or the items can't be had.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return files.read(path, method)
    if name in hub_tasks.BENCHMARKS:
        return hub_tasks.read(name, method)
    known = ", ".join(hub_tasks.BENCHMARKS)
    raise C2CError(f"--task {name}: neither a file nor one of {known}")


def draw(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """So many items, spread over the whole task, in their order; None: all of them."""
    if limit is None or limit >= len(items):
        return list(items)
    import numpy as np

    chosen = np.random.default_rng(seed).choice(len(items), limit, replace=False)
    return [items[i] for i in sorted(chosen.tolist())]
