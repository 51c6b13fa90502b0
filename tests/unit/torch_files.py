"""Writes checkpoints in the published layout, and hostile `.pt` files, without torch."""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

HEADS, DIM = (2, 16), (3, 8)  # receiver: 2 KV heads x 16; sharer: 3 x 8
HIDDEN, INNER = 6, 10
MODEL = {"base_model": "org/receiver", "teacher_model": "org/sharer", "is_do_alignment": False}
INIT_ARGS = {
    "source_dim": 8,
    "source_num_heads": 3,
    "target_dim": 16,
    "target_num_heads": 2,
    "hidden_dim": HIDDEN,
    "intermediate_dim": INNER,
    "num_layers": 3,
    "dropout": 0.1,
}


def global_(module: str, name: str) -> Any:
    """A stand-in that pickles as the global `module.name`, which need not exist."""
    kind = type(name, (), {})
    kind.__module__, kind.__qualname__ = module, name
    return kind


ORDERED_DICT = global_("collections", "OrderedDict")
REBUILD = global_("torch._utils", "_rebuild_tensor_v2")


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


class Storage:
    """Pickles as torch's persistent id of a storage."""

    def __init__(self, key: str, length: int, kind: str = "FloatStorage") -> None:
        self.id = ("storage", global_("torch", kind), key, "cpu", length)


class Pickler(pickle._Pickler):  # the Python one: it takes globals on trust if told to
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, Storage) else None

    def save_global(self, value: Any, name: str | None = None) -> None:
        self.write(b"c" + f"{value.__module__}\n{value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {type: save_global}


def dumps(value: Any) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def tensor(
    key: str, shape: tuple[int, ...], *, strides: tuple[int, ...] | None = None, **storage: Any
) -> Call:
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    made = Storage(key, **({"length": math.prod(shape)} | storage))
    return Call(REBUILD, made, 0, shape, strides, False, Call(ORDERED_DICT))


def write_zip(path: Path, pickled: bytes, storages: dict[str, bytes], **options: Any) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("projector/data.pkl", pickled)
        archive.writestr("projector/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"projector/data/{key}", data)


def state(seed: int = 0, dtype: str = "<f4") -> dict[str, np.ndarray]:
    """The reference's keys and shapes with random numbers; all gates open.

    `dtype` is "bfloat16" or NumPy's name; NumPy holds the former as "<u2".
    """
    (n, d), (m, e) = HEADS, DIM
    shapes: dict[str, tuple[int, ...]] = {"gate_temperature": ()}
    for kind in ("key", "value"):
        blocks = {"mlp1": INNER, "scalar_mlp2": HIDDEN, "proj_mlp2": INNER}
        shapes |= {f"{kind}_gate_logit": (), f"{kind}_in.weight": (HIDDEN, n * d + m * e)}
        shapes |= {f"{kind}_in.bias": (HIDDEN,)}
        for name, inner in blocks.items():
            block = f"{kind}_{name}.blocks.0"
            shapes |= {f"{block}.norm.weight": (HIDDEN,)}
            shapes |= {f"{block}.w1.weight": (inner, HIDDEN), f"{block}.w2.weight": (HIDDEN, inner)}
        shapes |= {f"{kind}_scalar_head.weight": (n, HIDDEN), f"{kind}_scalar_head.bias": (n,)}
        shapes |= {f"{kind}_proj_out.weight": (n * d, HIDDEN), f"{kind}_proj_out.bias": (n * d,)}
    random = np.random.default_rng(seed)
    made = {name: random.uniform(0.1, 1, shape) for name, shape in shapes.items()}
    if dtype != "bfloat16":
        return {name: a.astype(dtype) for name, a in made.items()}
    upper = {name: a.astype("<f4").reshape(-1).view("<u4") >> 16 for name, a in made.items()}
    return {name: a.astype("<u2").reshape(shapes[name]) for name, a in upper.items()}


def write_state(path: Path, tensors: dict[str, np.ndarray]) -> None:
    kinds = {"<f4": "FloatStorage", "<f2": "HalfStorage", "<f8": "DoubleStorage"}
    kinds["<u2"] = "BFloat16Storage"
    pickled = {
        name: tensor(str(i), a.shape, kind=kinds[a.dtype.str], length=a.size)
        for i, (name, a) in enumerate(tensors.items())
    }
    raw = {str(i): a.tobytes() for i, a in enumerate(tensors.values())}
    write_zip(path, dumps(pickled), raw)


def write_checkpoint(
    folder: Path, mapping: dict[str, Any] | None = None, dtype: str = "<f4"
) -> Path:
    """Two layers: receiver 0 from sharer 1 by projector 1, receiver 1 from sharer 2 by 0."""
    final = folder / "final"
    final.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": MODEL}))
    mapping = mapping or {"0": [[1, 1]], "1": [[2, 0]]}
    (final / "projector_config.json").write_text(json.dumps({"0": {"1": mapping}}))
    for number in (0, 1):
        write_state(final / f"projector_{number}.pt", state(number, dtype))
        described = {"class": "C2CProjector", "init_args": INIT_ARGS}
        (final / f"projector_{number}.json").write_text(json.dumps(described))
    return folder
