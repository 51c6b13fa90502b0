"""The rows of the gate panel: what they show, the cursor among them, and surgery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from c2c_mlx.events import GateReport, Gates, Link, Loaded
from c2c_mlx.tui import gates as maths
from c2c_mlx.tui import keys
from c2c_mlx.tui.widgets import gate_rows as rows

View = Literal["bars", "tokens", "turns"]
VIEWS: tuple[View, ...] = ("bars", "tokens", "turns")


class GateView(ScrollView, can_focus=True):
    """One row per receiver layer, without a widget per row."""

    COMPONENT_CLASSES = {
        *("gates--row", "gates--label", "gates--dim", "gates--cursor"),
        *("gates--kind-0", "gates--kind-1"),
    }
    BINDINGS = keys.bindings(keys.GATES)

    @dataclass
    class Surgery(Message):
        """The user wants other gates, of each fuser."""

        gates: tuple[Gates, ...]

    class Moved(Message):
        """The cursor, the view, or what is shown has changed."""

    def __init__(self) -> None:
        super().__init__(id="gate-view")
        self.loaded: Loaded | None = None
        self.sharer = 0  # whose gates are shown, should there be several
        self.gates: tuple[Gates, ...] = ()  # each fuser's
        self.turns: Sequence[Sequence[GateReport]] = ()  # of each sharer, per turn
        self.reports: list[GateReport | None] = []  # of the sharer that is shown
        self.live: GateReport | None = None  # of the token that has just been fused
        self.view: View = "bars"
        self.measure: Literal["weights", "changes"] = "weights"
        self.row = self.kind = self.token = 0
        self.zoomed = False
        self._strips: dict[int, Strip] = {}
        self._rows: dict[int, int] = {}  # receiver layer -> index in the fuser's layer map
        self._cells = np.zeros((2, 0, 0), int)  # levels of the heat map in view
        self._bins: list[tuple[int, int]] = []
        self.scale = maths.Scale(1.0, "1")
        self._tokens: dict[str, np.ndarray] = {}  # of the report in view, by measure
        self._styles: dict[tuple[object, ...], Style] = {}

    # --- what is shown ----------------------------------------------------------------------

    @property
    def link(self) -> Link | None:
        """The sharer's way into the receiver that is shown."""
        return self.loaded.links[self.sharer] if self.loaded and self.loaded.links else None

    @property
    def own_gates(self) -> Gates:
        """Those of its fuser."""
        return self.gates[self.sharer] if self.gates else ((), ())

    @property
    def report(self) -> GateReport | None:
        """The latest turn's, if anything was fused in it; its latest token's while it is fused."""
        if self.live and self.view == "bars":
            return self.live
        return self.reports[-1] if self.reports else None

    @property
    def n_columns(self) -> int:
        """How far the cursor can go to the right in a heat map."""
        if self.view == "turns":
            return len(self.reports)
        return len(self.report.tokens) if self.report else 0

    @property
    def is_stale(self) -> bool:
        """Whether the gates are others than those that the figures were measured with."""
        return self.report is not None and self.report.gates != self.own_gates

    def show_loaded(self, loaded: Loaded) -> None:
        """A pair and its fuser: the rows, and their gates before anything was asked."""
        self.loaded, self.gates, self.sharer = loaded, loaded.gates, 0
        self.virtual_size = Size(1, loaded.receiver_layers)
        self._show_sharer()
        self.call_after_refresh(self.scroll_to, y=max(self.row - 1, 0), animate=False)

    def _show_sharer(self) -> None:
        layers = self.link.layers if self.link else ()
        self._rows = {receiver: at for at, (receiver, _) in enumerate(layers)}
        self.row = next(iter(self._rows), 0)
        self.show_reports(self.turns)

    def show_gates(self, gates: tuple[Gates, ...]) -> None:
        """Each fuser's gates after surgery."""
        self.gates = gates
        self.redraw()

    def show_live(self, report: GateReport) -> None:
        """What became of the answer's latest token."""
        if report.sharer == self.sharer:
            self.live = report
            if self.view == "bars":
                self.redraw()

    def show_reports(self, turns: Sequence[Sequence[GateReport]]) -> None:
        """What was measured, turn by turn, of each sharer; the last one is in view."""
        self.turns, self.live = turns, None
        # A conversation may have begun with another fuser, of other layers.
        layers = self.link.layers if self.link else ()
        self.reports = [
            next((r for r in t if r.sharer == self.sharer and r.layers == layers), None)
            for t in turns
        ]
        self._tokens.clear()
        self.token = max(self.n_columns - 1, 0) if self.view == "turns" else 0
        self.redraw()

    def redraw(self) -> None:
        """Works the cells out anew; rows are drawn when they come into view."""
        self._strips.clear()
        self._styles.clear()
        self.token = min(max(self.token, 0), max(self.n_columns - 1, 0))
        values = self._values()
        is_weight = self.measure == "weights"
        self.scale = maths.Scale(1.0, "1") if is_weight else maths.change_scale(values)
        if self.view == "bars":
            self._cells = np.zeros((2, 0, 0), int)
        else:
            width = max(self.size.width - rows.GUTTER, 1)
            self._bins = maths.columns(values.shape[-1], width, self.token, self.zoomed)
            self._cells = maths.levels(maths.binned(values, self._bins), self.scale.top)
        self.refresh()
        self.post_message(self.Moved())

    def _values(self) -> np.ndarray:
        """[2, L, columns] of the measure in the view."""
        layers = self.link.layers if self.link else ()
        if self.view == "turns":
            return maths.over_turns(self.reports, self.measure, layers)
        if self.report is None:
            return np.zeros((2, len(layers), 0))
        if self.view == "bars":
            return np.array(getattr(self.report, self.measure))[..., None]
        if self.measure not in self._tokens:
            self._tokens[self.measure] = np.array(getattr(self.report, f"token_{self.measure}"))
        return self._tokens[self.measure]

    # --- drawing ----------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """One layer's row, or nothing below the last."""
        layer = y + self.scroll_offset.y
        width = self.size.width
        if self.loaded is None or layer >= self.loaded.receiver_layers:
            return Strip.blank(width, self.rich_style)
        if layer not in self._strips:
            segments = self._row(layer, width)
            used = sum(len(s.text) for s in segments)
            segments.append(Segment(" " * max(width - used, 0), self._style(layer, "row")))
            self._strips[layer] = Strip(segments).crop(0, width)
        return self._strips[layer]

    def _row(self, layer: int, width: int) -> list[Segment]:
        style = partial(self._style, layer)
        number, at = rows.number(layer, style), self._rows.get(layer)
        if at is None:
            return [number, *rows.unfused(style)]
        is_open = (self.own_gates[0][at], self.own_gates[1][at])
        chosen = self.kind if layer == self.row and self.has_focus else None
        signs = [rows.gate(kind, is_open[kind], kind == chosen, style) for kind in (0, 1)]
        if self.view == "bars":
            return [number, *rows.bars(signs, *self._lengths(at), width, style)]
        here = [start <= self.token < stop for start, stop in self._bins]
        keys, values = self._cells[:, at].tolist()
        if self.app.no_color:
            heat = rows.shades((keys, values)[self.kind], here, style)
        else:
            heat = rows.colours(keys, values, here, self._cell_style)
        return [number, *rows.gutter(signs, style), *heat]

    def _lengths(self, at: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """A layer's weights and changes, both in [0, 1]."""
        if self.report is None:
            return (0.0, 0.0), (0.0, 0.0)
        (w0, w1), (c0, c1) = (
            (measure[0][at], measure[1][at])
            for measure in (self.report.weights, self.report.changes)
        )
        top = maths.change_scale(np.array(self.report.changes)).top
        return (w0, w1), (c0 / top, c1 / top)

    def _cell_style(self, key: int, value: int, cursor: bool) -> Style:
        """Keys in the upper half of a cell, values in the lower; a bar where the cursor is."""
        if (key, value, cursor) not in self._styles:
            colours = maths.ramp(self.app.current_theme.dark)
            front, back = colours[key], colours[value]
            if cursor:
                back = colours[max(key, value)]
                front = "#000000" if maths.luminance(back) > 0.2 else "#ffffff"
            self._styles[key, value, cursor] = Style(color=front, bgcolor=back)
        return self._styles[key, value, cursor]

    def _style(self, layer: int, part: rows.Part, selected: bool = False) -> Style:
        """The style of a part of a row; the cursor's row is lighter, its gate reversed."""
        key = (part, layer == self.row, selected)
        if key not in self._styles:
            style = self.get_component_rich_style(f"gates--{part}")
            if layer == self.row:
                style += self.get_component_rich_style("gates--cursor", partial=True)
            self._styles[key] = style + Style(reverse=True) if selected else style
        return self._styles[key]

    # --- moving and cutting -----------------------------------------------------------------

    def action_move(self, rows: int, columns: int) -> None:
        """Moves the cursor; left and right choose K or V among bars, a token in a heat map."""
        if self.loaded is None:
            return
        self.row = min(max(self.row + rows, 0), self.loaded.receiver_layers - 1)
        if columns and self.view == "bars":
            self.kind = 1 if columns > 0 else 0
        elif columns and self.n_columns:
            step = self._step()
            self.token = min(max(self.token + columns * step, 0), self.n_columns - 1)
        self.redraw()
        self.scroll_to_region(Region(0, self.row, 1, 1), animate=False)

    def _step(self) -> int:
        """Tokens from this column to the next."""
        return next((b - a for a, b in self._bins if a <= self.token < b), 1)

    def action_other_kind(self) -> None:
        """Selects values instead of keys, and back."""
        self.kind = 1 - self.kind
        self.redraw()

    def action_next_view(self) -> None:
        """Bars, tokens, turns."""
        self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]
        self.token = self.n_columns - 1 if self.view == "turns" else 0
        self.redraw()

    def action_next_measure(self) -> None:
        """Weights or changes, in a heat map."""
        self.measure = "changes" if self.measure == "weights" else "weights"
        self.redraw()

    def action_next_sharer(self) -> None:
        """The gates of the next sharer, should there be several."""
        if self.loaded and len(self.loaded.links) > 1:
            self.sharer = (self.sharer + 1) % len(self.loaded.links)
            self._show_sharer()

    def action_zoom(self) -> None:
        """A column per token, or all tokens in the width."""
        self.zoomed = not self.zoomed
        self.redraw()

    def action_gate(self, kind: int | None = None) -> None:
        """Closes or opens one gate of the layer under the cursor."""
        kind = self.kind if kind is None else kind
        at, link = self._rows.get(self.row), self.link
        if link is None or at is None or at >= len(self.own_gates[kind]):
            self.app.notify(f"layer {self.row} is not fused: it has no gate", severity="warning")
            return
        if kind not in link.kinds:
            what = ("keys", "values")[kind]
            self.app.notify(f"{what} are not fused: they have no gates", severity="warning")
            return
        gates = [list(g) for g in self.own_gates]
        gates[kind][at] = not gates[kind][at]
        self._cut((tuple(gates[0]), tuple(gates[1])))

    def action_every_gate(self) -> None:
        """Closes every gate, or opens all if none is open."""
        if link := self.link:
            opened = not any(map(any, self.own_gates))
            keys, values = ((opened and kind in link.kinds,) * len(link.layers) for kind in (0, 1))
            self._cut((keys, values))

    def _cut(self, gates: Gates) -> None:
        at = self.sharer
        self._want((*self.gates[:at], gates, *self.gates[at + 1 :]))

    def _want(self, gates: tuple[Gates, ...]) -> None:
        self.show_gates(gates)  # the next key may come before anybody has heard of this one
        self.post_message(self.Surgery(gates))

    def action_restore(self) -> None:
        """The fuser's own gates."""
        if self.loaded is not None:
            self._want(self.loaded.gates)

    def on_click(self, event: events.Click) -> None:
        """The cursor goes where the mouse is."""
        if self.loaded is None:
            return
        layer = event.y + self.scroll_offset.y
        self.row = min(max(layer, 0), self.loaded.receiver_layers - 1)
        column = event.x - rows.GUTTER
        if self.view != "bars" and 0 <= column < len(self._bins):
            self.token = self._bins[column][0]
        elif self.view == "bars":
            self.kind = 0 if event.x < 4 + (self.size.width - 4) // 2 else 1
        self.redraw()

    def on_resize(self) -> None:
        """Bars and columns have another width, and the cursor may have gone out of sight."""
        self.redraw()
        self.call_after_refresh(self.scroll_to_region, Region(0, self.row, 1, 1), animate=False)

    def on_focus(self) -> None:
        """The cursor shows."""
        self.redraw()

    def on_blur(self) -> None:
        """The cursor hides."""
        self.redraw()
