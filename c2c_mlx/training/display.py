"""What a person sees of a run: a live bar on a terminal, one line per report anywhere else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console

from c2c_mlx.progress import Progress


class Display:
    """Prints a run's reports on stderr.

    Args:
        iters: optimiser steps of the whole run.
        is_first: whether this process is the one that speaks.
    """

    def __init__(self, iters: int, is_first: bool = True) -> None:
        self.iters = iters
        self.console = Console(
            file=sys.stderr, stderr=True, quiet=not is_first, highlight=False, soft_wrap=True
        )
        self.bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[figures]}", markup=False),
            rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("loading", total=None, figures="")
        self.figures = ""

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """One line for the record."""
        self.console.print(line, markup=False)

    def count(self, what: str, done: int, total: int) -> None:
        """Something long that is not training."""
        self.bar.update(self.task, description=what, completed=done, total=total)
        if not self.console.is_terminal:
            self.say(f"{what}: {done} of {total}")

    def loading(self, progress: Progress) -> None:
        """Downloads and conversions."""
        self.bar.update(
            self.task, description=progress.what, completed=progress.done, total=progress.total
        )

    def trying(self, done: int, total: int) -> None:
        """Steps that are timed; the record has what comes of them."""
        self.loading(Progress("trying ten steps", done, total))

    def step(self, step: int, loss: float) -> None:
        """One step more."""
        self.bar.update(
            self.task,
            description="training",
            completed=step,
            total=self.iters,
            figures=f"loss {loss:.3f}  {self.figures}",
        )

    def report(self, metrics: dict[str, float]) -> None:
        """What goes to metrics.jsonl, for people."""
        self.figures = (
            f"{metrics['tokens_per_s']:.0f} tokens/s  {metrics['peak_memory_gb']:.1f} GB  "
            f"{metrics['gates_open']} gates open"
        )
        measured = [
            f"{what} {metrics[key]:.3f}"
            for what, key in (
                ("c2c", "valid_loss"),
                ("shuffled sharer", "valid_shuffled_loss"),
                ("receiver alone", "valid_receiver_loss"),
            )
            if key in metrics
        ]
        if measured or not self.console.is_terminal:
            valid = f"  valid: {', '.join(measured)}" if measured else ""
            head = f"step {metrics['step']}/{self.iters}  loss {metrics['loss']:.3f}"
            self.say(f"{head}  {self.figures}{valid}")


def tracker(name: str, run: Path, config: dict[str, Any]) -> Any:
    """Starts wandb or swanlab, which share the interface that is used here: log() and finish()."""
    module = importlib.import_module(name)
    module.init(project="c2c-mlx", name=run.name, config=config)
    return module
