"""How far a long job is: what downloads and conversions tell whoever waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report. `done` and `total` share a unit: bytes of a download, steps of a conversion."""

    what: str  # for people: "downloading gemma3-270m"
    done: int
    total: int  # 0: not known yet


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Reports to nobody."""
