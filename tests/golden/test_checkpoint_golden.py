"""A checkpoint in the published layout, converted by ours, against the reference's outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from goldens import DATA, KINDS, TOLERANCE, arrays, document, error, stacked

from c2c_mlx import Fuser, device
from c2c_mlx.doctor.check import tolerance
from c2c_mlx.fusers.published import convert

LAYERS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "fuser"
    convert(DATA / "checkpoint", folder)
    return folder


def test_description(folder: Path) -> None:
    config = Fuser.load(folder).config
    assert config.layer_map == ((0, 2), (1, 3), (2, 4), (3, 5))
    assert (config.receiver.layers, config.receiver.kv_heads, config.receiver.head_dim) == (
        4,
        2,
        16,
    )
    assert (config.sharer.layers, config.sharer.kv_heads, config.sharer.head_dim) == (6, 3, 8)
    assert (config.hidden_dim, config.intermediate_dim, config.depth) == (48, 64, 3)
    assert (config.alignment, config.positions) == ("same", "all")
    assert not config.fuse_response
    assert config.receiver.tokenizer == config.sharer.tokenizer == ""


def test_a_checkpoint_for_fused_responses_stays_one(tmp_path: Path) -> None:
    source = shutil.copytree(DATA / "checkpoint", tmp_path / "source")
    description = document("checkpoint/config.json")
    description["model"]["include_response"] = True
    (source / "config.json").write_text(json.dumps(description))
    convert(source, tmp_path / "fuser")
    assert Fuser.load(tmp_path / "fuser").config.fuse_response


def test_gates_and_dtype(folder: Path) -> None:
    described = document("checkpoint_io/meta.json")["projectors"]
    fuser = Fuser.load(folder)
    for row, kind in enumerate(KINDS):
        assert fuser.gates[row].tolist() == [p[f"{kind}_open"] for p in described]
        assert fuser.gate_logit[row].tolist() == [p[f"{kind}_gate_logit"] for p in described]
    stored = mx.load(str(folder / "fuser.safetensors"))
    assert {w.dtype for w in stored.values()} == {mx.bfloat16}


def test_outputs(folder: Path) -> None:
    io = arrays("checkpoint_io/io.safetensors")
    fused = Fuser.load(folder)(
        sharer=stacked(io, "{layer}.source_{kind}", LAYERS),
        receiver=stacked(io, "{layer}.target_{kind}", LAYERS),
    )
    # Its weights are bfloat16, and a GPU computes with them as they are.
    allowed = TOLERANCE if device.is_dense() else tolerance(mx.bfloat16)
    for ours, golden in zip(fused, stacked(io, "{layer}.output_{kind}.fp32", LAYERS), strict=True):
        assert error(ours, golden) <= allowed


def test_projector_numbers_need_not_be_layers(folder: Path, tmp_path: Path) -> None:
    """The same fuser with its files in the opposite order."""
    source = shutil.copytree(DATA / "checkpoint", tmp_path / "source")
    for i in LAYERS:
        for suffix in ("pt", "json"):
            shutil.copy(
                DATA / f"checkpoint/final/projector_{i}.{suffix}",
                source / f"final/projector_{3 - i}.{suffix}",
            )
    mapping = {"0": {"1": {str(i): [[i + 2, 3 - i]] for i in LAYERS}}}
    (source / "final/projector_config.json").write_text(json.dumps(mapping))
    convert(source, tmp_path / "fuser")
    weights = "fuser.safetensors"
    assert (tmp_path / "fuser" / weights).read_bytes() == (folder / weights).read_bytes()
