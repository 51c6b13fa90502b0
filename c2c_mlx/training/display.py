"""What a person sees of a run: a live bar on a terminal, one line per report anywhere else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from c2c_mlx.errors import C2CError
from c2c_mlx.progress import Progress as Loading


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
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("loading", total=None, figures="")
        self.figures = ""

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        """One line for the record."""
        self.console.print(line, markup=False)

    def count(self, what: str, done: int, total: int) -> None:
        """Something long that is not training."""
        self.progress.update(self.task, description=what, completed=done, total=total)
        if not self.console.is_terminal:
            self.say(f"{what}: {done} of {total}")

    def fetching(self, p: Loading) -> None:
        """Downloads and conversions."""
        self.progress.update(self.task, description=p.what, completed=p.done, total=p.total)

    def step(self, step: int, loss: float) -> None:
        """One step more."""
        self.progress.update(
            self.task,
            description="training",
            completed=step,
            total=self.iters,
            figures=f"loss {loss:.3f}  {self.figures}",
        )

    def report(self, report: dict[str, float]) -> None:
        """What goes to metrics.jsonl, for people."""
        self.figures = (
            f"{report['tokens_per_s']:.0f} tokens/s  {report['peak_memory_gb']:.1f} GB  "
            f"{report['gates_open']} gates open"
        )
        if "valid_loss" in report or not self.console.is_terminal:
            line = f"step {report['step']}/{self.iters}  loss {report['loss']:.3f}  {self.figures}"
            if "valid_loss" in report:
                line += (
                    f"  valid: c2c {report['valid_loss']:.3f}, shuffled sharer "
                    f"{report['valid_shuffled_loss']:.3f}, receiver alone "
                    f"{report['valid_receiver_loss']:.3f}"
                )
            self.say(line)


def tracker(name: str, run: Path, config: dict[str, Any]) -> Any:
    """Starts wandb or swanlab, which share the interface that is used here: log() and finish().

    Raises:
        C2CError: if the package is not installed.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise C2CError(
            f"--track {name}: the package is missing; pip install 'c2c-mlx[{name}]'"
        ) from None
    module.init(project="c2c-mlx", name=run.name, config=config)
    return module
