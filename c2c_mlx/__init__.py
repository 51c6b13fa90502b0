"""Two language models that talk through their KV caches: Cache-to-Cache (arXiv 2510.03215) on MLX.

Importing this package costs nothing: MLX is loaded when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from c2c_mlx.fusion.c2c import C2C as C2C
    from c2c_mlx.fusion.fuser import Fuser as _Fuser
    from c2c_mlx.fusion.layers import k_nearest as k_nearest
    from c2c_mlx.fusion.layers import last_aligned as last_aligned
    from c2c_mlx.models.load import LanguageModel as LanguageModel
    from c2c_mlx.models.load import load_model as load_model
    from c2c_mlx.talk.session import ChatSession as ChatSession
    from c2c_mlx.text.tokens import align_ids as align_ids

    class Fuser(_Fuser):
        """With the folder's functions, as `__getattr__` offers them."""

        @classmethod
        def load(cls, folder: str | Path, bits: Literal[0, 4, 8] = 0) -> Fuser:
            """See `c2c_mlx.fusers.disk.load`."""

        def save(self, folder: str | Path) -> None:
            """See `c2c_mlx.fusers.disk.save`."""


__version__ = "0.1.0"

_HOMES = {
    "C2C": "c2c_mlx.fusion.c2c",
    "ChatSession": "c2c_mlx.talk.session",
    "Fuser": "c2c_mlx.fusion.fuser",
    "LanguageModel": "c2c_mlx.models.load",
    "align_ids": "c2c_mlx.text.tokens",
    "k_nearest": "c2c_mlx.fusion.layers",
    "last_aligned": "c2c_mlx.fusion.layers",
    "load_model": "c2c_mlx.models.load",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    if name == "Fuser":  # which knows no files; here it gets the functions of its folder
        disk = import_module("c2c_mlx.fusers.disk")
        found.load, found.save = staticmethod(disk.load), disk.save
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
