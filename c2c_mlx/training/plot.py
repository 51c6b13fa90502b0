"""A picture of a run, drawn from what it left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from c2c_mlx.atomic import overwriting
from c2c_mlx.errors import C2CError

VALID = {
    "valid_receiver_loss": "receiver alone",
    "valid_shuffled_loss": "shuffled sharer",
    "valid_loss": "C2C",
}
ERRORS = {"valid_error_keys": "keys, of their change", "valid_error_values": "values, of theirs"}


def plot(run: Path) -> Path:
    """Writes `curves.png` into a run's folder: losses, rate and gates over the steps.

    Returns:
        The file.

    Raises:
        C2CError: if there is no run, or matplotlib is not installed.
    """
    reports = read_reports(run / "metrics.jsonl")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise C2CError("--plot needs matplotlib: pip install 'c2c-mlx[plot]'") from None
    figure = Figure(figsize=(9, 8), layout="constrained")
    # A fuser that is made small learns to do as the big one does: its loss is of another kind.
    is_small = any(ERRORS.keys() & report.keys() for report in reports)
    heights = (4, 2, 1, 1) if is_small else (4, 1, 1)
    losses, *errors, rate, gates = figure.subplots(
        len(heights), 1, sharex=True, height_ratios=heights
    )
    what = "training: squared error, variances" if is_small else "training"
    _draw((errors or [losses])[0], reports, "loss", what, linewidth=0.8)
    for axes in errors:
        for key, label in ERRORS.items():
            _draw(axes, reports, key, f"validation: {label}", marker="o")
        axes.set_ylabel("off from the big one")
        axes.set_yscale("log")
        axes.legend()
    for key, label in VALID.items():
        _draw(losses, reports, key, f"validation: {label}", marker="o")
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    _draw(rate, reports, "learning_rate", "learning rate")
    rate.set_ylabel("learning rate")
    _draw(gates, reports, "gates_open", "open gates", drawstyle="steps-post")
    gates.set_ylabel("open gates")
    gates.set_ylim(bottom=0)
    gates.set_xlabel("step")
    losses.set_title(run.resolve().name)
    target = run / "curves.png"
    try:
        with overwriting(target) as partial:
            figure.savefig(partial, dpi=150)
    except OSError as e:
        raise C2CError(f"{target} cannot be written ({e.strerror or e}): make room there") from None
    return target


def read_reports(path: Path) -> list[dict[str, float]]:
    """The reports of a run; of a step that was reported again counts what was said last.

    A run's last step is: when it is done, and with its verdict.

    Raises:
        C2CError: if there are none.
    """
    if not path.is_file():
        raise C2CError(f"{path.parent}: no metrics.jsonl there; give the --out of a run")
    reports: dict[float, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            report = json.loads(line)
            reports[report["step"]] = reports.get(report["step"], {}) | report
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed while writing
    if not reports:
        raise C2CError(f"{path}: no report yet; the first comes after --report-every steps")
    return [reports[step] for step in sorted(reports)]


def _draw(axes: Any, reports: list[dict[str, float]], key: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[key]) for r in reports if key in r]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
