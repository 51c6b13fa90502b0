"""Every hostile or broken folder is refused: one line, exit code 2, no code run, nothing left."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import pytest
from corpus import CHECKPOINTS, FUSERS, PT, SYSTEM, Damage, touch, zip64
from torch_files import Call, dumps, write_checkpoint

from c2c_mlx.commands import weights
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers.published import convert
from c2c_mlx.fusers.torch_file import TorchFile

CPU_SECONDS = 2.0
IN_A_PROCESS = ["os.system", "number-of-2-gb", "pipe-projector_0.pt", "endless-device", "zip-bomb"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a fuser that was made of it."""
    folder = tmp_path_factory.mktemp("sound")
    convert(write_checkpoint(folder / "checkpoint"), folder / "fuser")
    return folder


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """Ends what computes for more than two seconds, whatever else the machine does."""

    def give_up(*args: object) -> None:
        raise TimeoutError(f"more than {CPU_SECONDS} s of computing")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def damaged(sound: Path, tmp_path: Path, kind: str, damage: Damage) -> tuple[Path, Path]:
    """A damaged copy, and where the canary would appear."""
    folder = tmp_path / kind
    shutil.copytree(sound / kind, folder)
    (tmp_path / "outside").mkdir()
    canary = tmp_path / "outside" / "canary"
    damage(folder, canary)
    return folder, canary


def listing(folder: Path) -> list[tuple[str, int]]:
    paths = folder.rglob("*")
    return sorted((str(p.relative_to(folder)), p.lstat().st_size) for p in paths)


def expect_one_line(code: int, out: str, err: str) -> None:
    assert (code, out) == (2, ""), err
    assert err.startswith("c2c-weights: ")
    assert err.count("\n") == 1
    assert len(err) < 1000


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(
    name: str, sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, canary = damaged(sound, tmp_path, "checkpoint", CHECKPOINTS[name])
    before = listing(tmp_path)
    code = weights.main(["convert", str(folder), str(tmp_path / "new" / "fuser")])
    expect_one_line(code, *capfd.readouterr())
    assert not canary.exists()
    assert listing(tmp_path) == before
    assert weights.main(["verify", str(folder)]) == 2
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "directory-of-4-gb" in name])
def test_a_directory_that_is_too_large_is_not_read(name: str, sound: Path, tmp_path: Path) -> None:
    folder, _ = damaged(sound, tmp_path, "checkpoint", CHECKPOINTS[name])
    with pytest.raises(C2CError, match="table of contents is larger"):
        TorchFile(folder / PT)


def test_zip64_itself_is_no_harm(sound: Path, tmp_path: Path) -> None:
    plain = sound / "checkpoint" / PT
    data = plain.read_bytes()
    (size,) = struct.unpack_from("<I", data, data.rindex(b"PK\5\6") + 12)
    (tmp_path / "x.pt").write_bytes(zip64(data, size))
    assert TorchFile(tmp_path / "x.pt").tensors == TorchFile(plain).tensors


@pytest.mark.parametrize("name", FUSERS)
def test_fuser(name: str, sound: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, canary = damaged(sound, tmp_path, "fuser", FUSERS[name])
    before = listing(tmp_path)
    code = weights.main(["show", str(folder)])
    expect_one_line(code, *capfd.readouterr())
    assert not canary.exists()
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_in_a_process_with_little_memory(name: str, sound: Path, tmp_path: Path) -> None:
    folder, canary = damaged(sound, tmp_path, "checkpoint", CHECKPOINTS[name])
    done = subprocess.run(
        [sys.executable, "-m", "c2c_mlx.commands.weights", "convert", folder, tmp_path / "fuser"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30)),
    )
    expect_one_line(done.returncode, done.stdout, done.stderr)
    assert not canary.exists()
    assert not (tmp_path / "fuser").exists()


def test_the_sound_ones_are_accepted(sound: Path, tmp_path: Path) -> None:
    assert weights.main(["convert", str(sound / "checkpoint"), str(tmp_path / "fuser")]) == 0
    assert weights.main(["show", str(sound / "fuser")]) == 0


def test_the_canary_sings(tmp_path: Path) -> None:
    """What unpickles it creates the file: its absence means something."""
    pickle.loads(dumps(Call(SYSTEM, touch(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


def test_links_of_the_hubs_cache_are_followed(sound: Path, tmp_path: Path) -> None:
    """There a snapshot is made of links to blobs beside it."""
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123" / "fuser"
    shutil.copytree(sound / "checkpoint", snapshot)
    for number, path in enumerate(sorted(p for p in snapshot.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert weights.main(["convert", str(snapshot), str(tmp_path / "fuser")]) == 0
