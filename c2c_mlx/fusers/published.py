"""Published PyTorch checkpoints -> our fuser folder, one projector at a time.

The layout of the source is that of github.com/thu-nics/C2C. Everything but NaN is looked for before
the first byte is written. Raw bytes are copied, so that memory stays at one tensor's size and
weights keep their dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx import atomic
from c2c_mlx.config import FuserConfig, Provenance, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk
from c2c_mlx.fusers.torch_file import ITEM_SIZE, TorchFile
from c2c_mlx.fusion.fuser import parameters, skeleton
from c2c_mlx.models import untrusted

Layout = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by our names

MAX_LAYERS = 1000
_KINDS = ("key", "value")
_DEFAULTS: dict[str, Any] = {
    "source_num_heads": 1,
    "target_num_heads": 1,
    "hidden_dim": 1024,
    "intermediate_dim": 1024,
    "num_layers": 3,
    "dropout": 0.1,
}


@dataclass(frozen=True)
class _Source:
    """A checkpoint whose description, shapes and dtypes have been looked through."""

    config: FuserConfig
    numbers: list[int]  # the projector of each pair of the layer map
    files: dict[int, TorchFile]
    layout: Layout


def convert(
    src: str | Path,
    dst: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    origin: str = "",
) -> FuserConfig:
    """Converts a checkpoint folder; needs no model and no network, and runs nothing that it reads.

    What a checkpoint can't know, the tokenizers' fingerprints, stays empty. The number of layers is
    one more than the highest that it names, which is exact for both of the reference's layer maps.

    Args:
        src: the checkpoint folder, with `config.json` and `final/`.
        dst: the fuser folder to make; must not exist, or be empty.
        progress: called with projectors done and to do.
        origin: where the checkpoint comes from, for the provenance; the folder's name if empty.

    Returns:
        The new fuser's configuration.

    Raises:
        C2CError: if anything in the source is missing, misshapen, superfluous or not finite, or the
            destination can't be written; nothing is left there.
    """
    src, dst = Path(src), Path(dst)
    atomic.check_free(dst)
    source = _open(src)
    with atomic.replacing(dst) as staging:
        _write_weights(staging / disk.WEIGHTS, source, progress)
        provenance = Provenance(source=f"converted from {origin or src.resolve().name}")
        disk.write_description(staging, source.config, provenance)
    return source.config


def check(
    src: str | Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> FuserConfig:
    """Does all of a conversion but the writing.

    Raises:
        C2CError: as `convert` does.
    """
    source = _open(Path(src))
    for _ in _slices(source, progress):
        pass
    return source.config


def _open(src: Path) -> _Source:
    if not src.is_dir():
        raise C2CError(f"{src}: no such checkpoint folder")
    layer_map, numbers = _read_map(src)
    _refuse_strays(src, set(numbers))
    config = _read_config(src, layer_map, numbers)
    files = {
        i: TorchFile(untrusted.find_file(src, f"final/projector_{i}.pt"))
        for i in sorted(set(numbers))
    }
    return _Source(config, numbers, files, _check(config, files))


def _refuse_strays(src: Path, numbers: set[int]) -> None:
    """A projector that no layer uses means that the description and the files are no pair."""
    known = {f"projector_{i}.{kind}" for i in numbers for kind in ("pt", "json")}
    for path in sorted((src / "final").glob("projector_*")):
        if path.name not in known | {"projector_config.json"}:
            raise C2CError(f"{path}: belongs to no layer of projector_config.json")


def _read_map(src: Path) -> tuple[tuple[tuple[int, int], ...], list[int]]:
    """The layer map, and the projector's number for each of its pairs."""
    path = src / "final" / "projector_config.json"
    data = untrusted.read_json(src, "final/projector_config.json")
    try:
        (sharers,) = data.values()
        (layers,) = sharers.values()
        # Of several sharer layers for one receiver layer, the reference uses the first.
        entries = sorted((int(layer), *pairs[0]) for layer, pairs in layers.items())
        if {type(n) for entry in entries for n in entry} - {int} or {*map(len, entries)} - {3}:
            raise TypeError
    except (AttributeError, TypeError, ValueError, LookupError):
        raise C2CError(
            f'{path}: expected {{"0": {{"1": {{receiver layer: [[sharer layer, number]]}}}}}}'
        ) from None
    if not entries:
        raise C2CError(f"{path}: names no layer")
    if any(not 0 <= n < MAX_LAYERS for entry in entries for n in entry):
        raise C2CError(f"{path}: layers and numbers must be from 0 to {MAX_LAYERS - 1}")
    return tuple((receiver, sharer) for receiver, sharer, _ in entries), [e[2] for e in entries]


def _read_config(
    src: Path, layer_map: tuple[tuple[int, int], ...], numbers: list[int]
) -> FuserConfig:
    where = src / "config.json"
    document = untrusted.read_json(src, "config.json")
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict):
        raise C2CError(f"{where}: has no 'model'")
    args = _read_arguments(src, numbers)
    aligned = bool(model.get("is_do_alignment", False))
    fields = {
        "receiver": _shape(model.get("base_model"), "receiver", args, "target"),
        "sharer": _shape(model.get("teacher_model"), "sharer", args, "source"),
        "layer_map": layer_map,
        "hidden_dim": args["hidden_dim"],
        "intermediate_dim": args["intermediate_dim"],
        "depth": args["num_layers"],
        "dropout": args["dropout"],
        "alignment": model.get("alignment_strategy", "first") if aligned else "same",
        "positions": "messages" if aligned else "all",
        "fuse_response": model.get("include_response", False),
    }
    for side, at in (("receiver", 0), ("sharer", 1)):
        fields[side]["layers"] = max(pair[at] for pair in layer_map) + 1
    return from_dict(FuserConfig, fields, str(src))


def _read_arguments(src: Path, numbers: list[int]) -> dict[str, Any]:
    """The constructor arguments that all projectors must share."""
    shared: dict[str, Any] = {}
    for number in numbers:
        path = src / "final" / f"projector_{number}.json"
        data = untrusted.read_json(src, f"final/projector_{number}.json")
        if not isinstance(data, dict) or not isinstance(data.get("init_args"), dict):
            raise C2CError(f"{path}: has no 'init_args'")
        if data.get("class") != "C2CProjector":
            raise C2CError(f"{path}: only the class C2CProjector is supported")
        given = {k: v for k, v in data["init_args"].items() if v is not None}
        args = _DEFAULTS | given
        names = [*_DEFAULTS, "source_dim", "target_dim"]
        if missing := [name for name in names if name not in args]:
            raise C2CError(f"{path}: '{missing[0]}' is missing")
        args = {name: args[name] for name in names}
        shared = shared or args
        if different := [name for name in names if args[name] != shared[name]]:
            raise C2CError(
                f"{path}: '{different[0]}' differs from that of projector_{numbers[0]}; "
                "projectors of different shapes are not supported"
            )
    return shared


def _shape(name: Any, role: str, args: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "name": name if isinstance(name, str) and name else f"unknown {role}",
        "kv_heads": args[f"{prefix}_num_heads"],
        "head_dim": args[f"{prefix}_dim"],
    }


def _check(config: FuserConfig, files: dict[int, TorchFile]) -> Layout:
    """Compares every file with what `config` needs; returns the layout of our weights."""
    layout: Layout = {}
    for file in files.values():
        fuser = skeleton(config, len(file.tensors), str(file.path))
        _check_file(file, parameters(fuser), layout)
    return layout


def _check_file(file: TorchFile, ours: dict[str, mx.array], layout: Layout) -> None:
    def refuse(what: str) -> NoReturn:
        raise C2CError(f"{file.path}: {what}")

    wanted = {reference_name(name, kind): name for name in ours for kind in _KINDS}
    found = file.tensors.keys() - {"gate_temperature"}  # of training; nothing reads it
    if missing := sorted(wanted.keys() - found):
        refuse(f"'{missing[0]}' is missing")
    if extra := sorted(found - wanted.keys()):
        refuse(f"unexpected tensor {extra[0][:80]!r}")
    for theirs, name in wanted.items():
        tensor, stacked = file.tensors[theirs], tuple(ours[name].shape)
        if tensor.shape != stacked[2:]:
            refuse(f"'{theirs}' should have shape {stacked[2:]}, not {tensor.shape}")
        dtype, _ = layout.setdefault(name, (tensor.dtype, stacked))
        if dtype != tensor.dtype:
            refuse(f"'{theirs}' is {tensor.dtype}, but {dtype} elsewhere")


def reference_name(name: str, kind: str) -> str:
    """The reference's key for one of our parameters; `kind` is "key" or "value"."""
    if block := re.fullmatch(r"(mlp1|scalar_mlp2|proj_mlp2)(?:\.(\d+))?\.(norm|w1|w2)", name):
        stack, number, part = block.groups()
        return f"{kind}_{stack}.blocks.{number or 0}.{part}.weight"
    return f"{kind}_" + re.sub("^proj_in", "in", name)


def _slices(
    source: _Source, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, int, bytes]]:
    """One projector after another: a weight's name, the slice's number in it, and its bytes."""
    total = len(source.numbers)
    for at, number in enumerate(source.numbers):
        file = source.files[number]
        for name, (dtype, _) in source.layout.items():
            for row, kind in enumerate(_KINDS):
                theirs = reference_name(name, kind)
                data = file.read(theirs)
                if not _is_finite(data, dtype):
                    raise C2CError(f"{file.path}: '{theirs}' holds NaN or infinite numbers")
                yield name, row * total + at, data
        progress(at + 1, total)


def _write_weights(path: Path, source: _Source, progress: Callable[[int, int], None]) -> None:
    """Writes a safetensors file, each slice to its place."""
    header, starts = _safetensors_header(source.layout)
    with path.open("wb") as out:
        out.write(header)
        for name, place, data in _slices(source, progress):
            out.seek(starts[name] + place * len(data))
            out.write(data)


def _safetensors_header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """The file's head, and where in the file each tensor starts."""
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + ITEM_SIZE[dtype] * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    offset = 8 + len(head)
    starts = {name: offset + entry["data_offsets"][0] for name, entry in entries.items()}
    return len(head).to_bytes(8, "little") + head, starts


def _is_finite(data: bytes, dtype: str) -> bool:
    if dtype == "BF16":  # the upper half of a float32: finite unless the exponent is all ones
        return bool((np.frombuffer(data, "<u2") & 0x7F80 != 0x7F80).all())
    return bool(np.isfinite(np.frombuffer(data, "<f4" if dtype == "F32" else "<f2")).all())
