"""The app's own two themes, in Okabe and Ito's colours, which every eye tells apart; the choice."""

from __future__ import annotations

import json
from pathlib import Path

from textual.theme import Theme

from c2c_mlx import atomic
from c2c_mlx.errors import C2CError
from c2c_mlx.models import paths
from c2c_mlx.tui import storage

DARK = Theme(
    name="c2c-dark",
    primary="#56b4e9",
    secondary="#e69f00",
    accent="#f0e442",
    warning="#e69f00",
    error="#ff7a6b",
    success="#35c69b",
    foreground="#d8dee6",
    background="#10151c",
    surface="#171d26",
    panel="#202833",
)
LIGHT = Theme(
    name="c2c-light",
    primary="#0072b2",
    secondary="#b34f00",
    accent="#8a5a00",
    warning="#b34f00",
    error="#b3261e",
    success="#00704f",
    foreground="#1c232b",
    background="#fbfbf8",
    surface="#f2f2ee",
    panel="#e6e6e0",
    dark=False,
)


def path() -> Path:
    """Where the choice is kept."""
    return paths.data_home() / "theme.json"


def chosen() -> str:
    """The theme that the user chose last; it may be one that there is no more."""
    try:
        name = storage.read_json(path())
    except C2CError:
        return DARK.name
    return name if isinstance(name, str) else DARK.name


def choose(name: str) -> None:
    """Keeps the choice for the next start.

    Raises:
        C2CError: if the disk won't have it.
    """
    atomic.write_text(path(), json.dumps(name))
