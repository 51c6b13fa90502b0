"""Training from within the app: offered, begun, stopped, gone on with, and asked after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from c2c_mlx.config import Pair
from c2c_mlx.events import Mode, TrainingBegun, TrainingOver, TrainingStep, Trial
from c2c_mlx.tui.backend import Backend
from c2c_mlx.tui.conversation import Answer, Turn
from c2c_mlx.tui.screens.main import MainScreen
from c2c_mlx.tui.screens.offer import REVERSE, Offer
from c2c_mlx.tui.state import State


class Training:
    """Between the user, the backend's training and what is shown of it.

    Args:
        backend: trains.
        state: the app's.
        screen: shows it.
        load_again: has the models loaded again, with the fuser that there is now.
        ask: has modes answer a turn's latest take.
        turn_round: begins a conversation with another pair.
    """

    def __init__(
        self,
        backend: Backend,
        state: State,
        screen: MainScreen,
        *,
        load_again: Callable[[], None],
        ask: Callable[[Turn, Sequence[Mode]], Awaitable[None]],
        turn_round: Callable[[Pair], Awaitable[None]],
    ) -> None:
        self.backend, self.state, self.screen = backend, state, screen
        self._load_again, self._ask, self._turn_round = load_again, ask, turn_round
        self._over: TrainingOver | None = None  # and what it left is not loaded yet
        self._has_begun = False
        self._pair = state.conversation.pair  # that is trained

    def toggle(self) -> None:
        """Offers training, goes on with it, or stops it."""
        state, loaded, app = self.state, self.state.loaded, self.screen.app
        if state.is_training:
            self.backend.stop_training()
            self.screen.say("training ends with what it is at, and what was learned is kept")
        elif self._over:
            app.notify("what was learned is loaded when the answer is there", severity="warning")
        elif loaded is None:
            app.notify("the models are not loaded yet", severity="warning")
        elif len(loaded.sharers) != 1:
            app.notify("training is between one sharer and the receiver", severity="warning")
        elif loaded.unfinished:
            self._begin(0)
        elif loaded.links:
            app.notify(f"there is a fuser already: {loaded.links[0].fuser}; c2c-train makes others")
        else:
            app.push_screen(Offer(loaded), self._chosen)

    async def _chosen(self, choice: float | str | None) -> None:
        if choice == REVERSE:
            pair = self.state.conversation.pair
            await self._turn_round(Pair(pair.sharers[0], (pair.receiver,)))
        elif isinstance(choice, float | int):
            self._begin(choice)

    def _begin(self, seconds: float) -> None:
        self.state.is_training, self._has_begun = True, False
        self._pair = self.state.conversation.pair
        self.screen.panes["c2c"].say("training")
        self.screen.say("getting ready to train: Ctrl+S stops")
        self.backend.train(seconds)

    async def follow(self, event: TrainingBegun | TrainingStep | Trial | TrainingOver) -> None:
        """Shows what the backend says of it."""
        view = self.screen.panes["c2c"].training
        match event:
            case TrainingBegun():
                self._has_begun = True
                self.screen.end_progress()
                view.begin(event)
                if not self.state.is_busy:
                    self.screen.say("training: the other panes can be asked meanwhile")
            case TrainingStep():
                view.step(event)
            case Trial():
                view.try_out(event)
            case TrainingOver():
                await self._end(event)

    async def _end(self, event: TrainingOver) -> None:
        self.state.is_training = False
        self.screen.end_progress()
        pane = self.screen.panes["c2c"]
        if self._pair != self.state.conversation.pair:
            pane.training.hide()
        elif not event.steps:
            pane.training.hide()
            pane.say("no fuser")
            if not self.state.is_busy:
                self.screen.say("training came to nothing; Ctrl+S tries again")
        else:
            far = f"stopped at step {event.step} of {event.steps} · Ctrl+S goes on"
            whole = f"{event.steps} steps done"
            pane.training.end(whole if event.is_whole else far, event.verdict)
            pane.say("")
        is_loading = self.state.loaded is None  # which finds what was kept by itself
        if self._has_begun and not is_loading:  # an error leaves what was kept before it, too
            self._over = event
            await self.settle()

    async def settle(self) -> None:
        """Loads what was learned; not while an answer is given, for that would be forgotten."""
        if self._over is None or self.state.is_busy:
            return
        is_whole, self._over = self._over.is_whole, None
        self._load_again()
        if is_whole:
            await self._ask_again()

    async def _ask_again(self) -> None:
        """Asks C2C the latest question, now that it can answer."""
        state, turn = self.state, self.state.turn
        if turn is None or state.is_busy or "c2c" not in state.modes:
            return
        if turn.answers.get("c2c", Answer()).is_kept:
            self.backend.undo(["c2c"])
        turn.takes.append(state.conversation.take(["c2c"], state.gates, state.attempt))
        await self._ask(turn, ["c2c"])
