"""Hostile and broken checkpoints, by name. Each entry damages a folder that was sound.

Two kinds: checkpoints in the published PyTorch layout, which `convert` reads, and fuser folders,
which `show` reads. A pickle that gets to run creates a canary file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch_files import (
    ORDERED_DICT,
    REBUILD,
    Call,
    Storage,
    dumps,
    global_,
    state,
    tensor,
    write_state,
    write_zip,
)

Damage = Callable[[Path, Path], object]  # the folder, and the canary

CHECKPOINTS: dict[str, Damage] = {}
FUSERS: dict[str, Damage] = {}

PT = "final/projector_0.pt"
OPTIONS = "final/projector_0.json"
MAP = "final/projector_config.json"
WEIGHTS = "fuser.safetensors"


def case(name: str) -> Callable[[Damage], Damage]:
    """Names a function that damages a checkpoint."""
    return lambda damage: CHECKPOINTS.setdefault(name, damage)


# --- pickles that want to run something ---------------------------------------------------------


def touch(canary: Path) -> str:
    return f"touch '{canary}'"


def source(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w')"


def pickled(name: str, value: Callable[[Path], Any]) -> None:
    """A projector whose pickle is that of `value(canary)`."""
    CHECKPOINTS[name] = lambda folder, canary: write_zip(folder / PT, dumps(value(canary)), {})


def raw_pickle(name: str, code: Callable[[Path], bytes]) -> None:
    """A projector whose pickle consists of these opcodes."""
    CHECKPOINTS[name] = lambda folder, canary: write_zip(folder / PT, code(canary), {})


def short(text: str) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def string(text: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


SYSTEM = global_("os", "system")


class Stateful:
    """Sets its state by BUILD."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return ORDERED_DICT, (), self.state


pickled("os.system", lambda c: Call(SYSTEM, touch(c)))
pickled("posix.system", lambda c: Call(global_("posix", "system"), touch(c)))
pickled("builtins.exec", lambda c: Call(global_("builtins", "exec"), source(c)))
pickled("builtins.eval", lambda c: Call(global_("builtins", "eval"), source(c)))
pickled("__builtin__.eval", lambda c: Call(global_("__builtin__", "eval"), source(c)))
pickled("subprocess.Popen", lambda c: Call(global_("subprocess", "Popen"), ["touch", str(c)]))
pickled("builtins.open", lambda c: Call(global_("builtins", "open"), str(c), "w"))
pickled("runpy", lambda c: Call(global_("runpy", "_run_code"), source(c), {}))
pickled("importlib", lambda c: Call(global_("importlib", "import_module"), "antigravity"))
pickled("torch.load", lambda c: Call(global_("torch", "load"), str(c)))
pickled("torch.hub", lambda c: Call(global_("torch.hub", "load"), "org/repository", "model"))
pickled(
    "numpy-reconstruct",
    lambda c: Call(global_("numpy.core.multiarray", "_reconstruct"), Call(SYSTEM, touch(c)), 1),
)
pickled("attribute-of-an-allowed-global", lambda c: Call(global_("collections", "_sys.exit"), 0))
pickled("call-as-a-value", lambda c: {"key_in.bias": Call(SYSTEM, touch(c))})
pickled("call-as-a-key", lambda c: {Call(SYSTEM, touch(c)): 1})
pickled(
    "call-inside-an-ordered-dict", lambda c: Call(ORDERED_DICT, [("a", Call(SYSTEM, touch(c)))])
)
pickled("call-as-arguments", lambda c: Call(REBUILD, Call(SYSTEM, touch(c))))
pickled(
    "call-as-a-storage",
    lambda c: {"key_in.bias": Call(REBUILD, Call(SYSTEM, touch(c)), 0, (6,), (1,), False, None)},
)
pickled("call-as-a-storage-key", lambda c: Storage(Call(SYSTEM, touch(c)), 6))  # type: ignore[arg-type]
pickled(
    "call-as-a-shape",
    lambda c: {"x": Call(REBUILD, Storage("0", 6), 0, Call(SYSTEM, touch(c)), (1,), False, None)},
)
pickled("calls-within-calls", lambda c: Call(SYSTEM, Call(SYSTEM, Call(SYSTEM, touch(c)))))
pickled("state-of-an-object", lambda c: Stateful(Call(SYSTEM, touch(c))))
pickled(
    "rebuild-from-type",
    lambda c: Call(global_("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, str, (touch(c),), {}),
)
pickled(
    "rebuild-parameter",
    lambda c: Call(
        global_("torch._utils", "_rebuild_parameter"), Call(SYSTEM, touch(c)), True, None
    ),
)
pickled("rebuild-sparse", lambda c: Call(global_("torch._utils", "_rebuild_sparse_tensor"), 1, ()))
pickled("rebuild-quantised", lambda c: Call(global_("torch._utils", "_rebuild_qtensor"), 1, 2))
raw_pickle(
    "stack-global",
    lambda c: b"\x80\x04" + short("os") + short("system") + b"\x93" + string(touch(c)) + b"\x85R.",
)
raw_pickle(
    "getattr-chain",
    lambda c: b"cbuiltins\ngetattr\n(cos\npath\nS'os'\ntR(S" + repr(touch(c)).encode() + b"\ntR.",
)
raw_pickle("inst", lambda c: b"(S" + repr(touch(c)).encode() + b"\nios\nsystem\n.")
raw_pickle("obj", lambda c: b"(cos\nsystem\n" + string(touch(c)) + b"o.")
raw_pickle("newobj", lambda c: b"\x80\x02cos\nsystem\n" + string(touch(c)) + b"\x85\x81.")
raw_pickle("newobj-ex", lambda c: b"\x80\x04cos\nsystem\n" + string(touch(c)) + b"\x85}\x92.")
raw_pickle("extension-registry", lambda c: b"\x80\x02\x82\x01.")
raw_pickle("text-reduce", lambda c: b"cos\nsystem\n(S" + repr(touch(c)).encode() + b"\ntR.")
raw_pickle("text-persistent-id", lambda c: b"P" + touch(c).encode() + b"\n.")
raw_pickle(
    "build-a-global",
    lambda c: b"\x80\x02ccollections\nOrderedDict\n}" + string("__reduce__") + string("x") + b"sb.",
)


@case("bare-pickle")
def bare_pickle(folder: Path, canary: Path) -> None:
    """As torch wrote it before 1.6; `torch.load` would unpickle it."""
    (folder / PT).write_bytes(dumps(Call(SYSTEM, touch(canary))))


@case("torchscript")
def torchscript(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / PT, "w") as archive:
        archive.writestr("projector/constants.pkl", dumps(Call(SYSTEM, touch(canary))))
        archive.writestr("projector/code/__torch__.py", source(canary))


@case("tar")
def tar(folder: Path, canary: Path) -> None:
    with tarfile.open(folder / PT, "w") as archive:
        info = tarfile.TarInfo("../../canary")
        archive.addfile(info, io.BytesIO())


# --- pickles that want time or memory -----------------------------------------------------------

raw_pickle("empty-pickle", lambda c: b"")
raw_pickle("no-stop", lambda c: b"\x80\x02}q\x00")
raw_pickle("stack-underflow", lambda c: b"\x80\x02\x87R.")
raw_pickle("unknown-memo", lambda c: b"\x80\x02h\x07.")
raw_pickle("string-of-4-gb", lambda c: b"\x80\x02X\xff\xff\xff\xffabc.")
raw_pickle("string-of-2-to-the-63", lambda c: b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.")
raw_pickle("number-of-2-gb", lambda c: b"\x80\x02\x8b\xff\xff\xff\x7f.")
raw_pickle("number-of-50000-digits", lambda c: b"L" + b"9" * 50_000 + b"L\n.")
raw_pickle(
    "hash-of-2-to-the-60",
    lambda c: b"\x80\x04)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00h\x00\x93.",
)
raw_pickle(
    "key-of-2-to-the-60",
    lambda c: b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00h\x00s.",
)
raw_pickle(
    "id-of-2-to-the-60", lambda c: b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00Q."
)
raw_pickle("marks-without-end", lambda c: b"\x80\x02" + b"(" * 60_000 + b".")
# These two are why no pickle.Unpickler reads: its C code makes room for the index of a memo (4 GB),
# and hashes whatever a dict gets for a key.
raw_pickle("memo-of-2-to-the-28", lambda c: b"\x80\x02}r\xff\xff\xff\x0f.")
raw_pickle(
    "key-of-2-to-the-30-tuples",
    lambda c: (
        b"\x80\x02)q\0"
        + b"".join(bytes((104, i, 104, i, 134, 113, i + 1)) for i in range(30))
        + b"}h\x1eK\1s."
    ),
)
raw_pickle("nested-50000-deep", lambda c: b"\x80\x02)" + b"\x85" * 50_000 + b".")
raw_pickle("a-pickle-of-9-mb", lambda c: b"\x80\x02" + b")" * (9 << 20) + b".")
raw_pickle("a-list-that-holds-itself", lambda c: b"\x80\x02]q\x00h\x00a.")
pickled("no-dict", lambda c: ("a", "b"))
pickled("values-are-text", lambda c: {"key_in.bias": "no tensor"})
pickled("keys-are-numbers", lambda c: {7: tensor("0", (6,))})


# --- archives -----------------------------------------------------------------------------------


def archive(name: str, change: Callable[[bytes], bytes]) -> None:
    """A sound projector whose bytes were changed."""

    def damage(folder: Path, canary: Path) -> None:
        data = (folder / PT).read_bytes()
        (folder / PT).write_bytes(change(data))

    CHECKPOINTS[name] = damage


def patch_end(data: bytes, offset: int, value: bytes) -> bytes:
    """Changes a field of the archive's last record."""
    at = data.rindex(b"PK\5\6") + offset
    return data[:at] + value + data[at + len(value) :]


def zip64(data: bytes, size: int) -> bytes:
    """With a record that says how large the directory is in the last one's stead."""
    at = data.rindex(b"PK\5\6")
    n, _, start = struct.unpack_from("<HII", data, at + 10)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, start)
    return data[:at] + record + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1) + data[at:]


def patch_directory(data: bytes, offset: int, value: bytes) -> bytes:
    """Changes a field of the last entry in the archive's directory."""
    at = data.rindex(b"PK\1\2") + offset
    return data[:at] + value + data[at + len(value) :]


def entries(name: str, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A sound projector with entries added."""

    def damage(folder: Path, canary: Path) -> None:
        with zipfile.ZipFile(folder / PT, "a", compression) as archive:
            for path, data in files.items():
                archive.writestr(path, data)

    CHECKPOINTS[name] = damage


archive("empty-file", lambda data: b"")
archive("text", lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
archive("cut-in-half", lambda data: data[: len(data) // 2])
archive("cut-by-a-byte", lambda data: data[:-1])
archive("without-its-beginning", lambda data: data[1000:])
archive("a-flipped-bit", lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:])
archive("directory-of-4-gb", lambda data: patch_end(data, 12, b"\xf0\xff\xff\xff"))
archive("zip64-directory-of-4-gb", lambda data: zip64(data, 1 << 32))
archive(
    "directory-of-4-gb-behind-a-comment",
    lambda data: patch_end(data, 12, b"\xf0\xff\xff\xff\0\0\0\0\xff\xff") + b" " * 65_535,
)
archive("directory-elsewhere", lambda data: patch_end(data, 16, b"\xf0\xff\xff\x7f"))
archive("65535-entries-claimed", lambda data: patch_end(data, 12, b"\xff\xff\xff\x00"))
archive(
    "entry-of-4-gb", lambda data: patch_directory(data, 20, b"\xf0\xff\xff\xff\xf0\xff\xff\xff")
)
archive("entry-elsewhere", lambda data: patch_directory(data, 42, b"\xf0\xff\xff\x7f"))
archive("encrypted", lambda data: patch_directory(data, 8, b"\x01\x00"))
archive("unknown-compression", lambda data: patch_directory(data, 10, b"\x63\x00"))
entries("two-pickles", {"other/data.pkl": b"\x80\x02}."})
entries("entry-outside", {"../../canary": b"x"})
entries("entry-at-the-root", {"/tmp/canary": b"x"})
entries("5000-entries", {f"projector/{i}": b"" for i in range(5_000)})


@case("folder-outside")
def folder_outside(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / PT, "w") as archive:
        archive.writestr("../../x/data.pkl", dumps({}))


@case("zip-bomb")
def zip_bomb(folder: Path, canary: Path) -> None:
    bomb = dumps({"key_in.bias": tensor("0", (6,), length=250_000)})
    write_zip(folder / PT, bomb, {"0": b"\0" * 10**6}, compression=zipfile.ZIP_DEFLATED)


@case("big-endian")
def big_endian(folder: Path, canary: Path) -> None:
    with zipfile.ZipFile(folder / PT, "w") as archive:
        archive.writestr("projector/data.pkl", dumps({}))
        archive.writestr("projector/byteorder", "big")


# --- tensors ------------------------------------------------------------------------------------


def weights(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """A projector with other tensors."""

    def damage(folder: Path, canary: Path) -> None:
        tensors = state(0)
        change(tensors)
        write_state(folder / PT, tensors)

    CHECKPOINTS[name] = damage


def one_tensor(name: str, made: Any) -> None:
    """A projector with this tensor's description, over a storage of 24 bytes."""

    def damage(folder: Path, canary: Path) -> None:
        write_zip(folder / PT, dumps({"key_in.bias": made}), {"0": b"\0" * 24})

    CHECKPOINTS[name] = damage


weights("missing-tensor", lambda t: t.pop("value_in.bias"))
weights("extra-tensor", lambda t: t.update(extra=np.zeros(1, "<f4")))
weights("wrong-shape", lambda t: t.update({"key_in.bias": np.zeros(7, "<f4")}))
weights("wrong-rank", lambda t: t.update({"key_in.bias": np.zeros((6, 1), "<f4")}))
weights("float64", lambda t: t.update({"key_in.bias": np.zeros(6, "<f8")}))
weights("mixed-dtypes", lambda t: t.update({"key_in.bias": np.zeros(6, "<f2")}))
weights("nan", lambda t: t.update({"key_in.bias": np.full(6, np.nan, "<f4")}))
weights("infinity", lambda t: t.update({"value_proj_out.bias": np.full(32, np.inf, "<f4")}))
one_tensor("integers", tensor("0", (6,), kind="IntStorage"))
one_tensor("quantised", tensor("0", (6,), kind="QInt8Storage"))
one_tensor("storage-too-short", tensor("0", (6,), length=5))
one_tensor("storage-of-4-tb", tensor("0", (6,), length=10**12))
one_tensor("shape-of-10-to-the-18", tensor("0", (10**9, 10**9)))
one_tensor("negative-shape", tensor("0", (-6,)))
one_tensor("strides-of-zero", tensor("0", (6,), strides=(0,)))
one_tensor("strides-backwards", tensor("0", (6,), strides=(-1,)))
one_tensor("transposed", tensor("0", (2, 3), strides=(1, 2)))
one_tensor("missing-storage", tensor("missing", (6,)))
one_tensor("storage-outside", tensor("../../config.json", (6,)))


@case("shared-storage")
def shared_storage(folder: Path, canary: Path) -> None:
    """All tensors are views of one storage, which would be read again for each."""
    shapes = {name: a.shape for name, a in state(0).items()}
    made = {name: tensor("0", shape, length=10_000) for name, shape in shapes.items()}
    write_zip(folder / PT, dumps(made), {"0": b"\0" * 40_000})


@case("infinity-in-bfloat16")
def infinity_in_bfloat16(folder: Path, canary: Path) -> None:
    shapes = {name: a.shape for name, a in state(0).items()}
    made = {n: tensor(str(i), s, kind="BFloat16Storage") for i, (n, s) in enumerate(shapes.items())}
    raw = [np.full(shape, 0x3F80, "<u2") for shape in shapes.values()]
    raw[-1][:] = 0xFF80
    for number in (0, 1):
        write_zip(
            folder / f"final/projector_{number}.pt",
            dumps(made),
            {str(i): a.tobytes() for i, a in enumerate(raw)},
        )


# --- descriptions -------------------------------------------------------------------------------


def edited(
    table: dict[str, Damage], name: str, files: Sequence[str], change: Callable[[Any], object]
) -> None:
    """JSON files whose contents were changed."""

    def damage(folder: Path, canary: Path) -> None:
        for file in files:
            data = json.loads((folder / file).read_text())
            change(data)
            (folder / file).write_text(json.dumps(data))

    table[name] = damage


def text(table: dict[str, Damage], name: str, file: str, content: str | bytes) -> None:
    """A file with this content."""
    data = content if isinstance(content, bytes) else content.encode()
    table[name] = lambda folder, canary: (folder / file).write_bytes(data)


def arguments(name: str, **values: Any) -> None:
    """Constructor arguments that both projectors claim."""
    files = (OPTIONS, OPTIONS.replace("0", "1"))
    edited(CHECKPOINTS, name, files, lambda d: d["init_args"].update(values))


arguments("hidden-of-10-to-the-30", hidden_dim=10**30)
arguments("hidden-of-10-to-the-9", hidden_dim=10**9)
arguments("hidden-negative", hidden_dim=-1)
arguments("hidden-half", hidden_dim=8.5)
arguments("hidden-true", hidden_dim=True)
arguments("heads-of-2-to-the-62", source_num_heads=2**62)
arguments("depth-of-10-to-the-9", num_layers=10**9)
arguments("dropout-of-2", dropout=2.0)
edited(
    CHECKPOINTS, "projectors-that-differ", (OPTIONS,), lambda d: d["init_args"].update(hidden_dim=7)
)
edited(CHECKPOINTS, "another-class", (OPTIONS,), lambda d: d.update({"class": "os.system"}))
edited(CHECKPOINTS, "no-model", ("config.json",), lambda d: d.pop("model"))
edited(
    CHECKPOINTS,
    "unknown-strategy",
    ("config.json",),
    lambda d: d["model"].update(is_do_alignment=True, alignment_strategy="exec"),
)
edited(CHECKPOINTS, "no-layer", (MAP,), lambda d: d["0"]["1"].clear())
edited(CHECKPOINTS, "two-sharers", (MAP,), lambda d: d["0"].update({"2": {}}))
edited(
    CHECKPOINTS, "layer-of-10-to-the-9", (MAP,), lambda d: d["0"]["1"].update({"9" * 9: [[0, 0]]})
)
edited(CHECKPOINTS, "layer-below-zero", (MAP,), lambda d: d["0"]["1"].update({"2": [[-1, 0]]}))
edited(CHECKPOINTS, "layer-twice", (MAP,), lambda d: d["0"]["1"].update({"01": [[0, 0]]}))
edited(CHECKPOINTS, "number-is-a-path", (MAP,), lambda d: d["0"]["1"].update({"2": [[0, "../0"]]}))
edited(CHECKPOINTS, "number-without-a-file", (MAP,), lambda d: d["0"]["1"].update({"2": [[0, 7]]}))
text(CHECKPOINTS, "not-json", MAP, "{")
text(CHECKPOINTS, "not-utf-8", MAP, b"\xff\xfe\x00")
text(CHECKPOINTS, "json-100000-deep", MAP, "[" * 100_000)
text(CHECKPOINTS, "json-number-of-50000-digits", MAP, '{"0": ' + "9" * 50_000 + "}")
text(CHECKPOINTS, "json-nan", "config.json", '{"model": NaN}')
text(CHECKPOINTS, "json-key-twice", MAP, '{"0": {"1": {"0": [[1, 1]], "0": [[1, 0]]}}}')
text(CHECKPOINTS, "json-list", MAP, "[1, 2]")
text(CHECKPOINTS, "json-null", "config.json", "null")
text(CHECKPOINTS, "json-of-2-mb", "config.json", '{"model": "' + "a" * (2 << 20) + '"}')


# --- files --------------------------------------------------------------------------------------


def replaced(
    table: dict[str, Damage], name: str, file: str, make: Callable[[Path, Path], object]
) -> None:
    """Something else in place of a file."""

    def damage(folder: Path, canary: Path) -> None:
        (folder / file).unlink()
        make(folder / file, canary)

    table[name] = damage


def link(target: str) -> Callable[[Path, Path], object]:
    return lambda path, canary: path.symlink_to(target)


def link_to_a_copy(path: Path, canary: Path) -> None:
    """A sound file, but not one of the folder's."""
    outside = canary.parent / "outside"
    outside.write_text("{}")
    path.symlink_to(outside)


for _file in ("config.json", MAP, OPTIONS, PT):
    _name = Path(_file).name
    replaced(CHECKPOINTS, f"missing-{_name}", _file, lambda path, canary: None)
    replaced(CHECKPOINTS, f"pipe-{_name}", _file, lambda path, canary: os.mkfifo(path))
    replaced(CHECKPOINTS, f"link-outside-{_name}", _file, link_to_a_copy)
replaced(CHECKPOINTS, "endless-device", PT, link("/dev/zero"))
replaced(CHECKPOINTS, "endless-json", "config.json", link("/dev/zero"))
replaced(CHECKPOINTS, "password-file", "config.json", link("/etc/passwd"))
replaced(CHECKPOINTS, "link-to-itself", PT, link("projector_0.pt"))
replaced(CHECKPOINTS, "folder-for-a-file", PT, lambda path, canary: path.mkdir())


@case("extra-projector")
def extra_projector(folder: Path, canary: Path) -> None:
    write_zip(folder / "final/projector_9.pt", dumps(Call(SYSTEM, touch(canary))), {})


@case("final-is-a-link-outside")
def final_is_a_link_outside(folder: Path, canary: Path) -> None:
    (folder / "final").rename(canary.parent / "final")
    (folder / "final").symlink_to(canary.parent / "final")


# --- fuser folders ------------------------------------------------------------------------------


def header(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Safetensors with a changed header over the same bytes."""

    def damage(folder: Path, canary: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        change(table)
        head = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(head)) + head + data[8 + length :])

    FUSERS[name] = damage


def offsets(begin: int, end: int) -> Callable[[dict[str, Any]], object]:
    return lambda table: table["gate_logit"].update(data_offsets=[begin, end])


def file_bytes(name: str, change: Callable[[bytes], bytes]) -> None:
    """A safetensors file whose bytes were changed."""

    def damage(folder: Path, canary: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    FUSERS[name] = damage


def twice(data: bytes) -> bytes:
    """A header with one name twice, of which readers differ which one counts."""
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length].rstrip()
    head = (
        head[:-1] + b',"gate_logit":' + json.dumps(json.loads(head)["gate_logit"]).encode() + b"}"
    )
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def nan(data: bytes) -> bytes:
    return data[:-4] + np.float32(np.nan).tobytes()


header("offsets-negative", offsets(-16, 0))
header("offsets-overlapping", offsets(0, 16))
header("offsets-beyond", offsets(1 << 62, (1 << 62) + 16))
header("offsets-backwards", offsets(16, 0))
header("offsets-too-wide", offsets(0, 1 << 40))
header("header-shape-negative", lambda t: t["gate_logit"].update(shape=[-2, -2]))
header("header-shape-overflows", lambda t: t["gate_logit"].update(shape=[2**62, 8]))
header("header-shape-differs", lambda t: t["gate_logit"].update(shape=[4, 1]))
header("header-integers", lambda t: t["gate_logit"].update(dtype="I32"))
header("header-unknown-dtype", lambda t: t["gate_logit"].update(dtype="F4096"))
header("header-tensor-missing", lambda t: t.update(other=t.pop("gate_logit")))
header("header-tensor-is-text", lambda t: t.update(gate_logit="text"))
header("header-metadata-is-a-list", lambda t: t.update(__metadata__=[1, 2]))
file_bytes("header-twice", twice)
file_bytes("header-of-2-to-the-63", lambda data: b"\xff" * 7 + b"\x7f" + data[8:])
file_bytes("header-of-0-bytes", lambda data: b"\0" * 8 + data[8:])
file_bytes("header-is-no-json", lambda data: data[:8] + b"\0" * (len(data) - 8))
file_bytes("weights-cut", lambda data: data[:-1])
file_bytes("weights-longer", lambda data: data + b"\0")
file_bytes("weights-empty", lambda data: b"")
file_bytes("weights-are-a-pickle", lambda data: pickle.dumps({}))
file_bytes("weights-nan", nan)
replaced(FUSERS, "weights-missing", WEIGHTS, lambda path, canary: None)
replaced(FUSERS, "weights-are-a-pipe", WEIGHTS, lambda path, canary: os.mkfifo(path))
replaced(FUSERS, "weights-are-elsewhere", WEIGHTS, link_to_a_copy)
replaced(FUSERS, "weights-are-a-device", WEIGHTS, link("/dev/zero"))
replaced(FUSERS, "config-missing", "config.json", lambda path, canary: None)
replaced(FUSERS, "config-elsewhere", "config.json", link_to_a_copy)
CONFIG = ("config.json",)
edited(FUSERS, "config-newer", CONFIG, lambda d: d.update(format_version=99))
edited(FUSERS, "config-unknown-key", CONFIG, lambda d: d.update(auto_map="evil.Fuser"))
edited(FUSERS, "config-hidden-of-10-to-the-30", CONFIG, lambda d: d.update(hidden_dim=10**30))
edited(FUSERS, "config-hidden-of-10-to-the-9", CONFIG, lambda d: d.update(hidden_dim=10**9))
edited(FUSERS, "config-depth-of-10-to-the-9", CONFIG, lambda d: d.update(depth=10**9))
edited(FUSERS, "config-layer-outside", CONFIG, lambda d: d.update(layer_map=[[0, 99]]))
edited(FUSERS, "config-10000-layers", CONFIG, lambda d: d.update(layer_map=[[0, 0]] * 10_000))
edited(FUSERS, "config-heads-of-2-to-the-62", CONFIG, lambda d: d["sharer"].update(kv_heads=2**62))
edited(FUSERS, "config-activation-is-code", CONFIG, lambda d: d.update(activation="__import__"))
edited(
    FUSERS,
    "config-metrics-are-text",
    CONFIG,
    lambda d: d["provenance"]["metrics"].update(x="\x1b[2J"),
)
text(FUSERS, "config-100000-deep", "config.json", '{"a":' * 100_000)
text(FUSERS, "config-twice", "config.json", '{"format_version": 1, "format_version": 99}')
text(FUSERS, "config-of-2-mb", "config.json", " " * (2 << 20) + "{}")
