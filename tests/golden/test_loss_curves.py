"""Short runs lose what they lost when they were recorded, step by step.

A change that makes training faster must not change its numbers. `data/loss_curves.txt` was written
by `python tests/golden/test_loss_curves.py` before the first of them, the recipe's once more when
labels took the place of soft message gates; float32 on a CPU. Another CPU rounds otherwise, by up
to 3e-6 of a loss in these eight steps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import numpy as np
import pytest
from goldens import DATA

from c2c_mlx import C2C, device, load_model
from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.training.dataset import Dataset, Source
from c2c_mlx.training.files import ChatRow
from c2c_mlx.training.start import measure_inputs, new_fuser
from c2c_mlx.training.trainer import Trainer

CURVES = DATA / "loss_curves.txt"
STEPS, ROWS = 8, 5
RECIPE: dict[str, Any] = {
    "activation": "relu",
    "rotated_keys": False,
    "normalise": True,
    "positions": "messages",
    "message_gate": True,
    "message_gate_weight": 0.5,
    "dropout": 0.0,
}
RUNS: dict[str, dict[str, Any]] = {  # fields of both configurations
    "recipe": RECIPE,
    "recipe-kept": RECIPE | {"prefill_cache": "kept"},
    "paper": {"dropout": 0.1, "gates": "learned", "prefill_cache": "kept", "grad_checkpoint": True},
}


def curve(name: str, folder: Path) -> list[float]:
    """The loss of each step, nats per token."""
    receiver, sharer = (load_model(DATA / "e2e/qwen3_llama" / m) for m in ("receiver", "sharer"))
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
    data = Dataset([Source(rows, 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 64)
    fields = dict(RUNS[name])
    of_fuser = {k: fields.pop(k) for k in list(fields) if k in FuserConfig.__dataclass_fields__}
    if "prefill_cache" in fields:
        fields["prefill_cache"] = str(folder / fields["prefill_cache"])
    layers = tuple((i, i + 2) for i in range(2, 4))
    shape = FuserConfig(receiver.shape, sharer.shape, layers, 16, 12, **of_fuser)
    config = TrainConfig(iters=STEPS, batch_size=ROWS, warmup=2, learning_rate=3e-3, **fields)
    c2c = C2C(receiver.model, sharer.model, new_fuser(shape, config.gates, config.seed))
    trainer = Trainer(c2c, data, [], config, folder)
    examples = [e for e in map(data.example, rows) if e is not None]
    if shape.normalise:
        measure_inputs(c2c, examples, ROWS)
    return [trainer.train_step([(examples * 2)[at : at + ROWS]]) for at in range(STEPS)]


@pytest.mark.skipif(device.kind() != "cpu", reason="the curves are float32")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_loses_what_it_lost(name: str, tmp_path: Path) -> None:
    lines = [line.split() for line in CURVES.read_text().splitlines()]
    recorded = [float(loss) for run, _, loss in lines if run == name]
    np.testing.assert_allclose(curve(name, tmp_path), recorded, rtol=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        CURVES.write_text(
            "".join(
                f"{name} {step} {loss:.8f}\n"
                for name in RUNS
                for step, loss in enumerate(curve(name, Path(made)), 1)
            )
        )
