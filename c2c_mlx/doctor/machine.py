"""What this machine is, which models and fusers are on it, and what of them fits."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

import c2c_mlx
from c2c_mlx import blas, device
from c2c_mlx.doctor.check import name_of, rounds_products
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk, store
from c2c_mlx.models import hub, memory, registry
from c2c_mlx.models.embedded.install import model_folder
from c2c_mlx.models.load import find_here
from c2c_mlx.models.paths import cache_home, data_home, size

_PACKAGES = (
    *("c2c-mlx", "mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm"),
    *("numpy", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
)
_BITS_PER_WEIGHT = 4.5  # of 4-bit models: a scale and an offset for every 64 weights
_FOR_WEIGHTS = 0.75  # of the memory; the rest is for caches and what runs


def device_facts() -> dict[str, Any]:
    """The device, and what `c2c_mlx.device` decides on it.

    Raises:
        C2CError: if the environment asks for a device that nobody knows.
    """
    limit = device.memory_limit()
    bits = 32 if device.is_dense() else _BITS_PER_WEIGHT
    return {
        "name": device.describe(),
        "decisions": device.kind(),
        "mlx": {k: str(v) for k, v in mx.device_info(mx.default_device()).items()},
        "weights": "dense float32" if device.is_dense() else "as quantised as their files",
        "bfloat16_models": name_of(device.dtype_of(mx.bfloat16)),
        "float32_products": "rounded to 10 bits (TF32)" if rounds_products() else "exact",
        "blas": blas.notice or "",
        "memory_limit_gb": _gb(limit),
        "buffers_kept_gb": _gb(device.buffer_limit()),
        "prefill_chunk": device.prefill_chunk(),
        "fuser_pass_gb": _gb(device.fuser_pass(0)),
        "fits_billion_weights": round(limit * _FOR_WEIGHTS * 8 / bits / 1e9, 1),
    }


def versions() -> dict[str, str]:
    """The system's, Python's, and those of the packages that compute, read or fetch."""
    mac = platform.mac_ver()[0]
    system = f"macOS {mac}" if mac else platform.platform()
    found = {"system": f"{system}, {platform.machine()}", "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def folders() -> dict[str, str]:
    """Where this package keeps things, without the user's name."""
    return {"cache": _short(cache_home()), "data": _short(data_home())}


def models() -> list[dict[str, Any]]:
    """The registry's models that are here, whole or damaged."""
    found = []
    for alias in registry.aliases():
        entry = registry.find_model(alias)
        assert entry is not None
        damage = {}
        try:
            if not find_here(alias):
                continue
        except C2CError:  # its words hold a path, which is nobody else's business
            damage = {"fits": "damaged: delete it, and it is fetched again"}
        here = hub.cached_size(entry.hub) if entry.hub else size(model_folder(alias))
        found.append({"name": alias, "size_gb": _gb(here)} | damage)
    return found


def fusers() -> list[dict[str, Any]]:
    """The fusers that are here, and whether a conversation through each will fit."""
    shipped = [(e.name, e.shipped) for e in registry.fusers() if e.shipped]
    return [
        {"name": name, "size_gb": _gb(size(folder)), "fits": _fits(name, folder)}
        for name, folder in [*shipped, *store.cached()]
        if folder
    ]


def gpu_tests() -> list[str]:
    """The tests of a checkout that need a GPU, which `pytest -m metal` runs; none without one."""
    file = Path(c2c_mlx.__file__).parents[1] / "tests" / "metal" / "test_gpu.py"
    try:
        return re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return []


def _fits(name: str, folder: Path) -> str:
    """The preflight's words for the pair of a fuser; nothing if a model of it is not here."""
    entry = store.find_entry(name)
    if entry is None:
        return ""
    try:
        receiver, sharer = map(find_here, (entry.receiver, entry.sharer))
        if receiver is None or sharer is None:
            return ""
        return str(memory.preflight(receiver, [sharer], [disk.measure(folder)]))
    except C2CError as e:
        return str(e)


def _short(folder: Path) -> str:
    """For a report that others will read."""
    try:
        return str(Path("~") / folder.relative_to(Path.home()))
    except ValueError:
        return str(folder)


def _gb(size: int) -> float:
    return round(size / 1e9, 3)
