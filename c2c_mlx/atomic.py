"""Files and folders that are whole or not there at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from c2c_mlx.errors import C2CError

STAGING, STAGED = ".saving", ".saved"
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: Path, text: str) -> None:
    """Writes a file; whoever reads it meanwhile, or after a crash, sees the old one or the new one.

    Raises:
        C2CError: if the disk won't have it; the old file is then still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with overwriting(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as e:
        advice = "make room there" if e.errno in FULL else "name another place"
        raise C2CError(f"{path} cannot be written ({e.strerror or e}): {advice}") from None


@contextmanager
def overwriting(path: Path) -> Iterator[Path]:
    """A file to fill that takes the place of `path` when all went well, and is gone otherwise.

    Raises:
        OSError: if the disk won't have it; callers know what to advise.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def append(path: Path, lines: str) -> None:
    """Adds whole lines to a file, on a line of their own even behind one that was torn.

    Raises:
        OSError: if the disk won't have them; callers know what to advise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else "\n" + lines
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when all went well, and is gone otherwise.

    Raises:
        OSError: if the disk won't have it; callers know what to advise.
    """
    prefix = f".{folder.name}.tmp-"
    for left_by_a_crash in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's 0o700 would keep a shared cache from other users
        for path in [*unfinished.rglob("*"), unfinished]:
            _flush(path)  # or a loss of power leaves the name with empty files behind it
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Makes sure that there is nothing in a folder but what a save left that was killed.

    Raises:
        C2CError: if there is.
    """
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {STAGING}:
        return
    if folder.exists():
        raise C2CError(f"{folder}: already exists; choose another folder or remove it first")


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yields an empty staging folder whose files replace those of `folder` when the block ends.

    The new files are written to `.saving`, which is renamed to `.saved` once it is complete and on
    the disk; from that instant on the new files are the ones that count, and only have to be moved
    up. Whoever reads looks into `.saved` first (`current`), so whenever this is interrupted it
    finds the old files or the new ones, never a mixture.

    Raises:
        C2CError: for an error of the file system; nothing that was begun is left behind, and
            `folder` holds what it held.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _move_up(folder)  # an earlier save that was interrupted after it was complete
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for path in [*staging.iterdir(), staging]:
            _flush(path)
        os.rename(staging, folder / STAGED)
        _move_up(folder)
    except BaseException as e:
        if not (folder / STAGED).exists():
            shutil.rmtree(folder if is_new else folder / STAGING, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # somebody else has put something there since
                    parent.rmdir()
        if isinstance(e, OSError):
            raise C2CError(f"{folder}: can't be written ({e.strerror or e})") from e
        raise


def current(folder: Path, name: str) -> Path:
    """Where a file of a folder that is being replaced stands; it may not exist."""
    staged = folder / STAGED / name
    return staged if staged.exists() else folder / name


def _move_up(folder: Path) -> None:
    staged = folder / STAGED
    if not staged.exists():
        return
    for path in staged.iterdir():
        os.replace(path, folder / path.name)
    _flush(folder)
    staged.rmdir()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
