"""The gate panel: which layers of the receiver the sharer feeds, and the words for it."""

from __future__ import annotations

import numpy as np
from rich.text import Text as RichText
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from c2c_mlx.tui import gates as maths
from c2c_mlx.tui.widgets import gate_rows as rows
from c2c_mlx.tui.widgets.gate_view import GateView

KINDS = ("K", "V")


class GatePanel(Vertical):
    """The view with a head, a legend and the words for what is under the cursor."""

    def __init__(self) -> None:
        super().__init__(id="gates", classes="pane")
        self.border_title = "gates"
        self.view = GateView()
        # Held, not queried: while the app ends they may be gone from the screen.
        self._above = Static("", id="gate-head", markup=False)
        self._words_below = Static("", id="gate-words", markup=False)
        self._legend_below = Static("", id="gate-legend", markup=False)

    def compose(self) -> ComposeResult:
        """Head, rows, words, legend."""
        yield from (self._above, self.view, self._words_below, self._legend_below)

    def on_gate_view_moved(self) -> None:
        """Says again what is shown."""
        self._above.update(self._head())
        self._words_below.update(self._words())
        self._legend_below.update(self._legend())
        title = {"bars": "this turn", "tokens": "layer x token", "turns": "over turns"}
        if self.view.live:
            title["bars"] = "this token"
        links = self.view.loaded.links if self.view.loaded else ()
        which = f" · sharer {self.view.sharer + 1} of {len(links)} (s: next)" if links[1:] else ""
        self.border_title = f"gates{which} · {title[self.view.view]}"

    def _head(self) -> str:
        view = self.view
        if view.view == "bars":
            first, second = maths.bar_widths(view.size.width)
            return "    " + "".join(
                f"{kind} {'weight'[:first]:{first}} {'change'[:second]:{second}} " for kind in KINDS
            )
        what = "weight" if view.measure == "weights" else "change"
        kinds = f"{KINDS[view.kind]} (x: other)" if view.app.no_color else "K above, V below"
        return f"    KV  {what}: {kinds}"

    def _words(self) -> str:
        view = self.view
        loaded, report = view.loaded, view.report
        if loaded is None:
            return ""
        if view.link is None:
            return "no fuser: nothing is fused"
        at = view._rows.get(view.row)
        if at is None:
            return f"layer {view.row}: the fuser leaves it alone"
        whose = "sharer's" if len(loaded.links) == 1 else f"{view.link.sharer}'s"
        lines = [f"layer {view.row} ← {whose} layer {view.link.layers[at][1]}"]
        if view.view == "turns" and view.reports:
            report = view.reports[view.token]
            lines.append(f"turn {view.token + 1}" + ("" if report else ": nothing was fused"))
        elif report and report.tokens and (view.view == "tokens" or report is view.live):
            token = 0 if report is view.live else view.token
            ours, theirs = report.tokens[token]
            number = report.start + token
            lines.append(f"token {number} {maths.visible(ours)} ← sharer's {maths.visible(theirs)}")
        for kind in (0, 1):
            state = "open" if view.own_gates[kind][at] else "closed"
            text = f"{KINDS[kind]} {state}"
            if report:
                weight, change = report.weights[kind][at], report.changes[kind][at]
                if view.view == "tokens" and report.tokens:
                    weight = report.token_weights[kind][at][view.token]
                    change = report.token_changes[kind][at][view.token]
                text += f" · weight {weight:.2f} · change {maths.percent(change)}"
            lines.append(text)
        if view.is_stale:
            lines.append("gates changed since: Ctrl+R asks again")
        elif not any(map(any, view.own_gates)):
            lines.append("no gate is open: the receiver alone")
        elif report and not any(map(any, report.weights)):
            lines.append("no weight: nothing was let in this time")
        elif report is None:
            lines.append("ask something to see weights and changes")
        return "\n".join(lines)

    def _legend(self) -> RichText:
        view = self.view
        if view.view != "bars":
            text = RichText("0 ")
            if self.app.no_color:
                text.append(maths.SHADES[1:])
            else:
                for colour in maths.ramp(self.app.current_theme.dark):
                    text.append("█", style=colour)
            return text.append(f" {view.scale.label}")
        report = view.report
        top = maths.change_scale(np.array(report.changes)).label if report else "100 %"
        return RichText(
            f"{rows.OPEN} gate open  {rows.CLOSED} closed: the fuser's\n"
            "█ weight, 0 to 1: this prompt's\n"
            f"━ change of cache, 0 to {top}"
        )
