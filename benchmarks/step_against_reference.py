"""A training step over kept prefills against PyTorch doing the same, in turns in one run.

Needs PyTorch: `pip install torch`; with OMP_WAIT_POLICY=passive, for its threads wait by spinning
and take twice the time beside MLX's. Both sides begin with the same prefills and with the
responses' state at the first fused layer, fuse, run the receiver's layers from there on, take the
gradient, clip it, and step AdamW; ours reads the prefills from disk as well. The fuser is the
paper's by its maths, of the size that `c2c-train` makes. Nothing is reported while the machine is
busy, or if the two disagree.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from against_reference import fuse, refuse_if_busy, seconds, use_as_many_threads
from mlx.utils import tree_flatten
from step import ROWS, short_chats
from torch.nn import functional

from c2c_mlx import C2C, LanguageModel, load_model
from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.fusion.fuser import parameters
from c2c_mlx.fusion.layers import k_nearest
from c2c_mlx.models import registry
from c2c_mlx.training.batch import Batch, collate
from c2c_mlx.training.dataset import Dataset, Source
from c2c_mlx.training.loss import read_receiver
from c2c_mlx.training.prefills import Prefills
from c2c_mlx.training.start import new_fuser
from c2c_mlx.training.trainer import Trainer

RUNS = 9
TOLERANCE = 1e-3  # of the largest number: gradients of 8 rows in float32, through 15 layers


def main() -> None:
    refuse_if_busy()
    threads = use_as_many_threads()
    receiver, sharer = map(load_model, registry.default_pair())
    layers = tuple(p for p in k_nearest(receiver.shape.layers, sharer.shape.layers) if p[0] >= 15)
    config = FuserConfig(
        receiver.shape, sharer.shape, layers, 128, 128, dropout=0.0, positions="messages"
    )
    fuser = new_fuser(config, "open", 0)
    c2c = C2C(receiver.model, sharer.model, fuser)
    rows = short_chats()
    data = Dataset([Source(rows, 1.0)], receiver.tokenizer, sharer.tokenizer, "span", 512)
    examples = [e for e in map(data.example, rows) if e is not None]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(c2c, data, [], TrainConfig(prefill_cache=folder), Path(folder))
        batch = collate(examples, config.positions)
        prefills = trainer.prefills(batch)
        reference = Reference(receiver, c2c, prefills, batch)
        check_same(trainer, reference, prefills, batch)
        rounds = [
            (seconds(lambda: trainer.train_step([examples])), seconds(reference.train_step))
            for _ in range(RUNS + 1)
        ][1:]
    refuse_if_busy()
    ms = [1e3 * statistics.median(times) for times in zip(*rounds, strict=True)]
    ratio = statistics.median(a / b for a, b in rounds)
    print("| chats a step | threads | ours | PyTorch | ratio |\n| --- | --- | --- | --- | --- |")
    print(f"| {ROWS} | {threads} | {ms[0]:.0f} ms | {ms[1]:.0f} ms | {ratio:.2f} |")


class Reference:
    """The same step in PyTorch, over tensors that hold the same numbers.

    Args:
        receiver: a Llama.
        c2c: both models and the fuser as it begins.
        prefills: of the batch.
        batch: rows of one length, so that there is no padding.
    """

    def __init__(self, receiver: LanguageModel, c2c: C2C, prefills: Prefills, batch: Batch) -> None:
        assert not batch.receiver.padding.any() and (batch.messages >= 0).all()
        assert batch.mask.all() and prefills.state is not None
        self.args = receiver.model.args
        self.receiver = {k: tensor(v) for k, v in tree_flatten(receiver.model.parameters())}
        self.fuser = {k: tensor(v).clone() for k, v in parameters(c2c.fuser).items()}
        learned = [w.requires_grad_() for name, w in self.fuser.items() if name != "gate_logit"]
        self.optimizer = torch.optim.AdamW(
            learned, lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.learned, self.start, self.layers = learned, batch.start, c2c.receiver_layers
        own = [prefills.own[layer].keys_and_values() for layer in self.layers]
        self.own = [[tensor(x) for x in layer] for layer in own]
        self.part = [tensor(x) for x in read_receiver(c2c, prefills.own, batch)]
        self.sharer = [tensor(x) for x in prefills.sharer]
        self.state, self.targets = tensor(prefills.state), torch.from_numpy(batch.targets).long()
        length, new = own[0][0].shape[2], batch.inputs.shape[1]
        self.sees = torch.ones(new, length + new).tril(length).bool()
        size = self.args.head_dim
        turns = self.args.rope_theta ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(length, length + new)[:, None] * turns  # [R, D/2]
        self.cos, self.sin = angles.cos(), angles.sin()

    def train_step(self) -> None:
        """Gradient, clipping, AdamW."""
        self.optimizer.zero_grad()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()

    def loss(self) -> Any:
        """Nats per token of the responses."""
        fused = [fuse(self.fuser, kind, self.sharer, self.part) for kind in (0, 1)]
        stop = self.start + fused[0].shape[3]
        h = self.state
        for at, (layer, own) in enumerate(zip(self.layers, self.own, strict=True)):
            cache = [
                torch.cat([x[:, :, : self.start], fused[kind][at], x[:, :, stop:]], dim=2)
                for kind, x in enumerate(own)
            ]
            h = self._layer(f"model.layers.{layer}", h, *cache)
        logits = functional.linear(self._norm("model.norm", h), self._weight("model.embed_tokens"))
        return functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten())

    def _layer(self, name: str, h: Any, keys: Any, values: Any) -> Any:
        x = self._norm(f"{name}.input_layernorm", h)
        q, k, v = (
            functional.linear(x, self._weight(f"{name}.self_attn.{kind}_proj"))
            .unflatten(2, (-1, self.args.head_dim))
            .transpose(1, 2)
            for kind in "qkv"
        )
        k = torch.cat([keys, self._rotate(k)], dim=2)
        v = torch.cat([values, v], dim=2)
        shared = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        seen = functional.scaled_dot_product_attention(self._rotate(q), k, v, attn_mask=self.sees)
        seen = seen.transpose(1, 2).flatten(2)
        h = h + functional.linear(seen, self._weight(f"{name}.self_attn.o_proj"))
        x = self._norm(f"{name}.post_attention_layernorm", h)
        gate, up = (
            functional.linear(x, self._weight(f"{name}.mlp.{kind}_proj")) for kind in ("gate", "up")
        )
        inner = functional.silu(gate) * up
        return h + functional.linear(inner, self._weight(f"{name}.mlp.down_proj"))

    def _rotate(self, x: Any) -> Any:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)

    def _norm(self, name: str, x: Any) -> Any:
        return functional.rms_norm(x, x.shape[-1:], self._weight(name), self.args.rms_norm_eps)

    def _weight(self, name: str) -> Any:
        return self.receiver[f"{name}.weight"]


def check_same(trainer: Trainer, reference: Reference, prefills: Prefills, batch: Batch) -> None:
    """Ends the program if loss or gradient are not the same on both sides."""
    fuser = trainer.c2c.fuser

    def loss() -> mx.array:
        return trainer._loss(prefills, batch, 0.0)[1] / batch.tokens

    fuser.temperature = None
    ours, gradient = nn.value_and_grad(fuser, loss)()
    theirs = reference.loss()
    theirs.backward()
    pairs = [("loss", ours, theirs.detach())]
    for name, x in tree_flatten(gradient):
        if name != "gate_logit":
            pairs.append((name, x, reference.fuser[name].grad))
    for name, a, b in pairs:
        a, b = np.array(a), b.numpy()
        off = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))
        if off > TOLERANCE:
            sys.exit(f"the two are {off:.1e} apart in {name}: nothing to compare")


def tensor(x: mx.array) -> Any:
    return torch.from_numpy(np.array(x.astype(mx.float32)))


if __name__ == "__main__":
    main()
