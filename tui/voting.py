"""Blind votes: the ballot when no other dialog is open, and what is said of the vote."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

from c2c_mlx.tui import votes
from c2c_mlx.tui.conversation import NAMES, Turn
from c2c_mlx.tui.screens.ballot import Ballot
from c2c_mlx.tui.screens.main import MainScreen
from c2c_mlx.tui.state import State


class Voting:
    """Between the end of a blind turn and the vote.

    Args:
        state: the app's.
        screen: above which the ballot is shown.
        reveal: shows whose answer is whose.
        keep: writes a vote down.
    """

    def __init__(
        self,
        state: State,
        screen: MainScreen,
        *,
        reveal: Callable[[Turn], Awaitable[None]],
        keep: Callable[[votes.Vote], None],
    ) -> None:
        self.state, self.screen, self._reveal, self._keep = state, screen, reveal, keep
        self._unvoted: Turn | None = None  # its ballot waits until other dialogs are closed

    def ask(self, turn: Turn) -> None:
        """Has the user vote on a turn."""
        self._unvoted = turn
        self.open()

    def open(self) -> None:
        """Opens the ballot that waited until no other dialog was open: a key is not a vote."""
        turn, app = self._unvoted, self.screen.app
        both = turn.latest.rivals() if turn else None
        if turn and both and app.screen is self.screen:
            self._unvoted = None
            c2c, relay = (answer.text for answer in both)
            app.push_screen(Ballot(c2c, relay, random.random() < 0.5), partial(self._voted, turn))

    def tell(self) -> None:
        """What the votes come to."""
        if self.state.loaded is not None:
            pair = votes.pair(self.state.loaded)
            self.screen.app.notify(votes.summary(*pair), title="Votes", markup=False)

    async def _voted(self, turn: Turn, choice: votes.Choice | None) -> None:
        await self._reveal(turn)
        loaded = self.state.loaded
        if choice is None or loaded is None:
            return
        pair, modified = votes.pair(loaded), turn.latest.gates != loaded.gates
        self._keep(votes.Vote(choice, *pair, modified=modified))
        said = "a tie" if choice == "tie" else f"you preferred {NAMES[choice]}"
        self.screen.app.notify(f"{said}\n{votes.summary(*pair)}", title="Vote", markup=False)
