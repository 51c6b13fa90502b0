"""Files that are whole or not there, and lines that a torn one before them does not spoil."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from c2c_mlx import atomic
from c2c_mlx.errors import C2CError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.overwriting(path) as partial:
        partial.write_text("half")
        assert partial.suffix == path.suffix  # MLX adds one to a name that has another
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with atomic.overwriting(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.safetensors", "new")]


def test_a_disk_that_will_not_have_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(C2CError, match="No space left on device"):
        atomic.write_text(tmp_path / "a", "text")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_full_disk_is_not_to_be_made_room_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path, tmp_path / "file" / "x"):
        with pytest.raises(C2CError, match="name another place"):
            atomic.write_text(wrong, "x")


def test_a_folder_that_appears_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        assert not (tmp_path / "new").exists()
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are told by /proc")
    monkeypatch.setattr(os, "fsync", note)
    with atomic.appearing(tmp_path / "new") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
    names = {Path(path).name for path in flushed}
    assert {"inner", "file"} < names and (tmp_path / "new" / "inner" / "file").exists()


def test_lines_are_added_behind_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lines"
    atomic.append(path, "one\n")
    atomic.append(path, "two\n")
    assert path.read_text() == "one\ntwo\n"
    path.write_text("one\ntw")
    atomic.append(path, "three\nfour\n")
    assert path.read_text() == "one\ntw\nthree\nfour\n"
