"""Fusers by name, or by their pair: shipped, trained here, or published on the hub, in this order.

A fuser from the hub is kept in our own format in `fusers/` of the cache folder. One in the
published PyTorch layout is converted when it is first asked for; its download is then dropped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from c2c_mlx.atomic import appearing
from c2c_mlx.errors import C2CError, NoFuserError
from c2c_mlx.fusers import trained
from c2c_mlx.models import hub, registry, remote
from c2c_mlx.models.paths import cache_home, downloads, installing, size
from c2c_mlx.progress import Progress, Report, silent


@dataclass(frozen=True)
class Remote:
    """A fuser on the hub: a repository, or one folder of it."""

    hub_id: str
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.hub_id}/{self.folder}".rstrip("/")


def find_folder(
    name: str, report: Report = silent, note: Callable[[str], None] = lambda text: None
) -> Path:
    """The folder of a fuser argument, after a download and a conversion if need be.

    Args:
        name: a folder, a name that `c2c-weights list` shows, or a hub id.
        report: called with bytes done of a download, then with projectors converted.
        note: told in a sentence what was downloaded, and where it is now.

    Raises:
        C2CError: if it is none of these, or the hub can't give it.
    """
    if (folder := Path(os.path.expanduser(name))).is_dir():
        if is_checkpoint(folder):
            raise C2CError(
                f"{folder} holds PyTorch weights: convert them, `c2c-weights convert {folder} DST`"
            )
        return folder
    if folder.is_file():
        raise C2CError(f"{folder} is a file: give the fuser's folder")
    entry = find_entry(name)
    if entry and entry.shipped:
        return entry.shipped
    if own := trained.find(name):
        return own
    on_hub = find_remote(name)
    if on_hub is None:
        known = ", ".join(e.name for e in registry.fusers())
        raise C2CError(f"no fuser '{name}': not a folder, not a known name ({known}), not a hub id")
    folder = cached_folder(name)
    if not folder.is_dir():
        with installing(folder, report) as is_missing:
            if is_missing:
                _install(on_hub, folder, report, note)
    return folder


def find_for_pair(
    receiver: str,
    sharer: str,
    given: str | None,
    report: Report = silent,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """The folder of the fuser that was asked for, or of the pair's own.

    That is the one that is shipped; or the latest that was trained here; or the published one.

    Args:
        receiver: the receiver's name.
        sharer: the sharer's name.
        given: what the user named; None: nothing.
        report: as in `find_folder`.
        note: as in `find_folder`.

    Raises:
        C2CError: if there is none, or it or one of the models can't be had.
    """
    shared = remote.name_of(sharer)
    name = given or registry.find_fuser(receiver, shared)
    entry = find_entry(name) if name else None
    own = trained.latest(receiver, shared)
    if own and not given and not (entry and entry.shipped):
        return own
    if name is None:
        from c2c_mlx.models.load import check_name

        for model in (sharer, receiver):  # a model that can't be had is the first thing to say
            check_name(model)
        raise NoFuserError(receiver, shared)
    return find_folder(name, report, note)


def defaults() -> set[str]:
    """The names of the fusers that pairs get where none is named."""
    known = registry.fusers()[::-1]  # of a pair's several the first counts
    of_pair = {f"{e.receiver}+{e.sharer}": e.name for e in known}
    of_pair |= {name.rpartition("/")[0]: name for name, _ in trained.every()}  # the latest is last
    of_pair |= {f"{e.receiver}+{e.sharer}": e.name for e in known if e.shipped}
    return set(of_pair.values())


def find_entry(name: str) -> registry.FuserEntry | None:
    """What the registry knows of a fuser's name; None if it is not in there."""
    return next((e for e in registry.fusers() if e.name == name), None)


def find_remote(name: str) -> Remote | None:
    """Where on the hub a fuser of this name is; None if that is no place there."""
    if entry := find_entry(name):
        return Remote(entry.hub, entry.folder) if entry.hub else None
    return Remote(name) if hub.is_hub_id(name) else None


def cached_folder(name: str) -> Path:
    """Where a fuser from the hub is kept, or will be."""
    return cache_home() / "fusers" / name.replace("/", "--")


def cached() -> Iterator[tuple[str, Path]]:
    """Name and folder of every fuser in the cache."""
    for folder in sorted((cache_home() / "fusers").glob("[!.]*")):
        if folder.is_dir():
            yield folder.name.replace("--", "/"), folder


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the published PyTorch layout."""
    return (folder / "final").is_dir()


def _install(remote: Remote, folder: Path, report: Report, note: Callable[[str], None]) -> None:
    from c2c_mlx.fusers import disk
    from c2c_mlx.fusers.published import convert

    patterns = sorted({*hub.FUSER_FILES, *hub.CHECKPOINT_FILES})
    prefix = f"{remote.folder}/" if remote.folder else ""
    download = downloads(folder.name)
    found = hub.fetch(remote.hub_id, [prefix + p for p in patterns], cache=download, report=report)
    source = found / remote.folder
    done = f"fetched {remote} ({size(download) / 1e9:.2f} GB)"
    try:
        with appearing(folder) as unfinished:
            if is_checkpoint(source):
                what = f"converting {remote}"
                steps = partial(_report_step, report, what)
                convert(source, unfinished, steps, str(remote))
                done += ", converted it"
            elif (source / disk.CONFIG).is_file():
                disk.copy(source, unfinished)
            else:
                raise C2CError(f"the hub has no fuser in {remote}: check the spelling")
    except C2CError as e:
        if not isinstance(e.__cause__, OSError):  # it is not for want of room
            shutil.rmtree(download)  # of no use: the next try fetches it anew
        raise
    shutil.rmtree(download)
    note(f"{done}, kept it in {folder}")


def _report_step(report: Report, what: str, done: int, total: int) -> None:
    report(Progress(what, done, total))
