"""Numbers of the gate panel turned into cells: bars, bins, levels and colours. No Textual here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from c2c_mlx.events import GateReport

EIGHTHS = " ▏▎▍▌▋▊▉█"
THIN = ("╸", "━")  # half a cell, a cell
SHADES = " ░▒▓█"
N_LEVELS = 16

# Luminance alone orders both scales, so no kind of colour vision is left out. The first is cividis,
# made for that; on light paper more must be darker, not lighter.
_ON_DARK = ("#1c2a44", "#00336f", "#4c546c", "#7c7b78", "#b0a473", "#dccb5a", "#ffea46")
_ON_LIGHT = ("#eef3f8", "#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08519c", "#062a5c")


@dataclass(frozen=True)
class Scale:
    """Where the colours end, and what the legend says of it."""

    top: float
    label: str


def bar_widths(width: int) -> tuple[int, int]:
    """Cells for a weight and for a change where a row is '  7 ● wwww cccc ● wwww cccc '."""
    both = max((width - 4) // 2 - 4, 2)
    return both // 2, both - both // 2


def bar(value: float, width: int) -> str:
    """A solid bar of `width` cells, in eighths; a value in (0, 1] always shows something."""
    eighths = round(min(max(value, 0.0), 1.0) * width * 8)
    eighths = max(eighths, 1) if value > 0 and width else eighths
    full, part = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[part] if part else "")).ljust(width)


def thin_bar(value: float, width: int) -> str:
    """The same as a line, in halves: told from a solid one without any colour."""
    halves = round(min(max(value, 0.0), 1.0) * width * 2)
    halves = max(halves, 1) if value > 0 and width else halves
    full, part = divmod(halves, 2)
    return (THIN[1] * full + THIN[0] * part).ljust(width)


def columns(n: int, width: int, cursor: int, zoomed: bool = False) -> list[tuple[int, int]]:
    """Which of n tokens each column of a heat map stands for, as [start, stop).

    Args:
        n: how many tokens there are.
        width: how many columns there is room for.
        cursor: a token that must be among them.
        zoomed: one token a column, as many as there is room for; else all of them, binned.
    """
    if n == 0 or width < 1:
        return []
    if n <= width:
        return [(i, i + 1) for i in range(n)]
    if zoomed:
        first = min(max(cursor - width // 2, 0), n - width)
        return [(i, i + 1) for i in range(first, first + width)]
    edges = [i * n // width for i in range(width + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def binned(values: np.ndarray, bins: Sequence[tuple[int, int]]) -> np.ndarray:
    """[..., N] -> [..., columns]: the mean over each column's tokens."""
    if not bins:
        return np.zeros((*values.shape[:-1], 0))
    starts = [start for start, _ in bins]
    part = values[..., : bins[-1][1]]
    sums = np.add.reduceat(part, starts, axis=-1)
    return sums / np.array([stop - start for start, stop in bins])


def levels(values: np.ndarray, top: float, n: int = N_LEVELS) -> np.ndarray:
    """Values in [0, top] as integers in [0, n); 0 stands for nothing at all and only for that."""
    steps = np.ceil(np.clip(values / max(top, 1e-9), 0, 1) * (n - 1))
    return steps.astype(int)


@cache
def ramp(dark: bool, n: int = N_LEVELS) -> list[str]:
    """Colours from nothing to most, for a dark or a light background."""
    stops = np.array([_rgb(c) for c in (_ON_DARK if dark else _ON_LIGHT)], dtype=float)
    at = np.linspace(0, len(stops) - 1, n)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, i]) for i in range(3)]
    return ["#" + "".join(f"{round(c):02x}" for c in rgb) for rgb in zip(*channels, strict=True)]


def luminance(colour: str) -> float:
    """Relative luminance as the web's contrast rules define it, in [0, 1]."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in _rgb(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def change_scale(values: np.ndarray) -> Scale:
    """Changes have no natural end: the scale ends where one in twenty of them does.

    The few beyond it, of a token that is changed out of all proportion, would darken all others.
    """
    there = values[values > 0]
    if not there.size:
        return Scale(1.0, "100 %")
    most = float(np.quantile(there, 0.95))
    step = 10.0 ** np.floor(np.log10(most))
    top = float(np.ceil(most / step - 1e-9) * step)
    beyond = " and more" if there.max() > top else ""
    return Scale(top, percent(top) + beyond)


def percent(share: float) -> str:
    """0.034 -> '3.4 %', 4.17 -> '417 %'."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def over_turns(
    reports: Sequence[GateReport | None], measure: str, layers: Sequence[tuple[int, int]]
) -> np.ndarray:
    """[2, L, turns] of `weights` or `changes`; zeros for a turn in which nothing was fused."""
    blank = np.zeros((2, len(layers)))
    turns = [np.array(getattr(r, measure)) if r else blank for r in reports]
    return np.stack(turns, axis=-1) if turns else np.zeros((2, len(layers), 0))


def visible(token: str) -> str:
    """A token as it can be shown in a line: white space by its signs, nothing that acts."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() else "·" for c in shown) or "·"
