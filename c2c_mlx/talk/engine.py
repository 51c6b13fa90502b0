"""The one thread that touches MLX: jobs go in by a queue, events come out by another.

MLX's arrays, streams and random state belong to the thread that made them, so this one loads,
reads, writes and cleans up. Whoever shows the events calls the methods below and never waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import (
    EngineEvent,
    Failed,
    Gates,
    Link,
    LiveGates,
    Loaded,
    Mode,
    Prefilling,
    Text,
    TrainingOver,
    TurnOver,
    fitting,
)
from c2c_mlx.progress import Progress
from c2c_mlx.talk.explain import explain as explain

if TYPE_CHECKING:
    from pathlib import Path

    from c2c_mlx.models.memory import Need
    from c2c_mlx.talk.session import ChatSession

HISTORIES = Mapping[Mode, Sequence[tuple[str, str, str]]]  # question, relayed text, answer


class _Closing(Exception):
    """Leaves a load that nobody waits for any more."""


class InferenceThread(threading.Thread):
    """Loads a pair, then does one job after the other until it is closed.

    Every method may be called from any thread, in any state, and returns at once. It is no daemon:
    the interpreter waits for it, so an exit is always clean.

    Args:
        pair: whom to load first.
        sampling: the same for every mode.
        system: a system prompt, or None.
    """

    def __init__(self, pair: Pair, sampling: SamplingConfig, system: str | None = None) -> None:
        super().__init__(name="inference")
        self.pair, self.sampling, self.system = pair, sampling, system
        self.events: SimpleQueue[EngineEvent] = SimpleQueue()
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._session: ChatSession | None = None
        self._own_gates: tuple[Gates, ...] = ()  # each fuser's, as it was loaded
        self._asked = self._called_off = 0  # turns are numbered; these are the last ones
        self._turn = 0
        self._question = ""  # the latest
        self._lesson: Iterator[None] | None = None  # goes on where there is no job
        self._lessons = self._begun = self._dismissed = 0  # numbered as turns are
        self._closing = False
        self._jobs.put(self._load)

    # --- from any thread --------------------------------------------------------------------

    def drain(self) -> list[EngineEvent]:
        """The events since the last call, in order."""
        events = []
        try:
            while True:
                events.append(self.events.get_nowait())
        except Empty:
            return events

    def ask(self, question: str, modes: Sequence[Mode], attempt: int = 0) -> None:
        """Has the modes answer one after the other, so that each has the machine to itself.

        Args:
            question: the user's message.
            modes: who answers, in this order.
            attempt: added to the seed, so that a second answer to a question may be another one.
        """
        self._asked += 1
        turn, self._question = self._asked, question
        self._jobs.put(lambda: self._answer(turn, question, modes, attempt))

    def stop(self) -> None:
        """Ends everything asked so far; what has been said stays in the conversation."""
        self._called_off = self._asked
        if self._session is not None:
            self._session.stop()

    def train(self, seconds: float) -> None:
        """Trains a fuser for the pair beside everything else, or goes on where that was stopped.

        Args:
            seconds: that a new run may take, once its data is there.
        """
        self._lessons += 1
        lesson = self._lessons

        def job() -> None:
            from c2c_mlx.talk.lesson import teach

            session = self._ready
            if self._lesson is None:
                self._begun = lesson
                self._lesson = teach(
                    self.pair,
                    (session.receiver, session.sharers[0]),
                    seconds,
                    self.events.put,
                    lambda: self._question,
                    lambda: lesson <= self._dismissed or self._closing,
                )

        self._jobs.put(job)

    def stop_training(self) -> None:
        """Ends training after its step, and keeps what was learned."""
        self._dismissed = self._lessons

    def weigh(self) -> None:
        """Has it said what each word of C2C's latest answer owes to the sharer, if there is one."""

        def job() -> None:
            if crossed := self._ready.crossed():
                self.events.put(crossed)

        self._jobs.put(job)

    def undo(self, modes: Sequence[Mode]) -> None:
        """Takes back the last turn of each mode."""

        def job() -> None:
            for mode in modes:
                self._ready.undo(mode)

        self._jobs.put(job)

    def restore(self, histories: HISTORIES, gates: Sequence[Gates]) -> None:
        """Forgets the conversations, takes up these, and cuts the fusers, if the gates fit them."""

        def job() -> None:
            self._ready.reset()
            for mode, turns in histories.items():
                self._ready.restore(mode, turns)
            self._ready.set_gates(fitting(gates, self._own_gates))
            self._question = next((turns[-1][0] for turns in histories.values() if turns), "")

        self._jobs.put(job)

    def set_gates(self, gates: Sequence[Gates]) -> None:
        """Opens and closes each fuser's gates, from the next answer on."""
        self._jobs.put(lambda: self._ready.set_gates(gates))

    def configure(self, sampling: SamplingConfig, system: str | None) -> None:
        """Changes how answers are made, from the next one on."""

        def job() -> None:
            self.sampling, self.system = sampling, system
            if self._session is not None:
                self._session.sampling, self._session.system = sampling, system

        self._jobs.put(job)

    def reload(self, pair: Pair) -> None:
        """Loads another pair, or the same again after a download that failed."""

        def job() -> None:
            self._end_training()
            self.pair, self._session = pair, None
            self._load()

        self._jobs.put(job)

    def close(self) -> None:
        """Has the thread end as soon as it can; `join` waits for that."""
        self._closing = True
        self.stop()
        self._jobs.put(None)

    # --- on the thread itself ---------------------------------------------------------------

    def run(self) -> None:
        """The thread's life; called by `start`."""
        import c2c_mlx.blas  # noqa: F401

        import mlx.core as mx

        try:
            while (job := self._next()) is not None and not self._closing:
                try:
                    job()
                except _Closing:
                    break
                except Exception as e:
                    self.events.put(Failed(explain(e)))
        finally:
            self._end_training()
            self._session = None
            mx.clear_streams()  # without it, one exit in twenty aborts

    def _next(self) -> Callable[[], object] | None:
        """The next job; a step of training where there is none."""
        try:
            return self._jobs.get(block=self._lesson is None)
        except Empty:
            return self._train_on

    def _train_on(self) -> None:
        assert self._lesson is not None
        try:
            next(self._lesson)
        except StopIteration:
            self._lesson = None
        except Exception:
            self._lesson = None
            self.events.put(TrainingOver(0, 0))
            raise

    def _end_training(self) -> None:
        """Has it keep what was learned; one that was asked for since is yet to come."""
        self._dismissed = max(self._dismissed, self._begun)
        while self._lesson is not None:
            try:
                self._train_on()
            except Exception as e:
                self.events.put(Failed(explain(e)))

    def _load(self) -> None:
        from c2c_mlx import blas, device
        from c2c_mlx.fusers import disk
        from c2c_mlx.fusion.fuser import Fuser
        from c2c_mlx.models import memory
        from c2c_mlx.models.load import LanguageModel, find_folder, load_model
        from c2c_mlx.talk.opening import open_session

        pair = self.pair
        self._report(Progress(f"loading {pair.receiver}", 0, 0))
        if blas.notice and device.is_dense():
            self.events.put(Failed(blas.notice))
        answering = find_folder(pair.receiver, self._report)
        need = memory.preflight(answering)
        receiver = load_model(pair.receiver, progress=self._report)
        known: dict[str, LanguageModel] = {}
        sharers: list[LanguageModel] = []

        def session(*fusers: Fuser) -> ChatSession:
            return open_session(
                pair,
                receiver,
                sharers,
                fusers,
                sampling=self.sampling,
                system=self.system,
                on_prefill=self._prefilled,
            )

        # What is missing costs the modes that need it, not the conversation.
        missing, fusers = "", list[Fuser]()
        try:
            reading = [find_folder(sharer, self._report) for sharer in pair.sharers]
            need = memory.preflight(answering, reading)
            for wanted in pair.sharers:
                if wanted not in known:
                    known[wanted] = load_model(wanted, progress=self._report)
                sharers.append(known[wanted])
            folders = self._find_fusers()
            sizes = [disk.measure(folder) for folder in folders]
            need = memory.preflight(answering, reading, sizes, bits=pair.fuser_bits)
            fusers = [disk.load(folder, pair.fuser_bits) for folder in folders]
            self._session = session(*fusers)
        except C2CError as e:
            missing, fusers = str(e), []
            self._session = session()
        self._own_gates = self._session.gates
        self._warm_up(session(*fusers))
        self.events.put(self._loaded(self._session, need, missing))

    def _warm_up(self, session: ChatSession) -> None:
        """Pages weights in and compiles kernels, which the first to answer would pay for all.

        Args:
            session: one of its own, so that nobody finds half of a prompt in its caches.
        """
        self._report(Progress("warming up", 0, 0))
        session.on_prefill = lambda event: self._report(Progress("warming up", 0, 0))
        # Not the relay, which writes at length: it is the sharer and the receiver.
        modes: list[Mode] = ["receiver"]
        modes += ["sharer"] if session.sharers else []
        modes += ["c2c"] if session.links else []
        for mode in modes:
            # What fails here is said when a user asks for it.
            with suppress(Exception), closing(session.ask("Hello", mode)) as answer:
                list(islice(answer, 2))  # tokens, be they thoughts

    def _loaded(self, session: ChatSession, need: Need, missing: str) -> Loaded:
        from c2c_mlx import device
        from c2c_mlx.fusers.trained import pair_name
        from c2c_mlx.talk.lesson import outlook

        named = [given or pair_name(self.pair.receiver, s) for s, given in self.pair.links]
        fusers = [link.fuser for link in session.links]
        parts = zip(session.sharers, named, fusers, session.gates, strict=False)
        return Loaded(
            receiver=session.receiver.name,
            sharers=tuple(sharer.name for sharer in session.sharers),
            links=tuple(
                Link(sharer.name, name, fuser.config.layer_map, gates, tuple(fuser.kinds))
                for sharer, name, fuser, gates in parts
            ),
            memory_gb=_memory_gb(),
            device=device.describe(),
            context_length=session.receiver.context_length,
            receiver_layers=len(session.receiver.model.layers),
            needs=str(need),
            missing=missing,
            is_elsewhere=any(sharer.is_elsewhere for sharer in session.sharers[:1]),
            **outlook(self.pair),
        )

    def _find_fusers(self) -> list[Path]:
        from c2c_mlx.fusers.store import find_for_pair

        return [
            find_for_pair(self.pair.receiver, sharer, given, self._report)
            for sharer, given in self.pair.links
        ]

    def _answer(self, turn: int, question: str, modes: Sequence[Mode], attempt: int) -> None:
        try:
            self._answers(turn, question, modes, attempt)
        except Exception as e:
            self.events.put(Failed(explain(e)))
        finally:
            self.events.put(TurnOver(_memory_gb()))

    def _answers(self, turn: int, question: str, modes: Sequence[Mode], attempt: int) -> None:
        session, self._turn = self._ready, turn
        session.sampling = replace(self.sampling, seed=(self.sampling.seed + attempt) % 2**64)
        for mode in modes:
            if self._cancelled:
                return
            self.events.put(Prefilling(mode, 0, 0))
            try:
                answered = False
                for event in session.ask(question, mode):
                    if self._cancelled:
                        session.stop()
                    answered = answered or isinstance(event, Text)
                    self.events.put(event)
                    # Figures of the gates take time: in a race, not before the answer has ended.
                    is_live = session.fuse_response and mode == "c2c" and len(modes) == 1
                    if is_live and isinstance(event, Text):
                        for report in session.gate_reports(of_last_token=True):
                            self.events.put(LiveGates(report))
                if mode == "c2c" and answered:
                    for report in session.gate_reports():
                        self.events.put(report)
            except Exception as e:
                self.events.put(Failed(explain(e), mode))

    def _prefilled(self, event: Prefilling) -> None:
        self.events.put(event)
        if self._cancelled and self._session is not None:
            self._session.stop()

    def _report(self, progress: Progress) -> None:
        if self._closing:
            raise _Closing
        self.events.put(progress)

    @property
    def _cancelled(self) -> bool:
        return self._closing or self._turn <= self._called_off

    @property
    def _ready(self) -> ChatSession:
        if self._session is None:
            raise C2CError(f"no model is loaded: {self.pair.receiver} could not be had")
        return self._session


def _memory_gb() -> float:
    import mlx.core as mx

    return float(mx.get_active_memory() / 1e9)
