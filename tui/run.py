"""Opens the app, and closes it behind the user."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import MODES, Mode
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui import conversation
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.listener import RIVALS


def run(
    pair: Pair,
    sampling: SamplingConfig,
    system: str | None,
    modes: Sequence[Mode] = (),
    resume: str | None = None,
) -> int:
    """Opens the app; returns when the user has left and the models' thread has ended.

    Args:
        pair: who talks.
        sampling: the same for every mode.
        system: a system prompt, or None.
        modes: who answers; none: those that answered last, or both rivals.
        resume: a saved session to go on with, "" for the latest; its pair and settings count.

    Raises:
        C2CError: if there is no such session.
    """
    talk = Conversation(pair, sampling, system)
    if resume is not None:
        talk = conversation.load(resume)
    last = talk.turns[-1].answers if talk.turns else ()
    engine = InferenceThread(talk.pair, talk.sampling, talk.system)
    if talk.turns:
        engine.restore({mode: talk.history(mode) for mode in MODES})
    app = ChatApp(engine, talk, modes or tuple(last) or RIVALS)
    try:
        app.run()
    finally:
        engine.close()
        if engine.is_alive():
            engine.join(timeout=1)
            if engine.is_alive():
                print("c2c-chat: ending what the models were doing", file=sys.stderr)
            engine.join()
    return app.return_code or 0
