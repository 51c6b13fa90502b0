"""How a row of the gate panel is drawn: number, gates, then bars or a heat map. No state here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal, Protocol

from rich.segment import Segment
from rich.style import Style

from c2c_mlx.tui import gates as maths

GUTTER = 8  # cells left of a heat map: ' 12 ●○  '
OPEN, CLOSED = "●", "○"
Part = Literal["row", "label", "dim", "kind-0", "kind-1"]
_KINDS: tuple[Part, Part] = ("kind-0", "kind-1")


class StyleOf(Protocol):
    """The style of a part of the row that is drawn."""

    def __call__(self, part: Part, selected: bool = False) -> Style:
        """Reversed if selected."""


class CellStyle(Protocol):
    """The style of a cell of the heat map, by its two levels and whether the cursor is there."""

    def __call__(self, key: int, value: int, cursor: bool) -> Style:
        """Keys in the upper half, values in the lower."""


def number(layer: int, style: StyleOf) -> Segment:
    """The receiver's layer."""
    return Segment(f"{layer:3d} ", style("label"))


def unfused(style: StyleOf) -> list[Segment]:
    """A layer that the fuser leaves alone."""
    return [Segment("  ·", style("dim"))]


def gate(kind: int, is_open: bool, selected: bool, style: StyleOf) -> Segment:
    """A gate of keys or of values."""
    return Segment(OPEN if is_open else CLOSED, style(_KINDS[kind] if is_open else "dim", selected))


def gutter(signs: Sequence[Segment], style: StyleOf) -> list[Segment]:
    """Both gates, left of a heat map."""
    return [*signs, Segment("  ", style("row"))]


def bars(
    signs: Sequence[Segment],
    weights: Sequence[float],
    changes: Sequence[float],
    width: int,
    style: StyleOf,
) -> list[Segment]:
    """For keys, then for values: the gate, a bar for the weight, a line for the change.

    Args:
        signs: the two gates.
        weights: in [0, 1].
        changes: in [0, 1], as parts of the scale.
        width: of the whole row.
        style: of its parts.
    """
    first, second = maths.bar_widths(width)
    gap, segments = Segment(" ", style("row")), []
    for kind, sign, weight, change in zip(_KINDS, signs, weights, changes, strict=True):
        bar = Segment(maths.bar(weight, first), style(kind))
        line = Segment(maths.thin_bar(change, second), style(kind))
        segments += [sign, gap, bar, gap, line, gap]
    return segments


def shades(levels: Sequence[int], here: Sequence[bool], style: StyleOf) -> list[Segment]:
    """A heat map of one kind without colours; reversed where the cursor is."""
    n = len(maths.SHADES) - 1
    return [
        Segment(maths.SHADES[-(-n * level // (maths.N_LEVELS - 1))], style("row", cursor))
        for level, cursor in zip(levels, here, strict=True)
    ]


def colours(
    keys: Sequence[int], values: Sequence[int], here: Sequence[bool], style: CellStyle
) -> list[Segment]:
    """A heat map of keys above values; one segment for neighbours that look the same."""
    return [
        Segment(("┃" if cursor else "▀") * len(list(run)), style(key, value, cursor))
        for (key, value, cursor), run in groupby(zip(keys, values, here, strict=True))
    ]
