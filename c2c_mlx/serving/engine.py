"""The one thread that touches MLX while a server runs: many jobs, a slice or a token at a time."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import device
from c2c_mlx.config import SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.serving.batch import Batch
from c2c_mlx.serving.caches import Caches
from c2c_mlx.serving.job import Accepted, Failed, Full, Job, Served, TooLong, Unavailable
from c2c_mlx.serving.reading import Team, position_nbytes
from c2c_mlx.serving.work import Desk, Work, take_up

_LONGEST_WAIT = 600  # seconds that a client is asked to wait, at most
_PAUSE_S = 0.01  # where nobody here has anything to do before somebody elsewhere has


@dataclass(frozen=True)
class Limits:
    """How much at once."""

    slots: int = 16  # answers that are written together
    queue: int = 64  # jobs that wait for a slot
    cache_gb: float | None = None  # of all conversations; None: half of what is left of the memory


class Engine(threading.Thread):
    """Loads a team and answers until it is closed.

    Jobs that are at work take turns: every round reads one slice of one prompt and writes one token
    of every answer. It is no daemon: the interpreter waits for it, so an exit is always clean.

    Args:
        load: called on the thread; whatever it raises ends it.
        sampling: for what a job leaves open.
        limits: how much at once.
    """

    def __init__(
        self, load: Callable[[], Team], sampling: SamplingConfig, limits: Limits | None = None
    ) -> None:
        super().__init__(name="inference")
        self.sampling, self.limits = sampling, limits or Limits()
        self.served: Future[Served] = Future()  # there when all is loaded
        self._load = load
        self._changed = threading.Condition()  # guards the two below
        self._queue: deque[tuple[Job, float]] = deque()  # with the time of arrival
        self._closing = False
        # Only of the thread itself:
        self._works: list[Work] = []
        self._head: Work | None = None  # the next one, which waits for room
        self._slices = 0  # that have been read
        self._pace = 1.0  # seconds between the ends of two jobs under load, about
        self._ended = 0.0

    # --- from any thread --------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Has a job done; its events say how.

        Raises:
            Full: if too many wait.
            Unavailable: if the thread has ended, or is about to.
            C2CError: if it can't be done here.
        """
        if job.n > self.limits.slots:
            raise C2CError(f"n = {job.n}: at most {self.limits.slots} answers at a time")
        with self._changed:
            if self._closing or not self.is_alive():
                raise Unavailable("nobody answers here any more: start the server again")
            self._queue = deque(waiting for waiting in self._queue if not waiting[0].gone)
            if len(self._queue) >= self.limits.queue:
                wait = math.ceil(self._pace * len(self._queue))
                raise Full(min(max(wait, 1), _LONGEST_WAIT))
            self._queue.append((job, time.perf_counter()))
            self._changed.notify()

    def status(self) -> dict[str, int]:
        """Jobs that wait, and jobs at work."""
        waiting = len(self._queue) + (self._head is not None)
        return {"waiting": waiting, "working": len(self._works)}

    def close(self) -> None:
        """Has the thread end as soon as it can; `join` waits for that."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    # --- on the thread itself ---------------------------------------------------------------

    def run(self) -> None:
        """The thread's life; called by `start`."""
        try:
            self._prepare()
            while self._wait():
                try:
                    self._round()
                except (RuntimeError, MemoryError) as e:
                    self._give_up(e)
        except BaseException as e:
            if self.served.done():
                traceback.print_exc()
            else:
                self.served.set_exception(e)
        finally:
            try:
                self._end()
            finally:
                mx.clear_streams()  # without it, one exit in twenty aborts

    def _prepare(self) -> None:
        team = self._load()
        writers = {id(lm.model): lm for lm in map(team.answering, team.modes)}
        batches = {key: Batch(lm, self.limits.slots) for key, lm in writers.items()}
        self._desk = Desk(team, Caches(), batches)
        self._written_nbytes = {
            key: kv.position_nbytes(lm.model) for key, lm in writers.items()
        }  # of one position of a batch's row
        self._kept_nbytes = {mode: position_nbytes(team, mode) for mode in team.modes}
        given = self.limits.cache_gb
        left = device.memory_limit() - mx.get_active_memory()
        self._budget = left // 2 if given is None else int(given * 1e9)
        # Only a model that is shared needs keys and values at all.
        dtype = str(kv.dtype_of(team.receiver.model)) if team.weights else ""
        self.served.set_result(
            Served(
                team.modes,
                team.receiver.name,
                tuple(sharer.name for sharer in team.sharers),
                team.receiver.context_length,
                team.fuse_response,
                self._budget / 1e9,
                int(time.time()),
                str(team.receiver.path),
                dtype.removeprefix("mlx.core."),
                team.weights,
            )
        )

    def _wait(self) -> bool:
        """Waits for work; False if there shall be no more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._queue or self._head or self._works
            )
            return not self._closing

    def _round(self) -> None:
        for work in [work for work in self._works if work.job.gone]:
            self._drop(work)
        self._admit()
        reading = [work for work in self._works if work.wait == "read"]
        for work in sorted(reading, key=lambda work: work.due)[:1]:
            self._slices += 1
            self._advance(work)
        for batch in self._desk.batches.values():
            batch.step()
        for work in [work for work in self._works if work.wait != "read"]:
            self._advance(work)
        self._desk.caches.shrink(self._budget - self._need(self._works))
        if self._works and all(work.wait == "others" for work in self._works):
            time.sleep(_PAUSE_S)

    def _admit(self) -> None:
        """Takes up the next job, if there is one, and a slot and memory for it."""
        if self._head is None:
            with self._changed:
                if not self._queue:
                    return
                job, arrived = self._queue.popleft()
            self._head = self._taken_up(job, arrived)
        if self._head is None or self._head.job.gone:
            self._head = None
            return
        taken = sum(work.job.n for work in self._works)
        no_room = self._works and self._need([*self._works, self._head]) > self._budget
        if no_room or taken + self._head.job.n > self.limits.slots:
            return
        work, self._head = self._head, None
        work.began = time.perf_counter()
        # A short prompt may overtake a long one by as many slices as it is shorter, and no more.
        work.due = self._slices + work.prompt.positions // device.prefill_slice()
        self._works.append(work)
        work.job.tell(Accepted())

    def _taken_up(self, job: Job, arrived: float) -> Work | None:
        """The job, ready to be worked on; None if there is no way to do it, which is told."""
        try:
            work = take_up(job, arrived, self._desk, self.sampling)
            if (need := self._need([work])) > self._budget:
                raise TooLong(
                    f"this conversation may take {need / 1e9:.2f} GB of caches, but the server "
                    f"has {self._budget / 1e9:.2f} GB for them: shorten it, or ask for fewer tokens"
                )
        except Exception as e:
            job.tell(Failed(e))
            return None
        return work

    def _need(self, works: Sequence[Work]) -> int:
        """Bytes of caches that these will have needed at the end, rows padded to the longest."""
        total = sum(self._kept_nbytes[work.job.mode] * work.positions for work in works)
        for key, nbytes in self._written_nbytes.items():
            rows = [work for work in works if key in self._writers(work)]
            longest = max((work.positions for work in rows), default=0)
            total += nbytes * longest * sum(work.job.n + work.job.crossed for work in rows)
        return total

    def _writers(self, work: Work) -> set[int]:
        """The batches that the work's answers are written in, a relay's text included."""
        answering = self._desk.team.answering(work.job.mode)
        return {id(lm.model) for lm in (work.prompt.lm, answering)}

    def _advance(self, work: Work) -> None:
        try:
            work.wait = next(work.steps)
        except StopIteration:
            self._works.remove(work)
            now = time.perf_counter()
            lasted = min(now - work.began, now - self._ended)
            self._pace += (lasted - self._pace) / 5
            self._ended = now
            work.job.tell(work.done(self._desk.team.gates_open))
        except (RuntimeError, MemoryError):
            raise  # the device's, so not this work's alone
        except Exception as e:
            self._works.remove(work)
            if not isinstance(e, C2CError):
                traceback.print_exc()
            work.job.tell(Failed(e))

    def _drop(self, work: Work) -> None:
        """Leaves a job whose client has gone."""
        self._works.remove(work)
        work.steps.close()

    def _give_up(self, error: Exception) -> None:
        """Gives up all works and caches: the device has failed."""
        traceback.print_exception(error)
        for batch in self._desk.batches.values():
            batch.fail(error)
        works, self._works = self._works, []
        for work in works:
            work.steps.close()
            work.job.tell(Failed(error))
        # On a GPU what failed counts as computed, and is told of late: no cache can be trusted.
        self._desk.caches.shrink(0)

    def _end(self) -> None:
        """Tells everybody who still waits, and lets go of all arrays."""
        with self._changed:
            self._closing = True
            waiting = [job for job, _ in self._queue]
            self._queue.clear()
        works = [*self._works, *([self._head] if self._head else [])]
        for job in [*(work.job for work in works), *waiting]:
            job.tell(Failed(Unavailable("the server ended before the answer did")))
        self._works, self._head = [], None
        self.__dict__.pop("_desk", None)
