"""Coverage-guided fuzzing of the readers; no part of the tests.

    pip install atheris
    python tests/safety/fuzz.py pickle|archive|json|fuser -max_total_time=600 -timeout=2

An input is a finding if it makes a reader do anything but accept or raise C2CError. libFuzzer
writes it to `crash-...` and says what happened. Seeds are the sound files and the whole corpus.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1] / "unit")]

with atheris.instrument_imports(include=["c2c_mlx", "zipfile", "pickletools", "json"]):
    import c2c_mlx.blas  # noqa: F401

    from c2c_mlx.errors import C2CError
    from c2c_mlx.fusers import disk, torch_file
    from c2c_mlx.fusers.published import check, convert

from corpus import CHECKPOINTS, FUSERS, MAP, OPTIONS, PT, WEIGHTS  # noqa: E402
from torch_files import write_checkpoint  # noqa: E402

SCRATCH = Path(tempfile.mkdtemp(prefix="c2c-fuzz-"))
CHECKPOINT, FUSER = SCRATCH / "checkpoint", SCRATCH / "fuser"
SEPARATOR = b"\n%%\n"  # between the files of one input


def fuzz_pickle(data: bytes) -> None:
    """The pickle of a projector."""
    try:
        torch_file._interpret(data)
    except torch_file._Refused:
        pass


def fuzz_archive(data: bytes) -> None:
    """A projector's file; what is accepted must be readable to the last tensor."""
    path = SCRATCH / "projector_0.pt"
    path.write_bytes(data)
    try:
        file = torch_file.TorchFile(path)
        for name, tensor in file.tensors.items():
            assert len(file.read(name)) == tensor.size
    except C2CError:
        pass


def fuzz_json(data: bytes) -> None:
    """The three kinds of descriptions of a checkpoint."""
    for name, content in zip(("config.json", MAP, OPTIONS), data.split(SEPARATOR), strict=False):
        (CHECKPOINT / name).write_bytes(content)
    try:
        check(CHECKPOINT)
    except C2CError:
        pass


def fuzz_fuser(data: bytes) -> None:
    """A fuser folder: description, then weights."""
    config, _, weights = data.partition(SEPARATOR)
    (FUSER / "config.json").write_bytes(config)
    (FUSER / WEIGHTS).write_bytes(weights)
    try:
        disk.load(FUSER)
    except C2CError:
        pass


def seeds(kind: str) -> Iterator[bytes]:
    """The sound input, then every damaged one."""
    table = FUSERS if kind == "fuser" else CHECKPOINTS
    for damage in [lambda folder, canary: None, *table.values()]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "folder"
            shutil.copytree(FUSER if kind == "fuser" else CHECKPOINT, folder)
            damage(folder, Path(scratch) / "canary")
            names = {
                "archive": (PT,),
                "json": ("config.json", MAP, OPTIONS),
                "fuser": ("config.json", WEIGHTS),
            }.get(kind, (PT,))
            if not all((folder / name).is_file() for name in names):
                continue
            parts = [(folder / name).read_bytes()[: 1 << 16] for name in names]
            if kind == "pickle":
                start = parts[0].find(b"\x80\x02")
                parts = [parts[0][start : start + 8192]]
            yield SEPARATOR.join(parts)


def main() -> None:
    kind = sys.argv.pop(1)
    target: Callable[[bytes], None] = globals()[f"fuzz_{kind}"]
    write_checkpoint(CHECKPOINT)
    convert(CHECKPOINT, FUSER)
    corpus = SCRATCH / "seeds"
    corpus.mkdir()
    for number, seed in enumerate(seeds(kind)):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
