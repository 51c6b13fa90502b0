"""Blind votes: one line of JSON each in the user's data folder, and what they come to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from c2c_mlx import atomic
from c2c_mlx.errors import C2CError
from c2c_mlx.events import Loaded
from c2c_mlx.models import paths

Choice = Literal["c2c", "relay", "tie"]


@dataclass(frozen=True)
class Vote:
    """Which answer was the better one, when nobody knew whose it was."""

    choice: Choice
    receiver: str
    sharer: str
    fuser: str
    modified: bool  # whether gates had been closed or opened by hand
    time: str = ""


def pair(loaded: Loaded) -> tuple[str, str, str]:
    """Receiver, sharer and fuser as a vote has them; several with commas."""
    fusers = ", ".join(link.fuser for link in loaded.links)
    return loaded.receiver, ", ".join(loaded.sharers), fusers


def path() -> Path:
    """Where votes are kept."""
    return paths.data_home() / "votes.jsonl"


def cast(vote: Vote) -> None:
    """Adds a vote to the file.

    Raises:
        C2CError: if the disk won't have it.
    """
    record = asdict(vote) | {"time": f"{datetime.now():%Y-%m-%dT%H:%M:%S}"}
    try:
        atomic.append(path(), json.dumps(record) + "\n")
    except OSError as e:
        raise C2CError(
            f"{path()} cannot be written ({e.strerror or e}): the vote is lost"
        ) from None


def summary(receiver: str, sharer: str, fuser: str) -> str:
    """What the votes for this pair and its unmodified fuser come to, in one line."""
    counts = dict.fromkeys(get_args(Choice), 0)
    for vote in _votes():
        same = (vote.get("receiver"), vote.get("sharer"), vote.get("fuser")) == (
            receiver,
            sharer,
            fuser,
        )
        if same and not vote.get("modified") and vote.get("choice") in counts:
            counts[vote["choice"]] += 1
    total = sum(counts.values())
    if not total:
        return "no blind votes for this pair and fuser yet"
    c2c, relay, ties = (counts[choice] for choice in get_args(Choice))
    votes = "1 blind vote" if total == 1 else f"{total} blind votes"
    return f"{votes}: C2C {c2c}, text relay {relay}, ties {ties}"


def _votes() -> list[dict[str, object]]:
    try:
        lines = path().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    votes = []
    for line in lines:
        try:
            vote = json.loads(line)
        except ValueError:  # a line that a full disk cut off
            continue
        votes += [vote] if isinstance(vote, dict) else []
    return votes
