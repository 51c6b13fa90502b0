"""Training between models in half precision: what stays float32, and what must not be promoted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from c2c_mlx import C2C, Fuser, LanguageModel, load_model
from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.project import inputs
from c2c_mlx.training import checkpoints
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import collate
from c2c_mlx.training.dataset import Dataset, Example, Source
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.start import measure_inputs, new_fuser
from c2c_mlx.training.trainer import Trainer

RECIPE = {"positions": "messages", "message_gate": True, "rotated_keys": False, "normalise": True}
HALVES = {"bfloat16": mx.bfloat16, "float16": mx.float16}
QUANTISED = {"group_size": 32, "bits": 4}
# Of a loss: bfloat16 keeps 8 bits of a number, float16 has 11; a few layers add up.
TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}


@pytest.fixture(params=HALVES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(
    name: str, receiver: LanguageModel, sharer: LanguageModel
) -> Iterator[tuple[LanguageModel, LanguageModel]]:
    models = load_model(receiver.path), load_model(sharer.path)
    for lm in models:
        lm.model.set_dtype(HALVES[name])
    yield models


def dataset(pair: tuple[LanguageModel, LanguageModel]) -> tuple[Dataset, list[Example]]:
    rows = [
        ChatRow(
            [
                {"role": "user", "content": f"say {i}" + " please" * (i % 4)},
                {"role": "assistant", "content": f"{i}" + " so" * (i % 3)},
            ],
            own=i % 4 == 0,
        )
        for i in range(11)
    ]
    data = Dataset([Source(rows, 1.0)], pair[0].tokenizer, pair[1].tokenizer, "span", 64)
    return data, [e for e in map(data.example, rows) if e is not None]


def trainer_of(
    pair: tuple[LanguageModel, LanguageModel], folder: Path, fields: Any = RECIPE, **options: Any
) -> Trainer:
    data, examples = dataset(pair)
    layers = tuple((i, i + 2) for i in range(1, 4))
    shapes = pair[0].shape, pair[1].shape
    config = TrainConfig(**{"iters": 6, "batch_size": 3, "warmup": 2, "save_every": 3} | options)
    wanted = FuserConfig(*shapes, layers, 16, 12, dropout=0.0, **fields)
    c2c = C2C(pair[0].model, pair[1].model, new_fuser(wanted, config.gates, 0))
    if wanted.normalise:
        measure_inputs(c2c, examples, 3)
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(c2c, data, examples[:4], config, folder)


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    flat: Any = tree_flatten(trainer.c2c.fuser.parameters())
    return {k: np.array(v) for k, v in flat}


def test_the_measured_deviation_is_right(
    name: str, pair: tuple[LanguageModel, LanguageModel], tmp_path: Path
) -> None:
    """Half precision stops counting at 256 or 2048, and its squares end at 65504 in float16."""
    for lm in pair:
        for layer in lm.model.layers:
            layer.self_attn.v_proj.weight = layer.self_attn.v_proj.weight * 2000
    trainer = trainer_of(pair, tmp_path)
    c2c, (_, examples) = trainer.c2c, dataset(pair)
    measure_inputs(c2c, examples * 30, len(examples) * 30)
    columns = []
    for e in examples:
        batch = collate([e], "messages")
        prefills = trainer.prefills(batch)
        assert prefills.own[0].keys.dtype == HALVES[name]
        part = kv.read(prefills.own, c2c.receiver_layers, batch.start, batch.stop)
        own = c2c.fuser_view(part, step_loss.first_position(batch))
        x = inputs(prefills.sharer, own, [(k, layer) for k in (0, 1) for layer in range(3)])
        x = np.array(x.astype(mx.float32)).astype(np.float64).reshape(6, -1, x.shape[-1])
        columns.append(x[:, batch.messages[0] >= 0])
    x = np.concatenate(columns, axis=1)
    assert np.square(x).max() > 65504
    found = [np.array(getattr(c2c.fuser, f"input_{n}")).reshape(6, -1) for n in ("mean", "scale")]
    deviation = x.std(axis=1)
    np.testing.assert_allclose(1 / found[1], deviation, rtol=1e-2)
    np.testing.assert_allclose(found[0], x.mean(axis=1), atol=1e-2 * deviation.max())


@pytest.mark.parametrize("fields", [RECIPE, {}], ids=["recipe", "paper"])
def test_only_the_fuser_is_float32(
    name: str, pair: tuple[LanguageModel, LanguageModel], tmp_path: Path, fields: Any
) -> None:
    trainer = trainer_of(pair, tmp_path, fields)
    c2c, (_, examples) = trainer.c2c, dataset(pair)
    batch = collate(examples[:4], c2c.fuser.config.positions)
    prefills = trainer.prefills(batch)
    c2c.fuser.train()
    fused, _ = step_loss.fuse(c2c, prefills.own, prefills.sharer, batch)
    assert {x.dtype for c in fused for x in c.keys_and_values()} == {HALVES[name]}
    assert {p.dtype for p in trainer.c2c.fuser.trainable_parameters()["mlp1"].values()} == {
        mx.float32
    }
    _, gradient = trainer._loss_and_grad(prefills, batch, 0.1)
    flat: Any = tree_flatten(gradient)
    for key, g in flat:
        assert g.dtype == mx.float32 and mx.isfinite(g).all().item(), key
    logits = c2c.receiver(mx.array(batch.inputs), cache=[c.copy() for c in fused])
    assert logits.dtype == HALVES[name]
    x = np.array(logits.astype(mx.float32)).astype(np.float64)  # [B, R, V]
    right = np.take_along_axis(x, batch.targets[..., None], axis=2)[..., 0]
    exact = (np.log(np.exp(x).sum(axis=2)) - right)[batch.mask].sum()
    loss = step_loss.response_loss(trainer.prefills.receiver, fused, batch, prefills.state)
    assert loss.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kept", [False, True], ids=["computed", "kept"])
def test_a_half_precision_run_learns_and_resumes_exactly(
    name: str, pair: tuple[LanguageModel, LanguageModel], tmp_path: Path, kept: bool
) -> None:
    options = {"prefill_cache": str(tmp_path / "kept")} if kept else {}
    whole = trainer_of(pair, tmp_path / "whole", **options)
    reports: list[dict[str, float]] = []
    whole.run(reports.append)
    assert np.isfinite([v for r in reports for v in r.values()]).all()
    assert reports[-1]["valid_loss"] < reports[-1]["valid_receiver_loss"]
    resumed = trainer_of(pair, tmp_path / "resumed", **options)
    resumed.resume(checkpoints.all_of(tmp_path / "whole")[0])
    assert resumed.step == 3
    resumed.run()
    ours, theirs = weights(resumed), weights(whole)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    state = mx.load(str(checkpoints.all_of(tmp_path / "whole")[0] / "state.safetensors"))
    assert isinstance(state, dict)
    assert mx.float16 not in {x.dtype for x in state.values()}  # rounded, it would not be exact
    saved = Fuser.load(tmp_path / "whole")
    for key, value in tree_flatten(saved.parameters()):
        np.testing.assert_allclose(np.array(value), theirs[key], rtol=1e-3, atol=1e-6)


def test_half_precision_models_give_the_losses_of_float32(
    name: str,
    pair: tuple[LanguageModel, LanguageModel],
    receiver: LanguageModel,
    sharer: LanguageModel,
    tmp_path: Path,
) -> None:
    half, full = trainer_of(pair, tmp_path / "a"), trainer_of((receiver, sharer), tmp_path / "b")
    half.c2c.fuser.update(full.c2c.fuser.parameters())
    expected = full.evaluate()
    for key, value in half.evaluate().items():
        assert value == pytest.approx(expected[key], rel=TOLERANCE[name])


def test_quantised_models_train_too(
    name: str, pair: tuple[LanguageModel, LanguageModel], tmp_path: Path
) -> None:
    for lm in pair:
        nn.quantize(
            lm.model,
            **QUANTISED,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % QUANTISED["group_size"] == 0
            ),
        )
    trainer = trainer_of(pair, tmp_path)
    (_, examples), before = dataset(pair), weights(trainer)
    losses = [trainer.train_step([examples]) for _ in range(6)]
    assert losses[-1] < losses[0]
    changed = weights(trainer)
    assert not np.array_equal(changed["proj_out.weight"], before["proj_out.weight"])
    assert trainer.prefills(collate(examples, "messages")).own[0].keys.dtype == HALVES[name]
    plain = trainer_of((load_model(pair[0].path), load_model(pair[1].path)), tmp_path / "plain")
    assert plain.settings["weights of the receiver"] != trainer.settings["weights of the receiver"]
