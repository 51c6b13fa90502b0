"""How a training run goes: what was planned, the loss, the time left, and what C2C says by now."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from c2c_mlx.events import TrainingBegun, TrainingStep, Trial
from c2c_mlx.tui.widgets.harmless import harmless

TRIALS = 3  # that are shown, the latest last
_BLOCKS = "▁▂▃▄▅▆▇█"


def curve(losses: Sequence[float], width: int) -> str:
    """A line of blocks, each the mean of as many steps; the highest is the largest loss."""
    n = min(width, len(losses))
    edges = [round(i * len(losses) / n) for i in range(n + 1)] if n else []
    means = [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    step = (high - low) / (len(_BLOCKS) - 1) or 1.0
    return "".join(_BLOCKS[round((mean - low) / step)] for mean in means)


class TrainingView(Vertical):
    """Below the answers of C2C, while and after its fuser is trained."""

    def __init__(self) -> None:
        super().__init__(classes="training")
        self.border_title = "training"
        self._plan = Static("", classes="plan", markup=False)
        self._figures = Static("", classes="figures", markup=False)
        self._trials = Static("", classes="trials", markup=False)
        self._losses: list[float] = []
        self._tried: list[Trial] = []
        self._latest: TrainingStep | None = None
        self._is_over, self._verdict = False, ""

    def compose(self) -> ComposeResult:
        """How it goes, what came of it, what was planned: in a low pane the last is left out."""
        yield self._figures
        yield self._trials
        yield self._plan

    def begin(self, event: TrainingBegun) -> None:
        """Another run; what one that was stopped has shown stays, if this goes on with it."""
        if not event.step:
            self._losses, self._tried = [], []
        self._latest, self._is_over, self._verdict = None, False, ""
        self._plan.update(event.plan)
        self._figures.update(f"step {event.step} of {event.steps}")
        self._show_trials()
        self.add_class("-shown")
        self.border_subtitle = "Ctrl+S stops, and keeps it"

    def step(self, event: TrainingStep) -> None:
        """One step more."""
        self._losses.append(event.loss)
        self._latest = event
        self._show_figures()

    def try_out(self, event: Trial) -> None:
        """Another answer to the latest question."""
        self._tried = [*self._tried, event][-TRIALS:]
        self._show_trials()

    def end(self, subtitle: str, verdict: str) -> None:
        """Nothing more comes; what it came to stands there, above all else, until the next run."""
        self.border_subtitle = subtitle
        self._is_over, self._verdict = True, verdict
        if verdict:
            self._plan.update("")
        self._show_figures()

    def hide(self) -> None:
        """It came to nothing, or was another pair's."""
        self.remove_class("-shown")
        self._losses, self._tried = [], []

    def on_resize(self) -> None:
        """The curve is as wide as there is room."""
        self._show_figures()

    def _show_figures(self) -> None:
        if (e := self._latest) is None:
            return
        minutes, seconds = divmod(round(e.left_s), 60)
        left = f"{minutes} min {seconds} s left" if e.left_s else "measuring what it is worth"
        gates = f"{e.gates_open} gates open" if e.gates_open else ""
        drawn = curve(self._losses, max(self._figures.size.width, 8))
        lines = [
            self._verdict,
            f"step {e.step} of {e.steps} · loss {e.loss:.3f}",
            " · ".join(filter(None, [gates, "" if self._is_over else left])),
            drawn,
        ]
        self._figures.update("\n".join(filter(None, lines)))

    def _show_trials(self) -> None:
        lines = [f"after step {t.step}: {harmless(' '.join(t.text.split()))}" for t in self._tried]
        head = [harmless(f"“{self._tried[-1].question.strip()}”")] if self._tried else []
        self._trials.update("\n".join([*head, *lines]))
