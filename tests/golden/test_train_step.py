"""Loss and every gradient of one training step, against the reference implementation.

The reference pads between a prompt and its response, as we do between prefix and rest; its loss is
the mean over the response's tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from goldens import DATA, KINDS, arrays, document, error, model
from mlx.utils import tree_flatten

from c2c_mlx import C2C, Fuser
from c2c_mlx.fusers.published import convert, reference_name
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch, collate
from c2c_mlx.training.dataset import Example
from c2c_mlx.training.sections import Sections

CASE, MODELS = "extras/train_step/qwen3_llama", "e2e/qwen3_llama"
TOLERANCE = 1e-4
LAYERS = range(4)
runs = pytest.mark.parametrize("run", ["single", "padded_batch"])


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    return document(f"{CASE}/meta.json")


@pytest.fixture(scope="module")
def golden() -> dict[str, mx.array]:
    return arrays(f"{CASE}/io.safetensors")


@pytest.fixture
def c2c(tmp_path_factory: pytest.TempPathFactory) -> C2C:
    folder = tmp_path_factory.mktemp("train_step") / "fuser"
    convert(DATA / MODELS / "fuser", folder)
    return C2C(model(f"{MODELS}/receiver"), model(f"{MODELS}/sharer"), Fuser.load(folder))


def example(sample: dict[str, Any]) -> Example:
    ids, n = sample["input_ids"], sample["instruction_length"]
    assert sample["labels"] == [-100] * n + ids[n:]
    index = np.arange(n, dtype=np.int32)
    return Example(ids[:n], ids[:n], index, np.zeros(n, np.int32), ids[n:])


def batch_of(meta: dict[str, Any], run: str) -> Batch:
    samples = meta["samples"][:1] if run == "single" else meta["samples"]
    return collate([example(s) for s in samples], "all")


def loss_and_gradients(c2c: C2C, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
    own = step_loss.prefill(c2c.receiver, batch.receiver, {})
    cache = step_loss.prefill(c2c.sharer, batch.sharer, {})
    sharer = step_loss.read_sharer(c2c, cache, batch)

    def loss() -> mx.array:
        fused, _ = step_loss.fuse(c2c, own, sharer, batch)
        return step_loss.response_loss(Sections(c2c.receiver), fused, batch) / batch.tokens

    value, gradients = nn.value_and_grad(c2c.fuser, loss)()
    return value, tree_flatten(gradients, destination={})


def assert_gradients(
    found: dict[str, mx.array], golden: dict[str, mx.array], prefix: str, left_out: list[str]
) -> None:
    compared = set()
    for name, gradient in found.items():
        for row, kind in enumerate(KINDS):
            theirs = reference_name(name, kind)
            for layer in LAYERS:
                key = f"{prefix}.grad.{layer}.{theirs}"
                if theirs in left_out:
                    assert key not in golden
                    assert mx.abs(gradient[row, layer]).max().item() == 0
                    continue
                compared.add(key)
                deviation = error(gradient[row, layer], golden[key])
                assert deviation <= TOLERANCE, f"{key}: relative error {deviation:.1e}"
    assert compared == {key for key in golden if key.startswith(f"{prefix}.grad.")}


@runs
def test_hard_gates(c2c: C2C, meta: dict[str, Any], golden: dict[str, mx.array], run: str) -> None:
    expected = meta["runs"][f"{run}.eval"]
    c2c.fuser.eval()
    loss, gradients = loss_and_gradients(c2c, batch_of(meta, run))
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert_gradients(gradients, golden, f"{run}.eval", expected["no_grad_params"])


@runs
def test_soft_gates_under_the_reference_noise(
    c2c: C2C,
    meta: dict[str, Any],
    golden: dict[str, mx.array],
    run: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, batch = meta["runs"][f"{run}.train"], batch_of(meta, run)
    noise = noise_of(golden, f"{run}.train", batch)
    monkeypatch.setattr(mx.random, "uniform", lambda shape: noise.reshape(shape))
    c2c.fuser.train()
    c2c.fuser.config = replace(c2c.fuser.config, dropout=expected["dropout"])  # as it was run
    c2c.fuser.temperature = expected["gate_temperature"]
    loss, gradients = loss_and_gradients(c2c, batch)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert_gradients(gradients, golden, f"{run}.train", [])


def noise_of(golden: dict[str, mx.array], prefix: str, batch: Batch) -> mx.array:
    """[2 * L, B, H, N, 1]: the reference's uniforms, moved from its right padding to ours."""
    name = prefix + ".section0.projector{}.u{}"
    theirs = mx.stack([golden[name.format(layer, u)] for u in (1, 2) for layer in LAYERS])
    ours = np.full(theirs.shape, 0.5, np.float32)
    for row, padding in enumerate(batch.receiver.padding):
        n = theirs.shape[3] - padding
        columns = batch.receiver.columns(np.arange(n), row)
        ours[:, row][:, :, columns] = np.array(theirs)[:, row, :, :n]
    return mx.array(ours)
