"""A fuser and its folder: config.json, fuser.safetensors, README.md.

It is replaced as a whole or not at all, see `atomic.replacing`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Literal, NoReturn

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx.utils import tree_unflatten

from c2c_mlx import atomic, device
from c2c_mlx.config import FORMAT_VERSION, FuserConfig, Provenance, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import card
from c2c_mlx.fusion.fuser import FLOAT32, Fuser, parameters, skeleton
from c2c_mlx.models import untrusted

CONFIG, WEIGHTS, CARD = "config.json", "fuser.safetensors", "README.md"

_FLOATS = ("F32", "F16", "BF16")  # as safetensors spells them


def save(fuser: Fuser, folder: str | Path, dtype: mx.Dtype | None = None) -> None:
    """Writes a fuser folder; what the folder held before stays intact until all is written.

    Args:
        fuser: the fuser, with its provenance.
        folder: made if it does not exist; other files in it are left alone.
        dtype: of the weights in the file, but gate logits and statistics, which stay float32 (a
            channel that hardly moves has a scale that float16 cannot hold); None: as they are.

    Raises:
        C2CError: if a weight is NaN or infinite, or the folder can't be written.
    """
    weights = parameters(fuser)
    if dtype is not None:
        halved = {n: w for n, w in weights.items() if n not in FLOAT32}
        weights |= {name: _as(dtype, w) for name, w in halved.items()}
    if bad := _not_finite(weights):
        raise C2CError(f"{folder}: not saved, '{bad}' holds NaN or infinite numbers")
    with atomic.replacing(folder) as staging:
        _write_weights(staging / WEIGHTS, weights)
        write_description(staging, fuser.config, fuser.provenance)


def load(folder: str | Path, bits: Literal[0, 4, 8] = 0) -> Fuser:
    """Reads a fuser folder in inference mode, in the precision that `device` decides.

    Args:
        folder: the fuser's.
        bits: to which its weights are rounded, on the CPU as well; 0: they stay as they are.

    Raises:
        C2CError: if anything is missing, damaged, superfluous, misshapen, not a float, not finite,
            or made by a newer version; or if it is to be quantised for a second time.
    """
    folder = Path(folder)
    config, provenance = read_description(folder)
    path = locate(folder, WEIGHTS)
    found = untrusted.read_header(path)
    fuser = skeleton(config, len(found), str(folder))
    _compare(folder, found, parameters(fuser))
    weights: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    for name, w in weights.items():
        mx.eval(w)  # a GPU would wait for the disk, and macOS ends what waits for long
        weights[name] = _as(mx.float32 if name in FLOAT32 else device.dtype_of(w.dtype), w)
    if bad := _not_finite(weights):
        raise C2CError(f"{folder}: '{bad}' in {WEIGHTS} holds NaN or infinite numbers")
    fuser.update(tree_unflatten(list(weights.items())))
    if bits and bits != config.bits:
        if config.bits:
            raise C2CError(f"{folder}: has {config.bits} bits already; start from the original")
        fuser.quantise(bits)
    if device.is_dense():
        fuser.dequantise()
    mx.eval(fuser.parameters())  # a lazy array would break when its file is replaced
    weights.clear()
    mx.clear_cache()  # what was converted or packed came in sizes that nothing else has
    fuser.provenance = provenance
    fuser.eval()
    return fuser


def copy(source: Path, target: Path) -> None:
    """Copies a fuser's own files into an empty folder, once they have been looked through.

    Raises:
        C2CError: as `load` does.
    """
    load(source)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(locate(source, name), target / name)
    (target / CARD).write_text(card.render(*read_description(source)), encoding="utf-8")


def read_description(folder: str | Path) -> tuple[FuserConfig, Provenance]:
    """Reads a fuser folder's config.json alone.

    Raises:
        C2CError: if it is not there, not valid, or made by a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise C2CError(f"{folder}: no such fuser folder")
    data = untrusted.read_json(locate(folder, CONFIG).parent, CONFIG)
    where = str(folder / CONFIG)
    if not isinstance(data, dict):
        raise C2CError(f"{where}: expected an object with fields, not {type(data).__name__}")
    version = data.pop("format_version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise C2CError(f"{where}: 'format_version' must be a whole number from 1 on")
    if version > FORMAT_VERSION:
        raise C2CError(f"{where}: made by a newer c2c-mlx (format {version}); upgrade c2c-mlx")
    provenance = from_dict(Provenance, data.pop("provenance", {}), f"{where}: 'provenance'")
    return from_dict(FuserConfig, data, where), provenance


def measure(folder: Path) -> FuserConfig:
    """All that an estimate of memory has to know of a fuser, whose weights are there but not read.

    Raises:
        C2CError: as `read_description` does, and if the weights are missing or damaged.
    """
    untrusted.read_header(locate(folder, WEIGHTS))
    return read_description(folder)[0]


def write_description(folder: Path, config: FuserConfig, provenance: Provenance) -> None:
    """Writes config.json and the model card into `folder`."""
    metrics = {name: m for name, m in provenance.metrics.items() if math.isfinite(m)}
    provenance = dataclasses.replace(provenance, metrics=metrics)
    data = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(config),
        "provenance": dataclasses.asdict(provenance),
    }
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card.render(config, provenance), encoding="utf-8")


def _write_weights(path: Path, weights: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), weights)
        # MLX may say nothing of a write that failed; a file that is too short does not open.
        untrusted.read_header(path)
    except (RuntimeError, C2CError) as e:
        raise OSError(f"{path.name}: {e}") from None


def locate(folder: Path, name: str) -> Path:
    """Where a fuser folder holds one of its files.

    Raises:
        C2CError: if it does not.
    """
    path = atomic.current(folder, name)
    if not path.exists() and not path.is_symlink():
        raise C2CError(f"{folder}: {name} is missing; is this a fuser folder?")
    return untrusted.find_file(path.parent, name)


def _compare(folder: Path, found: untrusted.Header, wanted: dict[str, mx.array]) -> None:
    def refuse(what: str) -> NoReturn:
        raise C2CError(f"{folder}: {what} in {WEIGHTS}")

    if missing := sorted(wanted.keys() - found.keys()):
        refuse(f"tensor '{missing[0]}' is missing")
    if extra := sorted(found.keys() - wanted.keys()):
        refuse(f"unexpected tensor '{extra[0]}'")
    for name, (dtype, shape) in found.items():
        if shape != wanted[name].shape:
            refuse(f"'{name}' should have shape {wanted[name].shape}, not {shape},")
        if wanted[name].dtype == mx.uint32 and dtype != "U32":
            refuse(f"'{name}' should hold packed numbers, not {dtype},")
        if wanted[name].dtype != mx.uint32 and dtype not in _FLOATS:
            refuse(f"'{name}' should hold floats, not {dtype},")


def _as(dtype: mx.Dtype, weight: mx.array) -> mx.array:
    """In this dtype, unless these are packed numbers."""
    return weight if weight.dtype == mx.uint32 else weight.astype(dtype)


def _not_finite(weights: dict[str, mx.array]) -> str | None:
    """The first tensor that is not finite throughout."""
    for name, w in weights.items():
        if not mx.isfinite(w).all().item():
            return name
    return None
