"""The app's own small files, read with distrust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from c2c_mlx.errors import C2CError


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
