"""The names that commands accept: `weights/registry.toml`, read and typed."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the package index."""

    wheel: str  # a pinned requirement: name==version
    size: int  # bytes of the wheel
    member: str  # path inside the wheel


@dataclass(frozen=True)
class Embedded:
    """A model that comes as wheels: one GGUF file, possibly cut into parts."""

    format: str  # which conversion: a key of `c2c_mlx.embedded.convert_gguf.FORMATS`
    sha256: str  # of the parts, joined
    parts: tuple[WheelFile, ...]
    notices: tuple[WheelFile, ...]  # licence texts, kept beside the converted model


@dataclass(frozen=True)
class ModelEntry:
    """One `[models.<alias>]` table; exactly one of `hub` and `embedded` is set."""

    alias: str
    description: str
    licence: str
    hub: str | None = None
    embedded: Embedded | None = None


@cache
def _document() -> dict[str, Any]:
    return tomllib.loads((WEIGHTS / "registry.toml").read_text(encoding="utf-8"))


def aliases() -> tuple[str, ...]:
    """Every model alias, in the order of the file."""
    return tuple(_document()["models"])


def find_model(alias: str) -> ModelEntry | None:
    """The entry of an alias; None if there is no such alias."""
    table = _document()["models"].get(alias)
    if table is None:
        return None
    embedded = _embedded(table) if table.get("source") == "embedded" else None
    return ModelEntry(alias, table["description"], table["licence"], table.get("hub"), embedded)


def _embedded(table: dict[str, Any]) -> Embedded:
    parts, notices = (tuple(WheelFile(**f) for f in table[key]) for key in ("parts", "notices"))
    return Embedded(table["format"], table["sha256"], parts, notices)


def default_pair() -> tuple[str, str]:
    """The aliases (receiver, sharer) that run when none are named."""
    table = _document()["default"]
    return table["receiver"], table["sharer"]


def fusers() -> dict[str, Path]:
    """Name -> folder of every shipped fuser whose folder is there."""
    folders = {name: WEIGHTS / t["folder"] for name, t in _document()["fusers"].items()}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def find_fuser(receiver_alias: str, sharer_alias: str) -> Path | None:
    """The folder of the shipped fuser for a pair of aliases; None if there is none."""
    for name, table in _document()["fusers"].items():
        if (table["receiver"], table["sharer"]) == (receiver_alias, sharer_alias):
            return fusers().get(name)
    return None
