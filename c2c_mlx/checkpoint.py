"""A fuser and its folder: config.json, fuser.safetensors, README.md.

A folder is replaced as a whole. The new files are written to `.saving`, which is renamed to
`.saved` once it is complete and on the disk; from that instant on the new fuser is the one that
counts, and its files only have to be moved up. `load` looks into `.saved` first, so whenever a
save is interrupted it finds the old fuser or the new one, never a mixture.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from safetensors import SafetensorError, safe_open

from c2c_mlx import card
from c2c_mlx.config import FORMAT_VERSION, FuserConfig, ModelShape, Provenance, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.fuser import Fuser

CONFIG, WEIGHTS, CARD = "config.json", "fuser.safetensors", "README.md"
STAGING, STAGED = ".saving", ".saved"

_FLOATS = ("F32", "F16", "BF16")  # as safetensors spells them
_MAX_JSON = 1 << 20  # bytes; a real description has a few thousand


def save(fuser: Fuser, folder: str | Path, dtype: mx.Dtype | None = None) -> None:
    """Writes a fuser folder; what the folder held before stays intact until all is written.

    Args:
        fuser: the fuser, with its provenance.
        folder: made if it does not exist; other files in it are left alone.
        dtype: of the weights in the file; None keeps them as they are.

    Raises:
        C2CError: if a weight is NaN or infinite, or the folder can't be written.
    """
    weights = parameters(fuser)
    if dtype is not None:
        weights = _as(dtype, weights)
    if bad := _not_finite(weights):
        raise C2CError(f"{folder}: not saved, '{bad}' holds NaN or infinite numbers")
    with replacing(folder) as staging:
        _write_weights(staging / WEIGHTS, weights)
        write_description(staging, fuser.config, fuser.provenance)


def load(folder: str | Path, bits: Literal[0, 4, 8] = 0) -> Fuser:
    """Reads a fuser folder in inference mode: as it is on a GPU, dense float32 on the CPU.

    Args:
        folder: the fuser's.
        bits: to which its weights are rounded, on the CPU as well; 0: they stay as they are.

    Raises:
        C2CError: if anything is missing, damaged, superfluous, misshapen, not a float, not finite,
            or made by a newer version; or if it is to be quantised for a second time.
    """
    folder = Path(folder)
    config, provenance = read_description(folder)
    path = locate(folder, WEIGHTS)
    found = _header(folder, path)
    fuser = skeleton(config, len(found), str(folder))
    _compare(folder, found, parameters(fuser))
    weights: dict[str, mx.array] = mx.load(str(path))  # type: ignore[assignment]
    on_cpu = mx.default_device().type == mx.cpu
    if on_cpu:  # it has fast products of float32 alone
        weights = _as(mx.float32, weights)
    if bad := _not_finite(weights):
        raise C2CError(f"{folder}: '{bad}' in {WEIGHTS} holds NaN or infinite numbers")
    fuser.update(tree_unflatten(list(weights.items())))
    if bits and bits != config.bits:
        if config.bits:
            raise C2CError(f"{folder}: has {config.bits} bits already; start from the original")
        fuser.quantise(bits)
    if on_cpu:
        fuser.dequantise()
    mx.eval(fuser.parameters())  # a lazy array would break when its file is replaced
    fuser.provenance = provenance
    fuser.eval()
    return fuser


def copy(source: Path, target: Path) -> None:
    """Copies a fuser's own files into an empty folder, once they have been looked through.

    Raises:
        C2CError: as `load` does.
    """
    load(source)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(locate(source, name), target / name)
    (target / CARD).write_text(card.render(*read_description(source)), encoding="utf-8")


def skeleton(config: FuserConfig, n_tensors: int, where: str) -> Fuser:
    """A fuser whose random weights are not computed unless somebody asks for them.

    Args:
        config: untrusted; what it asks for may be absurd.
        n_tensors: how many tensors there are to fill it.
        where: named in the message of an error.

    Raises:
        C2CError: if the configuration can't be that of `n_tensors` tensors.
    """
    try:
        if config.depth > n_tensors:
            raise ValueError
        return Fuser(config)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        raise C2CError(f"{where}: its description does not fit its {n_tensors} tensors") from None


def parameters(fuser: Fuser) -> dict[str, mx.array]:
    """Every parameter by the name that it has in fuser.safetensors."""
    return cast(dict[str, mx.array], tree_flatten(fuser.parameters(), destination={}))


def check_models(config: FuserConfig, receiver: ModelShape, sharer: ModelShape) -> None:
    """Refuses two models that the fuser was not made for.

    Args:
        config: the fuser's configuration.
        receiver: the receiver at hand.
        sharer: the sharer at hand.

    Raises:
        C2CError: if shapes differ, or tokenizer fingerprints where both sides know theirs.
    """
    for role, wanted, given in (
        ("receiver", config.receiver, receiver),
        ("sharer", config.sharer, sharer),
    ):
        same = dataclasses.replace(given, name=wanted.name, tokenizer=wanted.tokenizer)
        if same != wanted:
            raise C2CError(f"the fuser's {role} is {wanted}, but the {role} here is {given}")
        if wanted.tokenizer and given.tokenizer and wanted.tokenizer != given.tokenizer:
            raise C2CError(
                f"the fuser's {role} is {wanted.name} with tokenizer {wanted.tokenizer[:8]}, but "
                f"the {role} here, {given.name}, has tokenizer {given.tokenizer[:8]}"
            )


def read_description(folder: str | Path) -> tuple[FuserConfig, Provenance]:
    """Reads a fuser folder's config.json alone.

    Raises:
        C2CError: if it is not there, not valid, or made by a newer version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise C2CError(f"{folder}: no such fuser folder")
    data = read_json(locate(folder, CONFIG).parent, CONFIG)
    where = str(folder / CONFIG)
    if not isinstance(data, dict):
        raise C2CError(f"{where}: expected an object with fields, not {type(data).__name__}")
    version = data.pop("format_version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise C2CError(f"{where}: 'format_version' must be a whole number from 1 on")
    if version > FORMAT_VERSION:
        raise C2CError(f"{where}: made by a newer c2c-mlx (format {version}); upgrade c2c-mlx")
    provenance = from_dict(Provenance, data.pop("provenance", {}), f"{where}: 'provenance'")
    return from_dict(FuserConfig, data, where), provenance


def write_description(folder: Path, config: FuserConfig, provenance: Provenance) -> None:
    """Writes config.json and the model card into `folder`."""
    metrics = {name: m for name, m in provenance.metrics.items() if math.isfinite(m)}
    provenance = dataclasses.replace(provenance, metrics=metrics)
    data = {
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(config),
        "provenance": dataclasses.asdict(provenance),
    }
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card.render(config, provenance), encoding="utf-8")


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


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yields an empty staging folder whose files replace those of `folder` when the block ends.

    Raises:
        C2CError: for an error of the file system; nothing that was begun is left behind, and
            `folder` holds what it held.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _move_up(folder)  # an earlier save that was interrupted after it was complete
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for path in [*staging.iterdir(), staging]:
            _flush(path)
        os.rename(staging, folder / STAGED)
        _move_up(folder)
    except BaseException as e:
        if not (folder / STAGED).exists():
            shutil.rmtree(folder if is_new else folder / STAGING, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # somebody else has put something there since
                    parent.rmdir()
        if isinstance(e, OSError):
            raise C2CError(f"{folder}: can't be written ({e.strerror or e})") from None
        raise


def _write_weights(path: Path, weights: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), weights)
        # MLX may say nothing of a write that failed; a file that is too short does not open.
        with safe_open(path, framework="numpy"):
            pass
    except (RuntimeError, SafetensorError) as e:
        raise OSError(f"{path.name}: {e}") from None


def _move_up(folder: Path) -> None:
    staged = folder / STAGED
    if not staged.exists():
        return
    for path in staged.iterdir():
        os.replace(path, folder / path.name)
    _flush(folder)
    staged.rmdir()


def locate(folder: Path, name: str) -> Path:
    """Where a fuser folder holds one of its files.

    Raises:
        C2CError: if it does not.
    """
    staged = folder / STAGED
    path = (staged if (staged / name).exists() else folder) / name
    if not path.exists() and not path.is_symlink():
        raise C2CError(f"{folder}: {name} is missing; is this a fuser folder?")
    return find_file(path.parent, name)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(folder: Path, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape per tensor, read by the package that refuses crafted offsets."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        with path.open("rb") as raw:  # MLX will read this once more, and must read the same
            parse_json(raw.read(int.from_bytes(raw.read(8), "little")))
        return found
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise C2CError(f"{folder}: {WEIGHTS} is damaged ({e})") from None


def _compare(
    folder: Path, found: dict[str, tuple[str, tuple[int, ...]]], wanted: dict[str, mx.array]
) -> None:
    def refuse(what: str) -> NoReturn:
        raise C2CError(f"{folder}: {what} in {WEIGHTS}")

    if missing := sorted(wanted.keys() - found.keys()):
        refuse(f"tensor '{missing[0]}' is missing")
    if extra := sorted(found.keys() - wanted.keys()):
        refuse(f"unexpected tensor '{extra[0]}'")
    for name, (dtype, shape) in found.items():
        if shape != wanted[name].shape:
            refuse(f"'{name}' should have shape {wanted[name].shape}, not {shape},")
        if wanted[name].dtype == mx.uint32 and dtype != "U32":
            refuse(f"'{name}' should hold packed numbers, not {dtype},")
        if wanted[name].dtype != mx.uint32 and dtype not in _FLOATS:
            refuse(f"'{name}' should hold floats, not {dtype},")


def _as(dtype: mx.Dtype, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """All but packed numbers in this dtype."""
    return {n: w if w.dtype == mx.uint32 else w.astype(dtype) for n, w in weights.items()}


def _not_finite(weights: dict[str, mx.array]) -> str | None:
    """The first tensor that is not finite throughout."""
    for name, w in weights.items():
        if not mx.isfinite(w).all().item():
            return name
    return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found
