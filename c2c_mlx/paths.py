"""Where the package keeps what it downloads and converts, and what the user made with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_home() -> Path:
    """The package's cache folder, which may not exist yet.

    `C2C_MLX_HOME` decides; without it, the platform's own place for caches.
    """
    if override := os.environ.get("C2C_MLX_HOME"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "c2c-mlx"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "c2c-mlx"


def data_home() -> Path:
    """The folder of what can't be fetched again: sessions, votes. It may not exist yet.

    `C2C_MLX_HOME` decides; without it, the platform's own place for data.
    """
    if override := os.environ.get("C2C_MLX_HOME"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "c2c-mlx"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "c2c-mlx"
