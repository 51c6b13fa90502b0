"""Two sharers for one receiver: in sequence, or in parallel with their changes summed."""

from __future__ import annotations

from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import pytest
from goldens import DATA, arrays, assert_close, document, model
from mlx_lm.generate import generate_step

from c2c_mlx import Fuser, kv
from c2c_mlx.convert import convert

CASE = "extras/multi_sharer"
META = document(f"{CASE}/meta.json")


@pytest.fixture(scope="module")
def receiver() -> nn.Module:
    return model(META["receiver"])


@pytest.fixture(scope="module")
def sharers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[nn.Module, Fuser]]:
    root = tmp_path_factory.mktemp("multi")

    def load(name: str) -> Fuser:
        folder = root / Path(name).name
        convert(DATA / name, folder)
        return Fuser.load(folder)

    pairs = zip(META["sharers"], META["fusers"], strict=True)
    return [(model(sharer), load(fuser)) for sharer, fuser in pairs]


@pytest.mark.parametrize("name", META["runs"])
def test_run(receiver: nn.Module, sharers: list[tuple[nn.Module, Fuser]], name: str) -> None:
    run, golden = META["runs"][name], arrays(f"{CASE}/io.safetensors")
    ids = META["input_ids"]
    taking_part = [s for bit, s in enumerate(sharers) if run["sharer_mask"] >> bit & 1]

    cache = kv.make_cache(receiver)
    receiver(mx.array([ids[:-1]]), cache=cache)
    layers = kv.attention_layers(cache)
    own = kv.read(cache, layers, 0, len(ids) - 1)
    fused = tuple(own)
    for sharer, fuser in taking_part:
        before = fused if run["mode"] == "sequential" else own
        after = fuser(sharer=read(sharer, fuser, ids[:-1]), receiver=before)
        fused = tuple(f + a - b for f, a, b in zip(fused, after, before, strict=True))

    for kind, found in zip(("key", "value"), fused, strict=True):
        for layer, ours in zip(layers, found, strict=True):
            assert_close(ours, golden[f"{name}.fused.{layer}.{kind}"], f"layer {layer} {kind}")
    kv.trim(cache, 0)
    for layer, keys, values in zip(layers, *fused, strict=True):
        kv.append(cache, layer, keys, values)
    steps = generate_step(mx.array(ids[-1:]), receiver, max_tokens=12, prompt_cache=cache)
    assert [token for token, _ in steps] == run["generated_ids"]


def read(sharer: nn.Module, fuser: Fuser, ids: list[int]) -> tuple[mx.array, mx.array]:
    cache = kv.make_cache(sharer)
    sharer(mx.array([ids]), cache=cache)
    return kv.read(cache, [s for _, s in fuser.config.layer_map], 0, len(ids))
