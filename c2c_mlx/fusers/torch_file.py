"""Reads a torch state dict without torch, and without running anything that stands in it.

A `.pt` file is a zip of one pickle and one raw file per storage. The pickle is not unpickled: it is
interpreted, opcode by opcode, by a machine that knows strings, integers, tuples, dicts, and the
three globals of a state dict as plain data. It has no way to import, call or change anything, and
it refuses whatever it does not know. (`torch.load(weights_only=True)` was bypassed twice:
CVE-2025-32434 and CVE-2026-24747. A `pickle.Unpickler` whose `find_class` knows these globals alone
would be 60 lines shorter, but twelve bytes have it take 4 GB, and two hundred run for ever.)
"""

from __future__ import annotations

import errno
import math
import os
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from c2c_mlx.errors import C2CError

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}  # by safetensors' names

_STORAGES = {
    ("torch", "FloatStorage"): "F32",
    ("torch", "HalfStorage"): "F16",
    ("torch", "BFloat16Storage"): "BF16",
}
_ORDERED_DICT = ("collections", "OrderedDict")
_REBUILD = ("torch._utils", "_rebuild_tensor_v2")
# In bytes; those of a real projector have 6 and 4 thousand.
_MAX_PICKLE = 1 << 16
_MAX_DIRECTORY = 1 << 18

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


# What the zipfile module raises on damaged files, encrypted ones included.
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError, struct.error)


class _Refused(Exception):
    """What is wrong with a file; the reader adds the file's name."""


@dataclass(frozen=True)
class _Global:
    name: tuple[str, str]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class TorchTensor:
    """Where one tensor lies; always contiguous and inside its storage."""

    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    storage: str
    offset: int  # in bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


class TorchFile:
    """One `.pt` file.

    Args:
        path: the file; it is opened for the time of each call only.

    Raises:
        C2CError: for anything but a plain state dict of float tensors, in one line that names the
            file. So do the methods.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TorchTensor] = {}
        with _refusing(path), path.open("rb") as file:
            self.bytes = os.fstat(file.fileno()).st_size
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                self._open(archive)

    def _open(self, archive: zipfile.ZipFile) -> None:
        names = archive.namelist()
        pickles = [n for n in names if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused("not a torch file (it needs one data.pkl)")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root.count("/") != 1 or any(not n.startswith(self._root) for n in names):
            raise _Refused("not a torch file (an entry lies outside of its folder)")
        order = self._root + "byteorder"
        if order in names and _read(archive, order, 16) != b"little":
            raise _Refused("only little-endian files are supported")
        used = 0
        for name, tensor in _interpret(_read(archive, pickles[0], _MAX_PICKLE)).items():
            if not isinstance(tensor, TorchTensor):
                raise _Refused(f"{_quote(name)} is no tensor")
            entry = archive.getinfo(self._root + f"data/{tensor.storage}")
            if tensor.offset + tensor.size > entry.file_size:
                raise _Refused(f"{_quote(name)} reaches beyond its storage")
            used += entry.file_size
            self.tensors[name] = tensor
        if used > self.bytes:  # each would be read again for every tensor
            raise _Refused("tensors share storages")

    def read(self, name: str) -> bytes:
        """The raw little-endian bytes of a tensor; the storage's checksum is verified."""
        tensor = self.tensors[name]
        with _refusing(self.path), zipfile.ZipFile(self.path) as archive:
            data = _read(archive, self._root + f"data/{tensor.storage}", self.bytes)
        return data[tensor.offset : tensor.offset + tensor.size]


class _refusing:  # noqa: N801 - reads as a verb in the with statement
    """Turns everything that a damaged or hostile file can cause into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise C2CError(f"{self.path}: {error.strerror or error}") from None
        if isinstance(error, (OSError, *_ZIP_ERRORS)):  # EINVAL: offsets that lead nowhere
            raise C2CError(f"{self.path}: damaged, or not a torch zip file ({error})") from None
        if isinstance(error, KeyError):
            raise C2CError(f"{self.path}: a storage is missing") from None
        if isinstance(error, _Refused):
            raise C2CError(f"{self.path}: {error}") from None


def _check_directory(file: BinaryIO) -> None:
    """Looks at the archive's last record before its directory is read into memory."""
    # The very one that zipfile will go by, behind a comment or in ZIP64's form as well.
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > _MAX_DIRECTORY:  # type: ignore[attr-defined]
        raise _Refused("its table of contents is larger than any real one")


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    entry = archive.getinfo(name)
    # torch never compresses, so a compressed entry could only be a bomb.
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise _Refused(f"{_quote(name)} is compressed; torch writes plain entries")
    if entry.file_size > limit:
        raise _Refused(f"{_quote(name)} is larger than any real one")
    data = archive.read(entry)
    if len(data) != entry.file_size:
        raise _Refused(f"{_quote(name)} is cut short")
    return data


def _interpret(pickle: bytes) -> dict[str, Any]:
    """Runs the pickle of a state dict on our own machine and returns the dict."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, ValueError, TypeError, RecursionError):
        raise _Refused("its pickle is damaged") from None
    if len(machine.stack) != 1 or not isinstance(machine.stack[0], dict):
        raise _Refused("holds no state dict")
    return machine.stack[0]


class _Machine:
    """The opcodes of a state dict. Values are str, int, bool, None, tuple, dict and our own."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "GLOBAL":
            self._push_global(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            self._push_global(*self._pop(2))
        elif name == "SETITEM":
            self._set_items(self._pop(2))
        elif name == "SETITEMS":
            self._set_items(self._since_mark())
        elif name == "BINPERSID":
            stack.append(_storage(*self._pop(1)))
        elif name == "REDUCE":
            stack.append(_construct(*self._pop(2)))
        elif name == "BUILD":
            self._pop(1)  # the version numbers of a state dict's modules
            if not isinstance(stack[-1], dict):
                raise _Refused("its pickle changes something other than a state dict")
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _Refused(f"its pickle does more than a state dict needs (opcode {name})")

    def _pop(self, n: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < n:
            raise IndexError
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _push_global(self, module: Any, name: Any) -> None:
        # Before it is hashed: nested tuples take exponential time.
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if (module, name) not in {_ORDERED_DICT, _REBUILD, *_STORAGES}:
            asked = _quote(f"{module}.{name}")
            raise _Refused(f"its pickle asks for {asked}, which no fuser needs")
        self.stack.append(_Global((module, name)))

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(k, str) for k in items[::2]):
            raise _Refused("its pickle is damaged")
        target.update(zip(items[::2], items[1::2], strict=True))


def _storage(value: Any) -> _Storage:
    tag, kind, key, _, length = value
    if tag != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES:
        raise _Refused("a tensor is not of float32, float16 or bfloat16")
    if not isinstance(key, str) or not _is_count(length):
        raise _Refused("its pickle is damaged")
    return _Storage(key, _STORAGES[kind.name], length)


def _construct(function: Any, arguments: Any) -> Any:
    """What REDUCE stands for; only two constructors exist."""
    if function == _Global(_ORDERED_DICT) and arguments == ():
        return {}
    if function != _Global(_REBUILD):
        raise _Refused("its pickle calls something other than a tensor's constructor")
    storage, offset, shape, strides, *_ = arguments
    if not isinstance(storage, _Storage) or not _is_count(offset):
        raise _Refused("its pickle is damaged")
    for dims in (shape, strides):
        if not isinstance(dims, tuple) or len(dims) > 4 or not all(map(_is_count, dims)):
            raise _Refused("a tensor's shape is no shape")
    if not _is_contiguous(shape, strides):
        raise _Refused("a tensor is not contiguous")
    if offset + math.prod(shape) > storage.length:
        raise _Refused("a tensor reaches beyond its storage")
    offset *= ITEM_SIZE[storage.dtype]
    return TorchTensor(storage.dtype, shape, storage.key, offset)


def _quote(text: str) -> str:
    return repr(text[:80])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        if dim != 1 and stride != step:
            return False
        step *= dim
    return True
