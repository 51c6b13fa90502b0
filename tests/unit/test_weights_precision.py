"""c2c-weights with fusers of every precision, as on this device and as on a Mac's GPU."""

from __future__ import annotations

from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from torch_files import write_checkpoint

from c2c_mlx import Fuser, device
from c2c_mlx.commands import weights
from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.fusers import disk
from c2c_mlx.fusion.fuser import FLOAT32, parameters

SHAPES = ModelShape("org/receiver", 2, 1, 64), ModelShape("org/sharer", 3, 1, 64)
FLOATS = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
BITS = {"8-bit": 8, "4-bit": 4}


@pytest.fixture(params=["", "gpu", "m1"])
def rehearsed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(device.REHEARSE, request.param)
    return str(request.param)


@pytest.fixture(params=[*FLOATS, *BITS])
def stored(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(stored: str, tmp_path: Path) -> Path:
    """Two slices of four open; published fusers hold their gates in the weights' precision, too."""
    mx.random.seed(1)
    fuser = Fuser(FuserConfig(*SHAPES, ((0, 1), (1, 2)), 64, 64, message_gate=True, normalise=True))
    fuser.gate_logit = mx.array([[1.0, -1.0], [-1.0, 1.0]])
    if stored in BITS:
        fuser.quantise(BITS[stored])
    fuser.set_dtype(FLOATS.get(stored, mx.bfloat16))
    disk.save(fuser, tmp_path / "fuser")
    return tmp_path / "fuser"


def test_a_load_keeps_what_the_device_can_use(folder: Path, stored: str, rehearsed: str) -> None:
    fuser = disk.load(folder)
    held = {w.dtype for name, w in parameters(fuser).items() if name not in FLOAT32}
    assert {parameters(fuser)[name].dtype for name in FLOAT32} == {mx.float32}
    if not rehearsed and device.is_dense():
        assert (held, fuser.config.bits) == ({mx.float32}, 0)
        return
    floats = device.dtype_of(FLOATS.get(stored, mx.bfloat16))
    assert held == {floats} | ({mx.uint32} if stored in BITS else set())
    assert fuser.config.bits == BITS.get(stored, 0)
    if rehearsed == "m1":
        assert mx.bfloat16 not in held


def test_show_and_verify(folder: Path, rehearsed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["show", str(folder)]) == 0
    assert "2 of 4 open" in capsys.readouterr().out
    assert weights.main(["verify", str(folder)]) == 0


def test_push(folder: Path, rehearsed: str) -> None:
    command = ["push", str(folder), "me/mine", "--licence", "mit", "--dry-run"]
    assert weights.main(command) == 0


@pytest.mark.parametrize("bits", ["8", "4"])
def test_quantize(
    folder: Path,
    stored: str,
    rehearsed: str,
    bits: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = weights.main(["quantize", str(folder), str(tmp_path / "new"), "--bits", bits])
    out, err = capsys.readouterr()
    if stored in BITS:
        assert code == 2 and "is quantised already" in err
        return
    assert code == 0, err
    error = float(out.rsplit(" ", 1)[1].rstrip("%\n"))
    assert 0.01 < error < (5 if bits == "8" else 30)
    assert weights.main(["show", str(tmp_path / "new")]) == 0
    assert f"{bits} bits" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bfloat16"])
def test_convert(
    dtype: str, rehearsed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=dtype)
    assert weights.main(["convert", str(source), str(tmp_path / "fuser")]) == 0
    assert weights.main(["show", str(tmp_path / "fuser")]) == 0
    assert "4 of 4 open" in capsys.readouterr().out
