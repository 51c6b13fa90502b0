from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from c2c_mlx import blas

PACKAGE = Path(blas.__file__).parent


class FakeOpenBLAS:
    def __init__(self, threads: int) -> None:
        self.threads = threads

    def openblas_get_num_threads(self) -> int:
        return self.threads

    def openblas_set_num_threads(self, threads: int) -> None:
        self.threads = threads


@pytest.fixture
def before_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    for name in blas._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def limit(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    path = folder / "cpu.max"
    path.write_text(text)
    monkeypatch.setattr(blas, "_CGROUP_LIMIT", path)


def test_importing_it_imports_no_mlx() -> None:
    code = "import sys, c2c_mlx.blas; print(any(m.split('.')[0] == 'mlx' for m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n" and run.stderr == ""


def test_every_module_that_imports_mlx_imports_blas_first() -> None:
    late = []
    for path in PACKAGE.rglob("*.py"):
        if "mlx" not in (names := _imported_roots(path)):
            continue
        if "c2c_mlx.blas" not in names or names.index("c2c_mlx.blas") > names.index("mlx"):
            late.append(str(path.relative_to(PACKAGE)))
    assert late == []


def _imported_roots(path: Path) -> list[str]:
    """Top-level imports in order; "mlx" stands for mlx and mlx_lm alike."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return ["mlx" if n.split(".")[0] in ("mlx", "mlx_lm") else n for n in names]


def test_nothing_happens_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(blas.ctypes, "CDLL", pytest.fail)
    assert blas.use_fast_blas() is None


@pytest.mark.usefixtures("before_mlx")
def test_without_openblas_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(blas.ctypes, "CDLL", missing)
    notice = blas.use_fast_blas()
    assert notice is not None and "libopenblas0-pthread" in notice and "\n" not in notice


@pytest.mark.usefixtures("before_mlx")
def test_second_library_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_fedora(name: str, mode: int) -> FakeOpenBLAS:
        if name == "libopenblas.so.0":
            raise OSError
        return FakeOpenBLAS(1)

    monkeypatch.setattr(blas.ctypes, "CDLL", only_fedora)
    assert blas.use_fast_blas() is None


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("250000 100000", 2), ("50000 100000", 1), ("", None)]
)
def test_cores_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, cores: int | None
) -> None:
    limit(monkeypatch, tmp_path, text)
    assert blas.container_cores() == cores


def test_cores_without_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(blas, "_CGROUP_LIMIT", tmp_path / "missing")
    assert blas.container_cores() is None


@pytest.mark.usefixtures("before_mlx")
@pytest.mark.parametrize(("text", "threads"), [("200000 100000", 2), ("max 100000", 64)])
def test_threads_stay_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, threads: int
) -> None:
    limit(monkeypatch, tmp_path, text)
    library = FakeOpenBLAS(64)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *a, **k: library)
    assert blas.use_fast_blas() is None
    assert library.threads == threads


@pytest.mark.usefixtures("before_mlx")
def test_the_users_thread_count_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit(monkeypatch, tmp_path, "200000 100000")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    library = FakeOpenBLAS(8)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *a, **k: library)
    blas.use_fast_blas()
    assert library.threads == 8
