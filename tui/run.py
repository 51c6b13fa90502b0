"""Opens the app, and closes it behind the user."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from c2c_mlx.config import Pair, SamplingConfig, from_dict
from c2c_mlx.events import Mode
from c2c_mlx.models import paths, registry
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import RIVALS, Conversation
from c2c_mlx.tui.session_file import SessionFile
from c2c_mlx.tui.terminal import Terminal


def run(
    pair: Pair,
    given: dict[str, Any],
    system: str | None,
    modes: Sequence[Mode] = (),
    resume: str | None = None,
) -> int:
    """Opens the app; returns when the user has left and the models' thread has ended.

    Args:
        pair: who talks.
        given: fields of the sampling that the user named; a session's own count for the others.
        system: a system prompt, or None: the session's own, should there be one.
        modes: who answers; none: those that answered last, or both rivals.
        resume: a saved session to go on with, "" for the latest; its pair counts.

    Raises:
        C2CError: if there is no such session, or it is open in another app.
    """
    talk, file = opened(pair, given, system, resume)
    answered = talk.turns[-1].answers if talk.turns else ()
    engine = InferenceThread(talk.pair, talk.sampling, talk.system)
    app = ChatApp(engine, talk, modes or tuple(answered) or RIVALS, file)
    app.driver_class = Terminal
    with asyncio.Runner() as runner:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Kept to the very end: a terminal that closes says so more than once.
            leaves = partial(app.exit, return_code=128 + number)
            runner.get_loop().add_signal_handler(number, leaves)
        try:
            runner.run(app.run_async())
        finally:
            leave(app, engine)
    return app.return_code or 0


def opened(
    pair: Pair, given: dict[str, Any], system: str | None, resume: str | None
) -> tuple[Conversation, SessionFile]:
    """The conversation to begin with and its file; see `run`."""
    file = SessionFile()
    talk = Conversation(_placed(pair)) if resume is None else file.load(resume)
    talk.sampling = from_dict(SamplingConfig, asdict(talk.sampling) | given, "arguments")
    talk.system = talk.system if system is None else system
    return talk, file


def _placed(pair: Pair) -> Pair:
    """With folders by their whole paths, for the session may be taken up in another folder."""
    return replace(
        pair,
        receiver=registry.placed(pair.receiver),
        sharers=tuple(map(registry.placed, pair.sharers)),
        fusers=tuple(map(paths.placed, pair.fusers)),
    )


def leave(app: ChatApp, engine: InferenceThread) -> None:
    """Ends the models' thread, and keeps what it has said up to its last word."""
    engine.close()
    app.follower.take_in()
    app.save()
    if engine.is_alive():
        engine.join(timeout=1)
        if engine.is_alive():
            app.complain("ending what the models were doing")
        engine.join()
    app.follower.take_in()
    app.save()
    if app.file:
        app.file.close()
