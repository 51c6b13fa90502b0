"""What may import what; each claim in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import c2c_mlx

ROOT = Path(c2c_mlx.__file__).parent


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module",
    ["", ".config", ".events", ".atomic", ".text.rendering", ".text.answer", ".fusion.layers"],
)
def test_no_mlx_before_it_is_needed(module):
    assert not {"mlx", "mlx_lm", "textual"} & loaded_by(f"import c2c_mlx{module}")


@pytest.mark.parametrize(
    "command", ["chat", "evaluate", "serve", "train", "weights", "study", "doctor"]
)
def test_help_loads_neither_mlx_nor_textual(command):
    code = (
        f"from c2c_mlx.commands.{command} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0"
    )
    assert not {"mlx", "mlx_lm", "textual", "transformers"} & loaded_by(code)


def test_only_the_app_imports_textual():
    for path in ROOT.rglob("*.py"):
        if "tui" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "textual" for name in names), path
