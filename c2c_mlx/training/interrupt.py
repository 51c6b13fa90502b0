"""Ctrl-C in a long job: the first one ends it at the next good moment, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx


@contextmanager
def noticed(say: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, and `say` called; the next is raised as ever.

    Works in the main thread, where Python hears of signals.

    Yields:
        Whether there was one.
    """
    noted: list[threading.Thread] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        # In a thread: this one may be in the middle of printing, which would then be done twice.
        noted.append(threading.Thread(target=say))
        noted[0].start()

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
        for thread in noted:
            thread.join()


def anywhere(stopped: Callable[[], bool]) -> Callable[[], bool]:
    """As `stopped`, of any process of a run: one that stops alone leaves the others waiting for it.

    All of them have to ask.
    """
    group = mx.distributed.init()
    if group.size() == 1:
        return stopped
    return lambda: bool(mx.distributed.all_sum(mx.array(int(stopped())), group=group).item())
