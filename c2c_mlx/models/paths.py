"""Where the package keeps what it fetches, how that gets there whole, and what the user made."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from c2c_mlx.errors import C2CError
from c2c_mlx.progress import Progress, Report


def cache_home() -> Path:
    """The package's cache folder, which may not exist yet.

    `C2C_MLX_HOME` decides; without it, the platform's own place for caches.
    """
    if override := os.environ.get("C2C_MLX_HOME"):
        return Path(os.path.expanduser(override))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "c2c-mlx"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "c2c-mlx"


def data_home() -> Path:
    """The folder of what can't be fetched again: sessions, votes. It may not exist yet.

    `C2C_MLX_HOME` decides; without it, the platform's own place for data.
    """
    if override := os.environ.get("C2C_MLX_HOME"):
        return Path(os.path.expanduser(override))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "c2c-mlx"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "c2c-mlx"


def downloads(name: str) -> Path:
    """Where the parts of `name` wait until all are there; dropped once it is in place."""
    return cache_home() / "downloads" / name


def placed(name: str) -> str:
    """A folder's whole path, by which it is found from anywhere; any other name as it is."""
    folder = os.path.abspath(os.path.expanduser(name))
    return folder if name and os.path.isdir(folder) else name


def size(folder: Path) -> int:
    """Bytes of all files in a folder; what a link leads to counts once it is in there, too."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


@contextmanager
def installing(folder: Path, report: Report) -> Iterator[bool]:
    """The right to make a folder of the cache; one process works, the others wait for it.

    Args:
        folder: the folder that is to appear.
        report: told when another process is at work.

    Yields:
        Whether the folder is still missing.

    Raises:
        C2CError: if the cache folder can't be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(Progress(f"waiting for another process that makes {folder.name}", 0, 0))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield not folder.is_dir()  # closing the file, or the process's death, unlocks it
    except OSError as e:
        raise C2CError(
            f"cannot write to the cache folder {cache_home()} ({e.strerror or e}): make room "
            "there, or set C2C_MLX_HOME to another folder"
        ) from e


def discard(folder: Path) -> int:
    """Deletes a folder of the cache and what was downloaded for it; returns the bytes freed.

    Raises:
        C2CError: if it can't be deleted.
    """
    freed = 0
    try:
        for path in (folder, downloads(folder.name)):
            if path.is_dir():
                freed += size(path)
                doomed = path.with_name(f".{path.name}.tmp-removed")
                os.rename(path, doomed)  # from here on nobody sees half of it
                shutil.rmtree(doomed)
        folder.with_name(f".{folder.name}.lock").unlink(missing_ok=True)
    except OSError as e:
        raise C2CError(f"{folder}: cannot be deleted ({e.strerror or e})") from None
    return freed
