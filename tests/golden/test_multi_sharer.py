"""Two sharers for one receiver: in sequence, or in parallel with their changes summed."""

from __future__ import annotations

from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from goldens import DATA, arrays, assert_close, document, model
from mlx_lm.generate import generate_step

from c2c_mlx import C2C, Fuser
from c2c_mlx.fusers.published import convert
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.text.alignment import TokenAlignment

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
    links = [C2C(receiver, sharer, fuser) for sharer, fuser in taking_part]

    prefix = FusedCache(*links, order=run["mode"])
    same = np.arange(len(ids), dtype=np.int32)
    cache = prefix.extend([TokenAlignment(ids, ids, same, 0 * same)] * len(links))

    fused = kv.read(cache, kv.attention_layers(cache), 0, len(ids) - 1)
    for kind, found in zip(("key", "value"), fused, strict=True):
        for layer, ours in enumerate(found):
            assert_close(ours, golden[f"{name}.fused.{layer}.{kind}"], f"layer {layer} {kind}")
    steps = generate_step(mx.array(ids[-1:]), receiver, max_tokens=12, prompt_cache=cache)
    assert [token for token, _ in steps] == run["generated_ids"]
