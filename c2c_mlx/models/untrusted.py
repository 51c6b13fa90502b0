"""Reads files that anybody may have made: strict JSON, sound headers, no way out of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from c2c_mlx.errors import C2CError

Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype, as safetensors spells it, and shape

_MAX_JSON = 1 << 20  # bytes; a real description has a few thousand


def read_json(folder: Path, name: str) -> Any:
    """Parses a JSON file of an untrusted folder.

    Raises:
        C2CError: if it can't be read, is not JSON, or says anything twice.
    """
    path = find_file(folder, name)
    try:
        if path.stat().st_size > _MAX_JSON:
            raise C2CError(f"{path}: larger than any real one")
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise C2CError(f"{path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise C2CError(f"{path}: not valid JSON ({e})") from None


def parse_json(text: str | bytes) -> Any:
    """JSON as it is defined: no NaN, and no key twice, of which readers differ which one counts.

    Raises:
        ValueError: for anything else.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)


def read_header(path: Path) -> Header:
    """What a safetensors file says that it holds.

    `mx.load` believes offsets, and so maps what lies outside of the file; the safetensors package
    checks them, and is asked first.

    Raises:
        C2CError: if the file is damaged, or MLX might read another header than that package.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        with path.open("rb") as raw:
            parse_json(raw.read(int.from_bytes(raw.read(8), "little")))
        return found
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        why = " ".join(str(e).split())[:200]
        raise C2CError(f"{path} is no valid safetensors file ({why}); fetch it again") from None


def find_file(folder: Path, name: str) -> Path:
    """A regular file of an untrusted folder, links followed.

    Raises:
        C2CError: if it is missing or something else, such as a pipe, or a link leads out of the
            folder.
    """
    path = folder / name
    if not path.is_file():
        is_there = path.exists() or path.is_symlink()
        raise C2CError(f"{path}: " + ("not a file" if is_there else "missing"))
    home = folder.resolve()
    homes = [home]
    # In the hub's cache a folder below `snapshots` is made of links to `blobs` beside that.
    homes += [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not any(path.resolve().is_relative_to(h) for h in homes):
        raise C2CError(f"{path}: a link that leads out of the folder; copy the file there")
    return path


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found
