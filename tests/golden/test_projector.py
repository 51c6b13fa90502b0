"""One layer's fuser against the reference's, at inference and in training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np
import pytest
from goldens import DATA, KINDS, arrays, assert_close, document, error, fuser_of, pair
from mlx.utils import tree_flatten, tree_map

import c2c_mlx.fusion.project
from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.fusers.published import convert, reference_name
from c2c_mlx.fusion.fuser import Fuser, parameters
from c2c_mlx.fusion.project import project

CASES = ("p0", "p1", "p2")


def load(case: str) -> Fuser:
    args: dict[str, Any] = document(f"projector/{case}/config.json")
    config = FuserConfig(
        ModelShape("receiver", 1, args["target_num_heads"], args["target_dim"]),
        ModelShape("sharer", 1, args["source_num_heads"], args["source_dim"]),
        ((0, 0),),
        hidden_dim=args["hidden_dim"],
        intermediate_dim=args["intermediate_dim"],
        depth=args["num_layers"],
        dropout=args["dropout"],
    )
    return fuser_of(config, arrays(f"projector/{case}/projector.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_inference(case: str) -> None:
    fuser, io = load(case), arrays(f"projector/{case}/io.safetensors")
    sharer, receiver = pair(io, "source_{}"), pair(io, "target_{}")
    assert fuser.gates[:, 0].tolist() == [bool(io[f"{kind}_gate"].item()) for kind in KINDS]
    fused = fuser(sharer=sharer, receiver=receiver)
    for kind, ours in zip(KINDS, fused, strict=True):
        assert_close(ours[0], io[f"output_{kind}"], kind)
    change = fuser.change(sharer=sharer, receiver=receiver)
    for (kind, _), weight in zip(change.slices, change.weight, strict=True):
        assert_close(weight, io[f"last_norm_{KINDS[kind]}_scalar"], KINDS[kind])


@pytest.mark.parametrize("case", CASES)
def test_projection_and_dynamic_weight_of_closed_slices_too(case: str) -> None:
    fuser, io = load(case), arrays(f"projector/{case}/io.safetensors")
    sharer, receiver, both = pair(io, "source_{}"), pair(io, "target_{}"), [(0, 0), (1, 0)]
    params = tree_map(lambda p: p[:, 0], fuser.parameters())
    weighted, weight, _ = project(params, None, sharer, receiver, both, fuser.config)
    heads = receiver[0].shape[2]
    for row, kind in enumerate(KINDS):
        dynamic = mx.sigmoid(io[f"mid.{kind}_scalar_head"]).swapaxes(1, 2)[..., None]
        projection = mx.unflatten(io[f"mid.{kind}_proj_out"], 2, (heads, -1)).swapaxes(1, 2)
        assert_close(weight[row], dynamic, kind)
        assert_close(weighted[row], dynamic * projection, kind)


@pytest.mark.parametrize("case", CASES)
def test_the_file_that_the_reference_wrote(case: str, tmp_path: Path) -> None:
    """Its PyTorch file, read by ours, has what its safetensors twin has."""
    source = tmp_path / "checkpoint" / "final"
    source.mkdir(parents=True)
    for name in ("projector.pt", "projector.json"):
        numbered = name.replace(".", "_0.")
        shutil.copy(DATA / "projector" / case / name, source / numbered)
    (source / "projector_config.json").write_text('{"0": {"1": {"0": [[0, 0]]}}}')
    (source.parent / "config.json").write_text('{"model": {}}')
    convert(source.parent, tmp_path / "fuser")
    found, wanted = Fuser.load(tmp_path / "fuser"), load(case)
    assert found.config.receiver.width == wanted.config.receiver.width
    for name, weight in parameters(wanted).items():
        assert mx.array_equal(parameters(found)[name], weight), name


def test_tanh_gelu_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fuser, io = load("p1"), arrays("projector/p1/io.safetensors")
    monkeypatch.setitem(
        c2c_mlx.fusion.project.ACTIVATIONS,
        "gelu",
        lambda x: 0.5 * x * (1 + mx.tanh(np.sqrt(2 / np.pi).item() * (x + 0.044715 * x**3))),
    )
    fused = fuser(sharer=pair(io, "source_{}"), receiver=pair(io, "target_{}"))
    assert max(error(fused[i][0], io[f"output_{kind}"]) for i, kind in enumerate(KINDS)) > 1e-5


def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, loss and every gradient under the reference's own Gumbel noise."""
    fuser, golden = load("p2"), arrays("projector/p2/train_io.safetensors")
    io = arrays("projector/p2/io.safetensors")
    fuser.train()
    fuser.temperature = golden["gate_temperature"].item()
    noise = mx.stack([golden["u1"], golden["u2"]])
    monkeypatch.setattr(mx.random, "uniform", lambda shape: noise.reshape(shape))

    def loss(params: dict[str, Any], sharer: Any, receiver: Any) -> tuple[mx.array, Any]:
        fuser.update(params)
        fused = fuser(sharer=sharer, receiver=receiver)
        return sum((x**2).sum() for x in fused), fused

    arguments = fuser.trainable_parameters(), pair(io, "source_{}"), pair(io, "target_{}")
    (value, fused), (grads, *input_grads) = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)

    assert_close(value, golden["loss"], "loss")
    ours = tree_flatten(grads, destination={})
    for row, kind in enumerate(KINDS):
        assert_close(fused[row][0], golden[f"output_{kind}"], kind)
        for side, grad in zip(("source", "target"), input_grads, strict=True):
            assert_close(grad[row][0], golden[f"grad_input.{side}_{kind}"], f"{side} {kind}")
        for name, grad in ours.items():
            theirs = reference_name(name, kind)
            assert_close(grad[row, 0], golden[f"grad.{theirs}"], theirs)
