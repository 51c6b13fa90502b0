"""Fusers that were trained here: several for a pair, in the cache; the latest is the pair's own."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from c2c_mlx.fusers import disk
from c2c_mlx.models import registry
from c2c_mlx.models.paths import cache_home


def pair_name(receiver: str, sharer: str) -> str:
    """What a pair of model arguments is called: receiver+sharer, by alias where there is one."""
    return "+".join(registry.alias_of(model) or _called(model) for model in (receiver, sharer))


def runs(receiver: str, sharer: str) -> list[Path]:
    """The pair's training runs in their order, finished or not."""
    found = (_home() / pair_name(receiver, sharer)).glob("[0-9]*")
    return sorted((run for run in found if run.name.isdecimal()), key=lambda run: int(run.name))


def next_run(receiver: str, sharer: str) -> Path:
    """Where the pair's next run goes; nobody has been there."""
    last = runs(receiver, sharer)[-1:]
    number = 1 + int(last[0].name) if last else 1
    return _home() / pair_name(receiver, sharer) / str(number)


def latest(receiver: str, sharer: str) -> Path | None:
    """The pair's latest fuser; None if there is none that could be loaded."""
    return next(filter(_has_fuser, reversed(runs(receiver, sharer))), None)


def every() -> Iterator[tuple[str, Path]]:
    """Name (receiver+sharer/number) and folder of every fuser that was trained here."""
    for pair in sorted(_home().glob("*+*")):
        numbers = [run for run in pair.glob("[0-9]*") if run.name.isdecimal() and _has_fuser(run)]
        for run in sorted(numbers, key=lambda run: int(run.name)):
            yield f"{pair.name}/{run.name}", run


def find(name: str) -> Path | None:
    """The folder of a fuser by its name; None if none is called so."""
    return dict(every()).get(name)


def _called(model: str) -> str:
    """A hub id, whole; or a folder's name and a digest of its place, for many are called alike."""
    if (folder := Path(os.path.expanduser(model))).is_dir():
        place = folder.resolve()
        model = f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:6]}"
    return re.sub(r"[^\w.-]+", "-", model.replace("/", "--"))


def _home() -> Path:
    return cache_home() / "trained"


def _has_fuser(run: Path) -> bool:
    return (run / disk.CONFIG).is_file()
