"""Rows that are kept out of training, to be measured on. No MLX here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2c_mlx.training.files import ChatRow

MOST, FEWEST = 64, 20  # chats that are kept out; different ones there must be for that
_SHARE = 10  # one row in so many, at most


def hold_out(
    sources: Sequence[Sequence[ChatRow]], seed: int
) -> tuple[list[list[ChatRow]], list[ChatRow]]:
    """Takes some chats out of the sources; what is asked in them is asked nowhere in the rest.

    Rows that begin alike are one chat: of a conversation that is cut by its turns, the later rows
    hold what is asked in the earlier ones.

    Args:
        sources: the rows of each.
        seed: which chats are taken depends on it and on the rows alone.

    Returns:
        What is left of each source, never nothing, and one row of each chat that was taken; none
        if there are fewer than `FEWEST` that begin with different questions.
    """
    asked: dict[str, list[tuple[int, int]]] = {}
    for number, rows in enumerate(sources):
        for at, row in enumerate(rows):
            asked.setdefault(_beginning(row), []).append((number, at))
    if len(asked) < FEWEST:
        return [list(rows) for rows in sources], []
    left = [len(rows) for rows in sources]
    room = sum(left) // _SHARE
    groups = list(asked.values())
    taken: set[tuple[int, int]] = set()
    kept_out: list[ChatRow] = []
    for i in np.random.default_rng((seed, FEWEST)).permutation(len(groups)):
        group = groups[i]
        leaves = [n - sum(number == at for at, _ in group) for number, n in enumerate(left)]
        if len(group) > room or min(leaves) < 1:
            continue
        left, room = leaves, room - len(group)
        taken.update(group)
        number, at = group[0]
        kept_out.append(sources[number][at])
        if len(kept_out) == MOST:
            break
    rest = [
        [row for at, row in enumerate(rows) if (number, at) not in taken]
        for number, rows in enumerate(sources)
    ]
    return rest, kept_out


def _beginning(row: ChatRow) -> str:
    """All up to the first question; of a row without any, all that comes before the answer."""
    roles = [m["role"] for m in row.messages]
    end = roles.index("user") + 1 if "user" in roles else len(roles) - 1
    return repr([(m["role"], m["content"]) for m in row.messages[:end]])
