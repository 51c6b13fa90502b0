"""Files that are replaced as a whole or not at all, and read with distrust."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError


def write(path: Path, text: str) -> None:
    """Writes a file; whoever reads it meanwhile, or after a crash, sees the old one or the new one.

    Raises:
        C2CError: if the disk won't have it; the old file is then still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as e:
        with suppress(OSError):
            partial.unlink()
        raise C2CError(f"{path} cannot be written ({e.strerror or e}): make room there") from None


def read_json(path: Path) -> Any:
    """Parses a JSON file.

    Raises:
        C2CError: if it can't be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise C2CError(f"{path} cannot be read ({e.strerror or e})") from None
    except (ValueError, RecursionError) as e:
        raise C2CError(f"{path} is damaged ({e})") from None
