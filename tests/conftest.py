"""Tiny real models that the tests run for real: a Qwen3, a Llama, and a sliding-window Gemma 3."""

from __future__ import annotations

import os

# Read by MLX at its first operation: where it rounds products of float32 to 10 bits (M5, CUDA), no
# tolerance of float32 would hold. MLX's own tests say so, too.
os.environ["MLX_ENABLE_TF32"] = "0"

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3_text

from c2c_mlx import C2C, Fuser, LanguageModel, device, load_model
from c2c_mlx.config import FuserConfig, Pair
from c2c_mlx.fusion import kv

TINY = Path(__file__).parent / "golden" / "data" / "e2e" / "qwen3_llama"
MakeFuser = Callable[..., Fuser]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("metal") and mx.default_device().type != mx.gpu:
        pytest.skip("needs a GPU, and MLX computes on the CPU here")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the two tiny models; in a rehearsal they are bfloat16, as real ones are."""
    if device.kind() == "cpu":
        return TINY
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("receiver", "sharer"):
        shutil.copytree(TINY / name, folder / name, copy_function=shutil.copy)
        file = folder / name / "model.safetensors"
        weights = mx.load(str(TINY / name / file.name))
        mx.save_safetensors(
            str(file), {n: x.astype(mx.bfloat16) for n, x in weights.items()}, {"format": "mlx"}
        )
    return folder


@pytest.fixture(scope="session")
def receiver(tiny: Path) -> LanguageModel:
    """4 layers, 2 KV heads x 16, 512 ids."""
    return load_model(tiny / "receiver")


@pytest.fixture(scope="session")
def sharer(tiny: Path) -> LanguageModel:
    """6 layers, 3 KV heads x 8, 512 ids."""
    return load_model(tiny / "sharer")


@pytest.fixture(scope="session")
def gemma() -> nn.Module:
    """3 layers, 1 KV head x 16, 512 ids; layers 0 and 1 see 8 positions."""
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        vocab_size=512,
        sliding_window=8,
        sliding_window_pattern=3,
    )
    mx.random.seed(3)
    model = gemma3_text.Model(args)
    model.set_dtype(device.dtype_of(mx.bfloat16))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def make_fuser() -> MakeFuser:
    """Makes a small random fuser between two models, with every gate at `gate`."""

    def make(receiver: nn.Module, sharer: nn.Module, gate: float = 1.0, **options: Any) -> Fuser:
        r, s = kv.model_shape(receiver, "receiver"), kv.model_shape(sharer, "sharer")
        layer_map = [(i, min(i + 1, s.layers - 1)) for i in range(1, r.layers)]
        options = {
            "layer_map": tuple(layer_map),
            "hidden_dim": 24,
            "intermediate_dim": 20,
        } | options
        mx.random.seed(1)
        fuser = Fuser(FuserConfig(r, s, **options))
        fuser.gate_logit = mx.full(fuser.gate_logit.shape, gate)
        mx.eval(fuser.parameters())
        fuser.eval()
        return fuser

    return make


@pytest.fixture(scope="session")
def tiny_pair(
    receiver: LanguageModel, sharer: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """The two by their folders, and a random fuser with every gate open."""
    mx.random.seed(1)
    layer_map = tuple((i, i + 2) for i in range(4))
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layer_map, 24, 20))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    folder = tmp_path_factory.mktemp("fuser")
    fuser.save(folder)
    return Pair(str(receiver.path), (str(sharer.path),), (str(folder),))


@pytest.fixture(params=["qwen3", "gemma3"])
def make_c2c(
    request: pytest.FixtureRequest,
    receiver: LanguageModel,
    sharer: LanguageModel,
    gemma: nn.Module,
    make_fuser: Callable[..., Fuser],
) -> Callable[..., C2C]:
    """C2C from the tiny Llama to the tiny Qwen3 or the tiny Gemma 3."""
    answering = receiver.model if request.param == "qwen3" else gemma

    def make(gate: float = 1.0, **options: Any) -> C2C:
        fuser = make_fuser(answering, sharer.model, gate, **options)
        return C2C(answering, sharer.model, fuser)

    return make
