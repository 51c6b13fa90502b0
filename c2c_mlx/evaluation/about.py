"""What must be known of a run: digests, to continue it alone where it broke off, and versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from c2c_mlx.evaluation.task import Item

_PACKAGES = ("c2c-mlx", "mlx", "mlx-lm", "numpy", "sacrebleu", "datasets")


def digest_of_items(items: Sequence[Item]) -> str:
    """Sha256 of everything that is asked and of the right answers."""
    return hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Sha256: a fuser that was trained on in the same folder is another one."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Of Python, the system, and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
