"""Recipes: training runs described in YAML, ours in the package and anybody's. No MLX here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from c2c_mlx.atomic import write_text
from c2c_mlx.errors import C2CError
from c2c_mlx.models import hub, paths, registry
from c2c_mlx.training.run import ARGUMENTS, BESIDE, named

FOLDER = Path(__file__).parent / "recipes"
FILE = "run.yaml"  # in a run's folder: what it was told, to be resumed by and to be copied
_WHY = "why"  # for people
_ONLINE, _OFFLINE = "chat", "reading"  # what is trained on where nobody says
ASKING = "asking the hub"  # a thread's name
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_PATIENCE = 5.0  # seconds that the hub has to answer


def _placed(data: list[str]) -> list[str]:
    names = [named(text)[0] for text in data]
    return [paths.placed(n) + text.removeprefix(n) for n, text in zip(names, data, strict=True)]


_PLACED: dict[str, Callable[[Any], Any]] = {  # what may be a folder
    "sharer": registry.placed,
    "receiver": registry.placed,
    "fuser": paths.placed,
    "prefill_cache": paths.placed,
    "data": _placed,
}


def names() -> list[str]:
    """The recipes of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    """What a recipe says: the arguments of a run by their names, data as a list.

    Args:
        name: of one of the package's, or a file.

    Raises:
        C2CError: if there is no such recipe, or it can't be read.
    """
    path = FOLDER / f"{name}.yaml" if name in names() else Path(name)
    values = _document(path)
    known = (*ARGUMENTS, *BESIDE, _WHY)
    if unknown := [key for key in values if key not in known]:
        listed = ", ".join(sorted(known))
        raise C2CError(f"{path}: unknown key '{unknown[0]}' (known: {listed})")
    values.pop(_WHY, None)
    if isinstance(data := values.get("data"), dict):
        values["data"] = [k if weight is None else f"{k}={weight}" for k, weight in data.items()]
    elif isinstance(data, str):
        values["data"] = [data]
    return values


def write(path: Path, values: dict[str, Any]) -> None:
    """Writes down what a run was told, as `read` reads it, to be resumed from any folder.

    Raises:
        C2CError: if the disk won't have it.
    """
    import yaml  # type: ignore[import-untyped]

    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    for key, placed in _PLACED.items():
        if key in plain:
            plain[key] = placed(plain[key])
    write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def default() -> tuple[str, str]:
    """The recipe where no data is named, and a line that says which and why."""
    if reason := _out_of_reach(_document(FOLDER / f"{_ONLINE}.yaml")):
        return _OFFLINE, f"no --data: the recipe {_OFFLINE}, whose text is here, for {reason}"
    return _ONLINE, f"no --data: the recipe {_ONLINE}; --recipe list shows what else there is"


def table() -> str:
    """The package's recipes, their data and why, for people."""
    blocks = []
    for name in names():
        values = _document(FOLDER / f"{name}.yaml")
        why, data = " ".join(values[_WHY].split()), ", ".join(values["data"])
        blocks.append(f"{name}\n  {why}\n  data: {data}\n  licence: {values.get('licence', '-')}")
    return "\n\n".join([*blocks, f"The files, to copy and change: {FOLDER}"])


def _document(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML 1.2's numbers: to PyYAML, which has those of 1.1, 5e-4 is a text."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as e:
        raise C2CError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from None
    except yaml.YAMLError as e:
        raise C2CError(f"{path}: not YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise C2CError(f"{path}: expected keys with values, such as iters: 1000")
    return values


def _out_of_reach(recipe: dict[str, Any]) -> str:
    """Why a recipe's data sets can't be had from the hub now; empty if they can."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        return "the hub needs pip install 'c2c-mlx[datasets]'"
    if hub.is_offline():
        return "HF_HUB_OFFLINE is set"
    reason = [f"the hub does not answer within {_PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            for source in recipe["data"]:
                hub.check_data_set(source.partition("@")[0])
            reason[0] = ""
        except C2CError as e:
            reason[0] = str(e).partition(";")[0]

    # In a thread, for a name's look-up can't be told to give up.
    asking = Thread(target=ask, name=ASKING, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return reason[0]
