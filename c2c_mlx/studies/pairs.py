"""Who gains from whom: pairs of models and modes, on one task."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import c2c_mlx.blas  # noqa: F401

import numpy as np

from c2c_mlx.evaluation import report as of_evaluation
from c2c_mlx.evaluation import runner
from c2c_mlx.evaluation.modes import Modes
from c2c_mlx.evaluation.task import C2C_MODES, Item, Task
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.studies.study import Progress, Result

TWIN = "twin"  # trained without a sharer, and fed by none
BATCH = 16


@dataclass(frozen=True)
class Pairing:
    """Two models, and what there is between them.

    Attributes:
        name: another one for every pair.
        receiver: answers.
        sharer: is read.
        fuser: between them; None: there are no C2C modes.
        twin: its control.
        settings: what its records depend on beside its name.
    """

    name: str
    receiver: LanguageModel
    sharer: LanguageModel
    fuser: Fuser | None
    twin: Fuser | None
    settings: dict[str, Any]


def run(
    task: Task,
    items: Sequence[Item],
    pairings: Iterable[Pairing],
    log_of: Callable[[str, dict[str, Any]], runner.Log],
    seed: int,
    progress: Progress,
) -> Result:
    """Asks every item in every mode of every pair.

    Args:
        task: scores the answers.
        items: the same for every pair.
        pairings: loaded one after the other; each is let go before the next is asked for.
        log_of: the log of a pair, or of its twin, by name and settings.
        seed: of every draw.
        progress: called after every batch.
    """
    found: Result = {}
    for pair in pairings:

        def ask(name: str, names: list[str], fuser: Fuser | None, pair: Pairing = pair) -> Any:
            log, fusers = log_of(name, pair.settings), [fuser] if fuser else []
            lms = pair.receiver, [pair.sharer]
            modes = Modes(*lms, fusers, "sequential", items, seed, task.max_tokens)

            def told(which: str, done: int, total: int) -> None:
                progress(f"{name}: {which}", done, total)

            runner.run(task, items, names, modes, log, batch_size=BATCH, alone=0, progress=told)
            return log.records

        names = [m for m in task.modes if pair.fuser or m not in C2C_MODES]
        asked = ask(pair.name, names, pair.fuser)
        records = {mode: asked[mode] for mode in names}
        if pair.twin:
            modes = ["receiver", "c2c-zeroed"] if task.kind == "agreement" else ["c2c-zeroed"]
            records[TWIN] = ask(f"{pair.name}, twin", modes, pair.twin)["c2c-zeroed"]
        about = {"receiver": pair.receiver.name, "sharer": pair.sharer.name}
        found[pair.name] = of_evaluation.summarise(task, items, records, about, seed)
        del pair, ask  # there is room for one pair of models
    return {"kind": task.kind, "scores": list(task.scores), "pairs": found}


def report(result: Result) -> str:
    """One table per score, all pairs in it."""
    parts = []
    for name in result["scores"]:
        rows = {
            f"{pair}: {mode}": of_mode
            for pair, of in result["pairs"].items()
            for mode, of_mode in of["modes"].items()
        }
        parts.append(of_evaluation.score_table(name, rows, ()))
    return "\n\n".join(parts) + "\n"


def draw(result: Result, figure: Any) -> None:
    """Per score a matrix of pairs and modes, minus the receiver alone."""
    panels = figure.subplots(1, len(result["scores"]), squeeze=False)[0]
    pairs = result["pairs"]
    modes = list(dict.fromkeys(m for of in pairs.values() for m in of["modes"] if m != "receiver"))
    for axes, name in zip(panels, result["scores"], strict=True):
        cells = np.full((len(pairs), len(modes)), np.nan)
        for row, of in enumerate(pairs.values()):
            for column, mode in enumerate(modes):
                score = of["modes"].get(mode, {}).get("scores", {}).get(name, {})
                cells[row, column] = score.get("vs_receiver", {}).get("mean", np.nan)
        worst = np.nanmax(np.abs(cells)) if np.isfinite(cells).any() else 1.0
        colours = "RdBu_r" if name in ("nll", "invalid") else "RdBu"  # blue is better
        axes.imshow(cells, cmap=colours, vmin=-worst, vmax=worst, aspect="auto")
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                ink = "white" if abs(value) > 0.6 * worst else "black"
                said = f"{value:+.2f}"
                axes.text(column, row, said, ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(len(modes)), modes, rotation=30, ha="right", fontsize=7)
        axes.set_yticks(range(len(pairs)), [_short(pair) for pair in pairs], fontsize=7)
        axes.set_title(f"{name} minus the receiver's", fontsize=9)


def _short(pair: str) -> str:
    """A pair's name on a line for each, folders by their own name alone."""
    parts = re.split(r"( <- |, )", pair)
    return "".join(
        f"\n{part.strip(' ,')} " if at % 2 else Path(part).name[-24:]
        for at, part in enumerate(parts)
    )
