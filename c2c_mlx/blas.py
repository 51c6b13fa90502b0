"""A fast BLAS under MLX on Linux. It acts once, on import, and does nothing on macOS.

The `mlx-cpu` wheel bundles the reference BLAS, about 2 GFLOP/s in float32; OpenBLAS gives 140. MLX
finds its BLAS symbols in whatever library is global already, so it is enough to load OpenBLAS
before the first `import mlx.core`. So every module of this package that imports MLX begins with

    import c2c_mlx.blas  # noqa: F401

which an isort section of its own (pyproject.toml) keeps in front of the third-party imports.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0")  # Debian and most; Fedora
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_MISSING = (
    "OpenBLAS not found: on this CPU, prompts are read up to 50 times slower without it; "
    "install it with `sudo apt install libopenblas0-pthread` (Fedora: openblas-threads)"
)


def use_fast_blas() -> str | None:
    """Loads OpenBLAS for MLX to find. Needed only once, and before `mlx.core` is imported.

    Returns:
        One line for the user where there is none (what to install, what it costs), else None.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return None
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _limit_threads(library)
        return None
    return _MISSING


def _limit_threads(library: ctypes.CDLL) -> None:
    # OpenBLAS counts the cores it may run on, but not a container's share of their time: 64 threads
    # on a quota of 2 cores wait for each other.
    if any(name in os.environ for name in _THREAD_VARIABLES):
        return
    cores = container_cores()
    if cores is not None and cores < library.openblas_get_num_threads():
        library.openblas_set_num_threads(cores)


def container_cores() -> int | None:
    """Whole cores that the control group grants, at least 1; None without a limit."""
    try:
        quota, period = _CGROUP_LIMIT.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return None


notice = use_fast_blas()  # for commands to print on stderr, if MLX computes on the CPU
