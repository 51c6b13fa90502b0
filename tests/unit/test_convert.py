"""Published checkpoints are converted, or refused in one line with nothing left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from torch_files import (
    MODEL,
    state,
    write_checkpoint,
    write_state,
    write_zip,
)

from c2c_mlx import Fuser
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers.published import convert, reference_name
from c2c_mlx.fusers.torch_file import TorchFile
from c2c_mlx.fusion.fuser import parameters


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def refused(source: Path) -> str:
    """The line that a conversion is refused with; nothing may stand at the destination."""
    target = source.parent / "target"
    with pytest.raises(C2CError) as e:
        convert(source, target)
    assert not target.exists()
    assert "\n" not in str(e.value)
    assert str(source) in str(e.value)
    return str(e.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_every_weight_lands_in_its_slice(source: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    config = convert(source, tmp_path / "fuser", lambda done, total: steps.append((done, total)))
    fuser = Fuser.load(tmp_path / "fuser")
    assert fuser.config == config
    assert config.layer_map == ((0, 1), (1, 2))
    assert (config.receiver.name, config.receiver.layers) == ("org/receiver", 2)
    assert (config.sharer.name, config.sharer.layers) == ("org/sharer", 3)
    assert steps == [(1, 2), (2, 2)]
    weights = parameters(fuser)
    for layer, number in enumerate((1, 0)):
        projector = state(number)
        for row, kind in enumerate(("key", "value")):
            for name, stacked in weights.items():
                golden = projector[reference_name(name, kind)]
                assert np.array_equal(np.array(stacked[row, layer]), golden), name


def test_alignment_and_positions(source: Path, tmp_path: Path) -> None:
    changes = {"is_do_alignment": True, "alignment_strategy": "longest"}
    edit(source / "config.json", lambda d: d["model"].update(changes))
    config = convert(source, tmp_path / "fuser")
    assert (config.alignment, config.positions) == ("longest", "messages")


def test_defaults_of_arguments(source: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        path = source / f"final/projector_{number}.json"
        edit(path, lambda d: [d["init_args"].pop(name) for name in ("num_layers", "dropout")])
        edit(path, lambda d: d["init_args"].update(anneal_steps=9, dtype={"__type__": "x"}))
    config = convert(source, tmp_path / "fuser")
    assert (config.depth, config.dropout) == (3, 0.1)


def test_half_precision_is_kept(source: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        write_state(source / f"final/projector_{number}.pt", state(number, "<f2"))
    convert(source, tmp_path / "fuser")
    stored = mx.load(str(tmp_path / "fuser/fuser.safetensors"))
    assert {w.dtype for w in stored.values()} == {mx.float16}


def test_the_temperature_may_be_missing(source: Path, tmp_path: Path) -> None:
    tensors = state(0)
    del tensors["gate_temperature"]
    write_state(source / "final/projector_0.pt", tensors)
    convert(source, tmp_path / "fuser")


@pytest.mark.parametrize("leftover", [False, True])
def test_an_empty_destination_is_fine(source: Path, tmp_path: Path, leftover: bool) -> None:
    (tmp_path / "fuser").mkdir()
    if leftover:  # of a conversion that was killed
        (tmp_path / "fuser/.saving").mkdir()
        (tmp_path / "fuser/.saving/fuser.safetensors").write_bytes(b"half")
    convert(source, tmp_path / "fuser")
    assert len(list((tmp_path / "fuser").iterdir())) == 3


def test_a_used_destination_is_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "fuser")
    (tmp_path / "file").write_text("mine")
    for name in ("fuser", "file"):
        with pytest.raises(C2CError, match="already exists"):
            convert(source, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_no_source(tmp_path: Path) -> None:
    assert "no such checkpoint folder" in refused(tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "final/projector_config.json",
        "final/projector_0.json",
        "final/projector_1.pt",
    ],
)
def test_a_missing_file_is_named(source: Path, name: str) -> None:
    (source / name).unlink()
    assert name in refused(source)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda d: d.pop("model"), "has no 'model'"),
        (
            "config.json",
            lambda d: d["model"].update(is_do_alignment=True, alignment_strategy="best"),
            "'alignment' must be one of",
        ),
        ("final/projector_config.json", lambda d: d["0"]["1"].clear(), "names no layer"),
        ("final/projector_config.json", lambda d: d["0"].update({"2": {}}), "expected"),
        ("final/projector_config.json", lambda d: d["0"]["1"].update({"x": [[0, 0]]}), "expected"),
        ("final/projector_config.json", lambda d: d["0"]["1"].update({"2": []}), "expected"),
        (
            "final/projector_config.json",
            lambda d: d["0"]["1"].update({"2": [[0.5, 0]]}),
            "expected",
        ),
        ("final/projector_config.json", lambda d: d["0"]["1"].update({"2": [[0, 7]]}), "_7.json"),
        ("final/projector_config.json", lambda d: d["0"]["1"].update({"2": [[-1, 0]]}), "from 0"),
        ("final/projector_config.json", lambda d: d["0"]["1"].update({"9999": [[0, 0]]}), "from 0"),
        ("final/projector_0.json", lambda d: d.update({"class": "Other"}), "C2CProjector"),
        ("final/projector_0.json", lambda d: d.pop("init_args"), "init_args"),
        ("final/projector_0.json", lambda d: d["init_args"].pop("source_dim"), "source_dim"),
        (
            "final/projector_0.json",
            lambda d: d["init_args"].update(hidden_dim=7),
            "different shapes",
        ),
    ],
)
def test_wrong_descriptions(
    source: Path, name: str, change: Callable[[Any], Any], words: str
) -> None:
    edit(source / name, change)
    assert words in refused(source)


@pytest.mark.parametrize("value", ["8", 8.5, 0, -1, 10**30, [8], {}])
def test_wrong_sizes(source: Path, value: Any) -> None:
    for number in (0, 1):
        path = source / f"final/projector_{number}.json"
        edit(path, lambda d: d["init_args"].update(hidden_dim=value))
    refused(source)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("value_in.bias"), "'value_in.bias' is missing"),
        (lambda t: t.update(extra=np.zeros(1, "<f4")), "unexpected tensor 'extra'"),
        (lambda t: t.update({"key_in.bias": np.zeros(7, "<f4")}), "(6,), not (7,)"),
        (lambda t: t.update({"key_in.bias": np.zeros((6, 1), "<f4")}), "(6,), not (6, 1)"),
        (lambda t: t.update({"key_in.bias": np.zeros(6, "<f2")}), "is F32, but F16 elsewhere"),
        (lambda t: t.update({"key_in.bias": np.zeros(6, "<f8")}), "torch.DoubleStorage"),
        (lambda t: t.update({"key_in.bias": np.full(6, np.nan, "<f4")}), "NaN or infinite"),
        (lambda t: t.update({"key_in.bias": np.full(6, np.inf, "<f4")}), "NaN or infinite"),
    ],
)
def test_wrong_tensors(
    source: Path, change: Callable[[dict[str, np.ndarray]], Any], words: str
) -> None:
    tensors = state(0)
    change(tensors)
    write_state(source / "final/projector_0.pt", tensors)
    message = refused(source)
    assert words in message
    assert "projector_0.pt" in message or "projector_1.pt" in message


def test_newer_pickle_protocols(tmp_path: Path) -> None:
    """Torch writes protocol 2; whoever re-saved a state dict may have used another."""
    pickled = pickle.dumps({}, protocol=4)
    write_zip(tmp_path / "x.pt", pickled, {})
    assert TorchFile(tmp_path / "x.pt").tensors == {}


def test_interrupted(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "fuser", interrupt)
    assert not (tmp_path / "fuser").exists()


def test_model_names_may_be_anything(source: Path, tmp_path: Path) -> None:
    edit(source / "config.json", lambda d: d.update(model=MODEL | {"teacher_model": {"a": 1}}))
    assert convert(source, tmp_path / "fuser").sharer.name == "unknown sharer"
