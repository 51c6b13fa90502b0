"""The training loop: steps, reports, checkpoints. State lives here and in the run's folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from c2c_mlx.config import FuserConfig, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.fusion.project import inputs
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.data import Batch, Dataset, Example, Position, collate
from c2c_mlx.training.prefills import Prefiller, Prefills

Report = dict[str, float]


class Trainer:
    """One run, or one process of a run that several share (`mlx.launch`).

    Every process draws the same batches and takes its own rows of them; gradients are added up, so
    the run is the one that a single process would make. The first process alone measures and
    writes.

    Args:
        c2c: both models and the fuser that learns.
        train: the chats to learn from.
        valid: examples that are only measured; may be empty.
        config: the run's configuration.
        folder: where `metrics.jsonl`, checkpoints and the fuser go.
    """

    def __init__(
        self, c2c: C2C, train: Dataset, valid: list[Example], config: TrainConfig, folder: Path
    ) -> None:
        self.c2c, self.train, self.valid = c2c, train, valid
        self.config, self.folder = config, folder
        self.step = 0
        self.tokens = 0
        self.position: Position = (0, 0)
        self.best = math.inf
        self.final: Report = {}
        self.group = mx.distributed.init()
        self.optimizer = optim.AdamW(
            learning_rate=_schedule(config),
            betas=list(config.betas),
            weight_decay=config.weight_decay,
        )
        self.prefills = Prefiller(
            c2c,
            Path(config.prefill_cache) if config.prefill_cache else None,
            config.prefill_cache_gb,
            config.zero_sharer,
        )
        self._loss_and_grad = nn.value_and_grad(c2c.fuser, self._loss)

    # --- one step -----------------------------------------------------------------------------

    def _loss(self, prefills: Prefills, batch: Batch, tokens: float) -> tuple[mx.array, mx.array]:
        fused, change = step_loss.fuse(self.c2c, prefills.own, prefills.sharer, batch)
        loss = step_loss.response_loss(self.c2c.receiver, fused, batch, self.config.grad_checkpoint)
        total = loss / tokens
        if self.config.message_gate_weight:
            gates = step_loss.message_loss(change, batch)
            total = total + self.config.message_gate_weight * gates * batch.tokens / tokens
        return total, loss

    def train_step(self, batches: list[list[Example]]) -> float:
        """One optimiser step over `accumulate` batches; returns the loss per token in nats.

        Raises:
            C2CError: if the loss or a gradient is not a finite number.
        """
        fuser, rank, size = self.c2c.fuser, self.group.rank(), self.group.size()
        fuser.train()
        fuser.temperature = self.temperature
        # Noise that depends on the step alone needs no state to be saved: a resumed run draws it.
        mx.random.seed((self.config.seed << 32) + self.step * size + rank)
        tokens = sum(len(e.response_ids) for rows in batches for e in rows)
        share = tokens / size  # sums over processes come out of averages
        total = mx.array(0.0)
        gradient = tree_map(mx.zeros_like, fuser.trainable_parameters())
        for rows in batches:
            if not (rows := rows[rank::size]):
                continue
            batch = collate(rows, fuser.config.positions)
            prefills = self.prefills(batch)
            (_, loss), part = self._loss_and_grad(prefills, batch, share)
            gradient = tree_map(mx.add, gradient, part)
            total = total + loss
            mx.eval(total, gradient)
        total = mx.distributed.all_sum(total, group=self.group)
        gradient = nn.average_gradients(gradient, self.group)
        gradient, norm = optim.clip_grad_norm(gradient, self.config.clip)
        mean = float(total) / tokens
        if not math.isfinite(mean + float(norm)):
            where = ", ".join(e.where for rows in batches for e in rows)
            raise C2CError(
                f"step {self.step + 1}: the loss is {mean} and the gradient's norm {float(norm)}; "
                f"nothing was updated. The batch: {where}. The latest checkpoint is good: --resume "
                f"it with a smaller --learning-rate, or without these chats"
            )
        self.optimizer.update(fuser, gradient)
        mx.eval(fuser.parameters(), self.optimizer.state)
        self.step += 1
        self.tokens += tokens
        return mean

    @property
    def temperature(self) -> float | None:
        """Of the gates at this step: T0 (T1 / T0)^(step / anneal); None if they stay open."""
        c = self.config
        if c.gates == "open":
            return None
        ratio = c.final_temperature / c.initial_temperature
        return c.initial_temperature * ratio ** min(self.step / c.anneal_steps, 1.0)

    # --- the run ------------------------------------------------------------------------------

    def run(
        self,
        on_report: Callable[[Report], None] = lambda report: None,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
    ) -> None:
        """Trains up to `config.iters` steps.

        Ctrl-C ends the step that is running, saves a checkpoint, and is raised.

        Args:
            on_report: called with what goes to `metrics.jsonl`.
            on_step: called after each step with its number and loss.
        """
        c, is_first = self.config, self.group.rank() == 0
        stream = self.train.batches(c.batch_size, c.seed, self.position)
        began, losses, tokens_before = time.perf_counter(), [], self.tokens
        with _interrupts_noted() as interrupted:
            while self.step < c.iters and not interrupted:
                drawn = [next(stream) for _ in range(c.accumulate)]
                losses.append(self.train_step([rows for _, rows in drawn]))
                self.position = drawn[-1][0]
                on_step(self.step, losses[-1])
                last = self.step == c.iters
                evaluating = self.valid and (self.step % c.eval_every == 0 or last)
                if is_first and (self.step % c.report_every == 0 or evaluating or last):
                    seconds = time.perf_counter() - began
                    report: Report = {
                        "step": self.step,
                        "loss": float(np.mean(losses)),
                        "tokens": self.tokens,
                        "learning_rate": float(self.optimizer.learning_rate.item()),
                        "temperature": self.temperature or 0.0,
                        "gates_open": int(self.c2c.fuser.gates.sum()),
                        "tokens_per_s": (self.tokens - tokens_before) / seconds,
                        "peak_memory_gb": mx.get_peak_memory() / 1e9,
                    }
                    if evaluating:
                        report |= self.evaluate()
                        self.final = report
                    self._log(report)
                    on_report(report)
                    if report.get("valid_loss", math.inf) < self.best:
                        self.best = float(report["valid_loss"])
                        disk.save(self.c2c.fuser, self.folder / "best")
                    began, losses, tokens_before = time.perf_counter(), [], self.tokens
                if is_first and (self.step % c.save_every == 0 or last or interrupted):
                    self.save()
            if interrupted:
                raise KeyboardInterrupt

    def evaluate(self) -> Report:
        """Validation loss per token: C2C, the receiver alone, and C2C with shuffled sharers."""
        fuser = self.c2c.fuser
        fuser.eval()
        positions = fuser.config.positions
        size = self.config.batch_size
        examples = sorted(self.valid, key=lambda e: (len(e.receiver_ids), len(e.response_ids)))
        sums = {"valid_loss": 0.0, "valid_receiver_loss": 0.0, "valid_shuffled_loss": 0.0}
        tokens = 0
        for at in range(0, len(examples), size):
            rows = examples[at : at + size]
            shuffled = [e.with_sharer_of(o) for e, o in zip(rows, rows[1:] + rows[:1], strict=True)]
            batch = collate(rows, positions)
            prefills = self.prefills(batch)
            other = collate(shuffled, positions)
            fed = self.prefills(other).sharer
            for name, sharer, b in (
                ("valid_loss", prefills.sharer, batch),
                ("valid_shuffled_loss", fed, other),
            ):
                fused, _ = step_loss.fuse(self.c2c, prefills.own, sharer, b)
                sums[name] += float(step_loss.response_loss(self.c2c.receiver, fused, b))
            own = [c.copy() for c in prefills.own]
            alone = step_loss.response_loss(self.c2c.receiver, own, batch)
            sums["valid_receiver_loss"] += float(alone)
            tokens += batch.tokens
        return {name: total / tokens for name, total in sums.items()}

    def _log(self, report: Report) -> None:
        path = self.folder / "metrics.jsonl"
        with _writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")

    # --- checkpoints --------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint beside the others and drops the oldest; never a half-written one.

        Raises:
            C2CError: if it can't be written; the earlier ones stay.
        """
        target = self.folder / "checkpoints" / f"{self.step:07d}"
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with _writing(target):
            try:
                partial.mkdir(parents=True)
                self._write_state(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        for old in checkpoints(self.folder)[: -self.config.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)

    def _write_state(self, folder: Path) -> None:
        state_of = {"fuser": self.c2c.fuser.parameters(), "optimizer": self.optimizer.state}
        arrays: dict[str, mx.array] = tree_flatten(state_of, destination={})  # type: ignore[assignment]
        mx.save_safetensors(str(folder / "state.safetensors"), arrays)
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position,
            "best": self.best if math.isfinite(self.best) else None,
            "train": asdict(self.config),
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        for file in folder.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())

    def resume(self, checkpoint: Path) -> None:
        """Continues exactly: weights, moments, step, noise and data order."""
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        arrays: dict[str, mx.array] = mx.load(str(checkpoint / "state.safetensors"))  # type: ignore[assignment]
        parts: dict[str, dict[str, mx.array]] = {"fuser": {}, "optimizer": {}}
        for name, array in arrays.items():
            part, _, key = name.partition(".")
            if part in parts:
                parts[part][key] = array
        self.c2c.fuser.load_weights(list(parts["fuser"].items()))
        self.optimizer.init(self.c2c.fuser.trainable_parameters())
        self.optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        self.step, self.tokens = state["step"], state["tokens"]
        self.position = tuple(state["position"])
        self.best = math.inf if state["best"] is None else state["best"]


def checkpoints(folder: Path) -> list[Path]:
    """A run's complete checkpoints, the oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"))


def measure_inputs(c2c: C2C, examples: list[Example], batch_size: int) -> None:
    """Sets a fuser's fixed normalisation from the data (config field `normalise`).

    Inputs get mean zero and deviation one per channel, the output the deviation of the receiver's
    cache; a channel that never moves is left alone.
    """
    fuser = c2c.fuser
    memos: tuple[step_loss.PrefixMemo, step_loss.PrefixMemo] = ({}, {})
    slices = [(kind, at) for kind in fuser.kinds for at in range(len(c2c.receiver_layers))]
    count, total, squares = 0, mx.array(0.0), mx.array(0.0)
    for at in range(0, len(examples), batch_size):
        batch = collate(examples[at : at + batch_size], fuser.config.positions)
        if batch.start == batch.stop:
            continue
        rows = mx.array(np.flatnonzero(batch.messages.reshape(-1) >= 0))
        own = step_loss.prefill(c2c.receiver, batch.receiver, memos[0])
        cache = step_loss.prefill(c2c.sharer, batch.sharer, memos[1])
        part = kv.read(own, c2c.receiver_layers, batch.start, batch.stop)
        x = inputs(
            step_loss.read_sharer(c2c, cache, batch),
            c2c.fuser_view(part, step_loss.first_position(batch)),
            slices,
        ).flatten(1, 2)[:, rows]  # [S, B*N, in]
        total = total + x.sum(axis=1)
        squares = squares + mx.square(x).sum(axis=1)
        count += len(rows)
        mx.eval(total, squares)
    if count == 0:
        raise C2CError("the training data has no message to fuse")
    mean = total / count
    deviation = mx.sqrt(mx.maximum(squares / count - mean * mean, 0))
    scale = mx.where(deviation > 1e-6, 1 / mx.maximum(deviation, 1e-6), 0.0)
    fuser.input_mean = mean.reshape(fuser.input_mean.shape)
    fuser.input_scale = scale.reshape(fuser.input_scale.shape)
    output = deviation[:, fuser.config.sharer.width :]
    fuser.output_scale = output.reshape(fuser.output_scale.shape)
    mx.eval(fuser.parameters())


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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:  # MLX's own writing raises the latter
        reason = getattr(e, "strerror", None) or str(e)
        raise C2CError(
            f"{path}: cannot be written ({reason}); earlier checkpoints are whole: make room, then "
            "--resume"
        ) from None


@contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C is only put into the list; a second one is raised at once."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        noted.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _schedule(c: TrainConfig) -> Callable[[mx.array], mx.array]:
    low = c.learning_rate * c.final_learning_rate
    steps = max(c.iters - c.warmup, 1)
    decay = (
        optim.cosine_decay(c.learning_rate, steps, low)
        if c.schedule == "cosine"
        else optim.linear_schedule(c.learning_rate, low, steps)
    )
    if c.warmup == 0:
        return decay
    return optim.join_schedules(
        [optim.linear_schedule(c.learning_rate / c.warmup, c.learning_rate, c.warmup), decay],
        [c.warmup],
    )
