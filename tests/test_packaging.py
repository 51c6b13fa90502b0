"""The wheel: what is in it, and that its commands start where nothing else of ours is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = str(tmp_path_factory.mktemp("wheel"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, str(ROOT))
    (built,) = Path(out).glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"c2c_mlx", "c2c_mlx-0.1.0.dist-info"}
    # Links in the checkout are files here: the package is complete without its surroundings.
    sources = [p.relative_to(ROOT) for p in (ROOT / "c2c_mlx").rglob("*.py")]
    assert {str(p) for p in sources} <= set(names)
    assert {"c2c_mlx/weights/registry.toml", "c2c_mlx/tui/__init__.py"} <= set(names)
    assert "c2c_mlx/doctor/projector.safetensors" in names
    recipes = ROOT / "c2c_mlx" / "training" / "recipes"
    texts = [p for p in recipes.rglob("*") if p.suffix in (".yaml", ".xz", ".md")]
    assert len(texts) > 10 and {str(p.relative_to(ROOT)) for p in texts} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
        *("--target", str(target), str(wheel)),
    )
    return target


@pytest.mark.parametrize(
    "command", ["c2c-chat", "c2c-eval", "c2c-serve", "c2c-train", "c2c-weights", "c2c-doctor"]
)
def test_an_installed_command_explains_itself(installed: Path, command: str) -> None:
    shown = run(str(installed / "bin" / command), "--help", PYTHONPATH=str(installed))
    assert shown.startswith(f"usage: {command}")


def test_the_registry_is_found_in_an_installed_package(installed: Path) -> None:
    code = "import c2c_mlx, c2c_mlx.models.registry as r; print(c2c_mlx.__file__, *r.aliases())"
    file, *aliases = run(sys.executable, "-c", code, PYTHONPATH=str(installed)).split()
    assert Path(file) == installed / "c2c_mlx" / "__init__.py"
    assert "smollm2-135m" in aliases


def test_an_intel_python_on_a_mac_is_refused(tmp_path: Path) -> None:
    """As under Rosetta, where pip would find no MLX, and leave half of a .venv."""
    programs = tmp_path / "bin"
    programs.mkdir()
    lie = "import platform, sys; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'"
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{lie}; exec(sys.argv[1])" "$2"\n')
        program.chmod(0o755)
    (tmp_path / "pyproject.toml").touch()
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "setup"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "native (arm64)" in done.stdout
    assert not (tmp_path / ".venv").exists()
