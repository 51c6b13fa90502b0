"""Two language models that talk through their KV caches: Cache-to-Cache (arXiv 2510.03215) on MLX.

Importing this package costs nothing: MLX is loaded when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from c2c_mlx.chat import ChatSession as ChatSession
    from c2c_mlx.fuser import Fuser as Fuser
    from c2c_mlx.generate import C2C as C2C
    from c2c_mlx.models import LanguageModel as LanguageModel
    from c2c_mlx.models import load_model as load_model

__version__ = "0.1.0"

_HOMES = {
    "C2C": "c2c_mlx.generate",
    "ChatSession": "c2c_mlx.chat",
    "Fuser": "c2c_mlx.fuser",
    "LanguageModel": "c2c_mlx.models",
    "load_model": "c2c_mlx.models",
}

__all__ = ["C2C", "ChatSession", "Fuser", "LanguageModel", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
