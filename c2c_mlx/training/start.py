"""What training starts from: a new fuser, and the normalisation that is measured once."""

from __future__ import annotations

from dataclasses import asdict, replace

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import numpy as np

from c2c_mlx.config import FuserConfig, ModelShape, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.layers import k_nearest, last_aligned
from c2c_mlx.fusion.project import inputs
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training import sharer as sharers
from c2c_mlx.training.batch import collate
from c2c_mlx.training.dataset import Dataset, Example
from c2c_mlx.training.run import PRESETS, RECIPE, RunConfig

STATISTICS = 128  # examples that the normalisation is measured on


def fuser_config(run: RunConfig, receiver: ModelShape, sharer: ModelShape) -> FuserConfig:
    """The new fuser that a run asks for, between models of these shapes.

    Raises:
        C2CError: if its fields can't be, or can't be trained.
    """
    if run.preset == "paper":
        layer_map, recipe = last_aligned(receiver.layers, sharer.layers), {}
    else:
        nearest = k_nearest(receiver.layers, sharer.layers)
        layer_map, recipe = [p for p in nearest if p[0] >= receiver.layers // 2], RECIPE
    shapes = {"receiver": asdict(receiver), "sharer": asdict(sharer)}
    size = PRESETS[run.preset]
    values = {"layer_map": layer_map, **recipe, **size, **run.fuser_config, **shapes}
    if run.fuse_response:
        values["fuse_response"] = True
    wanted = from_dict(FuserConfig, values, "fuser_config")
    if wanted.bits:
        raise C2CError("fuser_config: 'bits' is for a trained fuser; c2c-weights quantize sets it")
    return wanted


def new_fuser(config: FuserConfig, gates: str, seed: int) -> Fuser:
    """A fuser that training starts from: small output, gates as the run wants them."""
    mx.random.seed(seed)
    fuser = Fuser(config)
    if config.normalise:
        fuser.proj_out.weight = fuser.proj_out.weight * 0.1
        fuser.proj_out.bias = mx.zeros_like(fuser.proj_out.bias)
    if config.message_gate:
        fuser.message_head.bias = mx.full(fuser.message_head.bias.shape, 2.0)
    if gates == "open":
        fuser.gate_logit = mx.ones_like(fuser.gate_logit)
        fuser.freeze(keys=["gate_logit"], recurse=False)
    return fuser


def first_examples(train: Dataset, batch_size: int, seed: int) -> list[Example]:
    """Those that a run sees first, to measure its inputs on."""
    wanted = min(STATISTICS, sum(len(s.rows) for s in train.sources))
    examples: list[Example] = []
    for _, batch in train.batches(batch_size, seed):
        examples.extend(batch)
        if len(examples) >= wanted:
            break
    return examples


def measure_inputs(c2c: C2C, examples: list[Example], batch_size: int) -> None:
    """Sets a fuser's fixed normalisation from the data (config field `normalise`).

    Inputs get mean zero and deviation one per channel, the output the deviation of the receiver's
    cache; a channel that never moves is left alone. Sums are float32 whatever the models hold:
    half precision stops counting at 256 or 2048 and has no room for squares.

    Raises:
        C2CError: if nothing in the examples is fused.
    """
    fuser = c2c.fuser
    memos: tuple[step_loss.PrefixMemo, step_loss.PrefixMemo] = ({}, {})
    slices = [(kind, at) for kind in fuser.kinds for at in range(len(c2c.receiver_layers))]
    count, total, squares = 0, mx.array(0.0), mx.array(0.0)
    origin: mx.array | None = None  # [S, 1, in]: about the mean, so that squares do not cancel
    for at in range(0, len(examples), batch_size):
        prompts = [replace(e, heard=None) for e in examples[at : at + batch_size]]
        batch = collate(prompts, fuser.config.positions)
        if batch.start == batch.stop:
            continue
        rows = mx.array(np.flatnonzero(batch.messages.reshape(-1) >= 0))
        own = step_loss.prefill(c2c.receiver, batch.receiver, memos[0])
        cache = sharers.prefill(c2c, batch.sharer, memos[1])
        part = step_loss.read_receiver(c2c, own, batch)
        x = inputs(
            step_loss.read_sharer(c2c, cache, batch),
            c2c.fuser_view(part, step_loss.first_position(batch)),
            slices,
        ).flatten(1, 2)[:, rows]  # [S, B*N, in], float32
        origin = x.mean(axis=1, keepdims=True) if origin is None else origin
        total = total + (x - origin).sum(axis=1)
        squares = squares + mx.square(x - origin).sum(axis=1)
        count += len(rows)
        mx.eval(total, squares, origin)
        mx.clear_cache()
    if origin is None:
        raise C2CError("the training data has no message to fuse")
    mean = total / count
    deviation = mx.sqrt(mx.maximum(squares / count - mean * mean, 0))
    scale = mx.where(deviation > 1e-6, 1 / mx.maximum(deviation, 1e-6), 0.0)
    fuser.input_mean = (origin[:, 0] + mean).reshape(fuser.input_mean.shape)
    fuser.input_scale = scale.reshape(fuser.input_scale.shape)
    output = deviation[:, fuser.config.sharer.width :]
    fuser.output_scale = output.reshape(fuser.output_scale.shape)
    mx.eval(fuser.parameters())
