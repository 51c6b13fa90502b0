"""The training loop: steps, measurements, and when what is written. State lives here."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from c2c_mlx import atomic, device
from c2c_mlx.config import Provenance, TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusers import disk
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.training import checkpoints, fingerprint, fits, interrupt, measure, schedule, verdict
from c2c_mlx.training import loss as step_loss
from c2c_mlx.training.batch import Batch, collate, fused_positions
from c2c_mlx.training.checkpoints import Checkpoint, Metrics
from c2c_mlx.training.dataset import Dataset, Example, Position
from c2c_mlx.training.prefills import Prefiller, Prefills

METRICS = "metrics.jsonl"
SAVED = mx.float16  # of a saved fuser's weights: three bits more than bfloat16, and room enough


class Trainer:
    """One run, or one process of a run that several share (`mlx.launch`).

    Every process draws the same batches and takes its own rows of them; gradients are added up, so
    the run is the one that a single process would make. The first process alone measures and
    writes. The fuser learns in float32, whatever precision the models have.

    Args:
        c2c: both models and the fuser that learns.
        train: the chats to learn from.
        valid: examples that are only measured; may be empty.
        config: the run's configuration.
        folder: where metrics, checkpoints and the fuser go.
        provenance: of the fuser; steps and figures are filled in.
        say: told what a person should know, a line each time.
        stop_strings: text that ends an answer of the receiver, see `LanguageModel`.
    """

    def __init__(
        self,
        c2c: C2C,
        train: Dataset,
        valid: list[Example],
        config: TrainConfig,
        folder: Path,
        provenance: Provenance | None = None,
        say: Callable[[str], None] = lambda line: None,
        stop_strings: tuple[str, ...] = (),
    ) -> None:
        self.stop_strings = stop_strings
        self.c2c, self.train, self.valid, self.folder = c2c, train, valid, folder
        self.provenance, self.say = provenance or Provenance(), say
        self.group = mx.distributed.init()
        self._weights = fingerprint.of_weights(c2c.receiver), fingerprint.of_weights(c2c.sharer)
        self._chats = train.fingerprint()
        self.prefills = Prefiller(c2c, config, self._weights, say)
        self._loss_and_grad = nn.value_and_grad(c2c.fuser, self._loss)
        # Why the configuration is what it is, and the seconds that answers will take.
        self.fitted: fits.Fit | None = None
        self.answering = 0.0
        self.begin(config)

    def begin(self, config: TrainConfig) -> None:
        """Stands before the first step of a run that goes on like this; the fuser stays as it is.

        Args:
            config: what the trainer was made with, but perhaps for `iters` and how often what is
                told and kept.
        """
        # A control is judged by its loss alone; batches of answers fuse nothing but prompts.
        if config.zero_sharer or self.c2c.fuser.config.fuse_response:
            config = replace(config, answers=0)
        self.config = config
        self.step = 0
        self.tokens = 0
        self.position: Position = (0, 0)
        self.best = math.inf
        self.measured: Metrics = {}
        self.verdict: verdict.Verdict = {}  # until the last step is done
        self._whole = True  # fuser and optimiser are those of `step`, not between two steps
        self.optimizer = optim.AdamW(
            learning_rate=schedule.learning_rate(config),
            betas=list(config.betas),
            weight_decay=config.weight_decay,
        )
        shared = self._weights, self._chats, self.group.size()
        self.settings = checkpoints.settings_of(config, self.c2c.fuser.config, *shared)

    # --- one step -----------------------------------------------------------------------------

    def _loss(self, prefills: Prefills, batch: Batch, gate: float) -> tuple[mx.array, mx.array]:
        """Sums over the batch's tokens: what is minimised, and the loss.

        The gradient is divided by their number behind the models: in float16 its small parts would
        be lost inside of them. `gate` is what a fused position's message gate weighs.
        """
        fused, change = step_loss.fuse(self.c2c, prefills.own, prefills.sharer, batch)
        receiver, recompute = self.prefills.receiver, self.config.grad_checkpoint
        loss = step_loss.response_loss(receiver, fused, batch, prefills.state, recompute)
        gates = gate * step_loss.message_loss(change, batch) if gate else 0.0
        return loss + gates, loss

    def split(self, rows: list[Example]) -> list[list[Example]]:
        """A step's chats as the batches that they are learned from in."""
        size = self.config.batch_size
        return [rows[at : at + size] for at in range(0, len(rows), size)]

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
        chats = [e for rows in batches for e in rows]
        tokens = sum(len(e.response_ids) for e in chats)
        # Of the whole step: a mean over each of its batches would depend on how it is split.
        fused = max(fused_positions(chats, fuser.config.positions), 1)
        gate = self.config.message_gate_weight * tokens / fused
        total = mx.array(0.0)
        gradient = tree_map(mx.zeros_like, fuser.trainable_parameters())
        for rows in batches:
            if not (rows := rows[rank::size]):
                continue
            batch = collate(rows, fuser.config.positions)
            (_, loss), part = self._loss_and_grad(self.prefills(batch), batch, gate)
            gradient = tree_map(mx.add, gradient, part)
            total = total + loss
            mx.eval(total, gradient)
            del part
            mx.clear_cache()  # the next batch has another shape
        total = mx.distributed.all_sum(total, group=self.group)
        share = tokens / size  # sums over processes come out of averages
        gradient = nn.average_gradients(tree_map(lambda g: g / share, gradient), self.group)
        gradient, norm = optim.clip_grad_norm(gradient, self.config.clip)
        mean = float(total) / tokens
        if not math.isfinite(mean + float(norm)):
            where = ", ".join(e.where for e in chats)
            raise C2CError(
                f"step {self.step + 1}: the loss is {mean} and the gradient's norm {float(norm)}; "
                f"nothing was updated. The batch: {where}. Start another --out with a smaller "
                f"--learning-rate, or without these chats; --fuser {self.folder} starts it from "
                f"what was learned"
            )
        self._whole = False
        self.optimizer.update(fuser, gradient)
        mx.eval(fuser.parameters(), self.optimizer.state)
        mx.synchronize()  # else a GPU may tell of a failure only in the next step
        self._whole = True
        self.step += 1
        self.tokens += tokens
        return mean

    @property
    def temperature(self) -> float | None:
        """Of the gates at this step; None if they stay open."""
        return schedule.temperature(self.config, self.step)

    # --- the run ------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.iters

    @property
    def judged(self) -> bool:
        """Whether nothing is left to do: the verdict on all steps is there."""
        return self.finished and (self.folder / verdict.FILE).exists()

    def run(
        self,
        on_report: Callable[[Metrics], None] = lambda metrics: None,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Trains up to `config.iters` steps, and gives the verdict; a finished run gets it alone.

        From the first evaluation on, with chats to measure on or without, the folder holds a fuser.

        Args:
            on_report: called with what goes to `metrics.jsonl`.
            on_step: called after each step with its number and loss.
            stopped: asked before each step; then a checkpoint and the fuser are saved.

        Raises:
            C2CError: if the memory does not suffice, the disk is full, the loss is not finite, or
                macOS interrupted the GPU.
        """
        for made in self.steps(stopped):
            if isinstance(made, float):
                on_step(self.step, made)
            else:
                on_report(made)

    def steps(self, stopped: Callable[[], bool]) -> Iterator[float | Metrics]:
        """As `run`, which it is the inside of: each step's loss, and each report, as they come."""
        is_first = self.group.rank() == 0
        with checkpoints.alone_in(self.folder) if is_first else nullcontext(), self.fitting(True):
            yield from self._steps(stopped)

    def _steps(self, stopped: Callable[[], bool]) -> Iterator[float | Metrics]:
        c, is_first = self.config, self.group.rank() == 0
        stream = self.train.batches(c.batch_size * c.accumulate, c.seed, self.position)
        began, losses, tokens_before = time.perf_counter(), [], self.tokens
        unsaved = False
        if is_first and not self.finished:
            (self.folder / verdict.FILE).unlink(missing_ok=True)  # of fewer steps
        elif is_first and not self.judged:
            found = {"step": self.step} | self._judge()
            self._log(found)
            self._keep(found)
            self.save()
        stopped = interrupt.anywhere(stopped)
        while not self.finished and not stopped():
            position, rows = next(stream)
            losses.append(self.train_step(self.split(rows)))
            self.position = position
            yield losses[-1]
            evaluating = self.step % c.eval_every == 0 or self.finished
            unsaved = True
            if is_first and (self.step % c.report_every == 0 or evaluating):
                seconds = time.perf_counter() - began
                metrics = self._metrics(losses, (self.tokens - tokens_before) / seconds)
                if self.finished:  # a verdict takes long, and may not fit: --resume gives it alone
                    self.save()
                    self.save_fuser(self.folder)
                    self._log(metrics)  # and once more with what is measured
                    metrics |= self._judge()
                elif evaluating and self.valid:
                    metrics |= self.evaluate()
                self._log(metrics)
                if evaluating:
                    self._keep(metrics)
                yield metrics
                began, losses, tokens_before = time.perf_counter(), [], self.tokens
            if is_first and (self.step % c.save_every == 0 or self.finished):
                self.save()
                unsaved = False
        if is_first and unsaved:
            self.save()
        if is_first and not self.finished and self.step:
            self.save_fuser(self.folder)

    def _metrics(self, losses: list[float], tokens_per_s: float) -> Metrics:
        return {
            "step": self.step,
            "loss": float(np.mean(losses)),
            "tokens": self.tokens,
            "learning_rate": float(self.optimizer.learning_rate.item()),
            "temperature": self.temperature or 0.0,
            "gates_open": int(self.c2c.fuser.gates.sum()),
            "tokens_per_s": tokens_per_s,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
        }

    def evaluate(self, chats: list[Example] | None = None) -> Metrics:
        """Loss per token of these chats (None: `valid`): C2C's, the receiver's, and shuffled."""
        return measure.per_token(*self._measure(chats or self.valid))

    def _measure(self, chats: list[Example], zeroed: bool = False) -> measure.Measured:
        return measure.losses(self.c2c, self.prefills, chats, self.config.batch_size, zeroed)

    def _judge(self) -> Metrics:
        """Gives the verdict, and returns what `evaluate` does."""
        losses, tokens = self._measure(self.valid, zeroed=True) if self.valid else ({}, [])
        c = self.config
        said = self.answers(c.answers) if self.valid and c.answers else None
        self.verdict = verdict.judge(losses, tokens, c.seed, c.zero_sharer, said)
        with checkpoints.writing(self.folder / verdict.FILE):
            verdict.write(self.folder, self.verdict)
        return measure.per_token(losses, tokens)

    def compare(self, twin: Trainer) -> None:
        """Takes what a finished twin loses into the verdict and onto the card."""
        if self.valid and (found := verdict.read(self.folder)):
            losses, _ = twin._measure(self.valid)
            self.verdict = verdict.with_twin(found, losses["valid"], self.config.seed)
            with checkpoints.writing(self.folder / verdict.FILE):
                verdict.write(self.folder, self.verdict)
            self.save_fuser(self.folder)

    def answers(self, n: int, most: int = verdict.ANSWER_TOKENS) -> measure.Answers:
        """Greedy answers to n of the chats that are only measured, of `most` tokens at most."""
        chats, size = measure.spread(self.valid, n), self.config.batch_size
        tokenizer, stops = self.train.receiver, self.stop_strings
        return measure.answers(self.c2c, self.prefills, chats, size, tokenizer, stops, most)

    @contextmanager
    def fitting(self, keep: bool = False) -> Iterator[None]:
        """Keeps to the memory that was planned; where there is less, names the next smaller plan.

        Args:
            keep: whether a checkpoint is written that goes on with it, or after an interruption.
        """
        planned = device.at_most(self.fitted.need.in_use) if self.fitted else nullcontext()
        try:
            with planned:
                yield
            return
        except (RuntimeError, MemoryError) as e:
            is_full = device.is_out_of_memory(e)
            if not is_full and not device.is_interrupted(e):
                raise
            traceback.clear_frames(e.__traceback__)  # they hold what did not fit
        mx.clear_cache()
        where = "the verdict" if self.finished else f"step {self.step + 1}"
        less = fits.smaller(self.config) if is_full else self.config
        keep = keep and self._whole and less is not None
        if keep and self.group.rank() == 0:
            self.settings |= {name: getattr(less, name) for name in fits.CHOSEN}
            self.save()
        if not is_full:
            raise C2CError(fits.interrupted(where, keep))
        raise C2CError(fits.too_large(where, self.config, less, keep))

    # --- files --------------------------------------------------------------------------------

    def _log(self, metrics: Metrics) -> None:
        path = self.folder / METRICS
        with checkpoints.writing(path):
            atomic.append(path, json.dumps(metrics) + "\n")

    def _keep(self, metrics: Metrics) -> None:
        """Saves the fuser with what was measured of it, and as the best if it is that."""
        if "valid_loss" in metrics:
            self.measured = metrics
        if metrics.get("valid_loss", math.inf) < self.best:
            self.best = metrics["valid_loss"]
            self.save_fuser(self.folder / "best")
        self.save_fuser(self.folder)

    def save_fuser(self, folder: Path) -> None:
        """Writes the fuser as it is now, with what was measured last."""
        figures = {k: v for k, v in self.measured.items() if k.startswith("valid_")}
        fuser = self.c2c.fuser
        said = str(self.verdict.get("verdict", ""))
        fuser.provenance = replace(self.provenance, steps=self.step, metrics=figures, verdict=said)
        disk.save(fuser, folder, SAVED)

    def save(self) -> None:
        """Writes a checkpoint, from which `resume` continues exactly.

        Raises:
            C2CError: if it can't be written; the earlier ones stay.
        """
        state = Checkpoint(
            self.step,
            self.tokens,
            self.position,
            self.best,
            self.measured,
            self.settings,
            self.c2c.fuser.parameters(),
            self.optimizer.state,
        )
        with checkpoints.writing(self.folder / checkpoints.FOLDER):
            checkpoints.write(self.folder, state, self.config.keep_checkpoints)

    def resume(self, checkpoint: Path) -> None:
        """Continues exactly from a checkpoint: weights, moments, step, noise, data order.

        `iters` may have grown: the learning rate then follows the new length from here on.

        Raises:
            C2CError: if the checkpoint is damaged, or of a run with other settings.
        """
        state = checkpoints.read(checkpoint)
        changes = checkpoints.check_same(state.settings, self.settings)
        for change in changes:
            self.say(f"{change} from here on")
        is_noisy = self.config.gates == "learned" or self.c2c.fuser.config.dropout
        if is_noisy and any(change.startswith("batch_size") for change in changes):
            self.say("a step learns from the same chats as before, with other noise")
        self.c2c.fuser.update(state.fuser)
        self.optimizer.init(self.c2c.fuser.trainable_parameters())
        self.optimizer.state = state.optimizer
        self.step, self.tokens, self.position = state.step, state.tokens, state.position
        self.best, self.measured = state.best, state.metrics
