"""The rooms of the house and the one staircase between them: no import runs back up."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import c2c_mlx

ROOT = Path(c2c_mlx.__file__).parent

# From the top down; a room uses only itself and what stands above it. `docs/architecture.md` shows
# this list as its picture.
STAIRCASE = (
    "errors progress events config atomic bootstrap",
    "blas device",
    "text",
    "fusion",
    "models",
    "fusers",
    "training",
    "talk",
    "evaluation",
    "studies",
    "doctor",
    "serving",
    "commands",
    "tui",
)
# (importing file, imported module) -> why it may run back up.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("commands/chat.py", "c2c_mlx.tui.run"): "c2c-chat opens the app where there is a terminal",
}
FLOOR = {name: floor for floor, names in enumerate(STAIRCASE) for name in names.split()}


def imports() -> list[tuple[Path, str]]:
    """Every file and each module of ours that it imports, inside of functions as well."""
    found = []
    files = {*ROOT.rglob("*.py"), *(ROOT / "tui").rglob("*.py")}  # tui is a link
    for path in sorted(files):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
                if (ROOT.parent / node.module.replace(".", "/")).is_dir():  # a room's files
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [
                (path.relative_to(ROOT), name) for name in names if name.startswith("c2c_mlx")
            ]
    return found


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def test_no_import_runs_back_up() -> None:
    used = set()
    for path, name in imports():
        if path.name == "__init__.py" and len(path.parts) == 1:
            continue  # the package's face: it offers names of all rooms
        above = name.split(".")[1] if "." in name else "config"
        if above not in FLOOR:  # the face's own names, which only outsiders use
            raise AssertionError(f"{path} imports {name}: say from which room")
        if (key := (str(path), name)) in EXCEPTIONS:
            used.add(key)
            continue
        assert FLOOR[above] <= FLOOR[room(path)], f"{path} imports {name}, which stands below it"
    assert used == set(EXCEPTIONS), "an exception that nobody needs any more"


def test_no_import_goes_round_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path, name in imports():
        if path != Path("__init__.py"):
            module = ".".join(("c2c_mlx", *path.with_suffix("").parts)).removesuffix(".__init__")
            graph.setdefault(module, set()).add(name)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_picture_shows_the_list() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    picture = re.search(r"```\n(errors .*?)```", text, re.DOTALL)
    assert picture, "docs/architecture.md has no picture of the rooms"
    rows = [re.split(r"\s{2,}", line)[0] for line in picture[1].splitlines()]
    assert rows == list(STAIRCASE)
