"""Engines over the tiny pair, jobs whose events are gathered, servers in a thread, and requests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from queue import SimpleQueue
from typing import Any

from starlette.applications import Starlette

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.fusers import disk
from c2c_mlx.models.load import load_model
from c2c_mlx.serving.app import make_app
from c2c_mlx.serving.engine import Engine, Limits
from c2c_mlx.serving.job import Done, Ended, Event, Failed, Job, Piece
from c2c_mlx.serving.reading import Team
from c2c_mlx.serving.server import bind, make_server
from c2c_mlx.talk.links import link
from c2c_mlx.training.fingerprint import of_weights

SAMPLING = SamplingConfig(max_tokens=24)


def load_team(pair: Pair, **options: Any) -> Team:
    """The pair as a server has it; on the thread that will use it."""
    receiver, sharer = load_model(pair.receiver), load_model(pair.sharers[0])
    fuser = disk.load(pair.fusers[0])
    return Team(receiver, [sharer], [link(receiver, sharer, fuser)], **options)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


QUESTION = asked("Who wrote it?")


def chat(**options: Any) -> dict[str, Any]:
    return {"model": "c2c", "messages": QUESTION, "max_tokens": 4} | options


def send(
    port: int, body: Any, method: str = "POST", path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers of one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    with contextlib.closing(connection):
        given = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}"), dict(answer.headers)


class Heard:
    """A job's events, in order."""

    def __init__(self, engine: Engine, mode: Any, messages: Any, **options: Any) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.job = Job(mode, messages, self.events.put, **options)
        engine.submit(self.job)

    def until(self, *kinds: type) -> Event:
        """The first event of one of these kinds."""
        while not isinstance(event := self.events.get(timeout=60), kinds):
            pass
        return event

    def all(self) -> list[Event]:
        """All there are, the last one included."""
        seen: list[Event] = []
        while not seen or not isinstance(seen[-1], Done | Failed):
            seen.append(self.events.get(timeout=60))
        return seen

    def answers(self) -> tuple[list[str], list[str], Done]:
        """Texts and reasons of the choices, and what they cost."""
        texts, reasons = [""] * self.job.n, [""] * self.job.n
        while True:
            match event := self.events.get(timeout=60):
                case Piece():
                    texts[event.choice] += event.text
                case Ended():
                    reasons[event.choice] = event.reason
                case Failed():
                    raise event.error
                case Done():
                    return texts, reasons, event


@contextmanager
def running(pair: Pair, limits: Limits | None = None, **options: Any) -> Iterator[Engine]:
    """An engine that has loaded the pair, and ends with the block."""
    with started(Engine(lambda: load_team(pair, **options), SAMPLING, limits)) as engine:
        yield engine


@contextmanager
def sharing(name: str) -> Iterator[Engine]:
    """An engine that has loaded one model for receivers elsewhere."""

    def load() -> Team:
        lm = load_model(name)
        return Team(lm, weights=of_weights(lm.model))

    with started(Engine(load, SAMPLING)) as engine:
        yield engine


@contextmanager
def started(engine: Engine) -> Iterator[Engine]:
    """An engine that has loaded, and ends with the block."""
    engine.start()
    try:
        engine.served.result(timeout=60)
        yield engine
    finally:
        engine.close()
        engine.join(timeout=60)
        assert not engine.is_alive()


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[int]:
    """The engine behind a socket of this machine; gives the port."""
    with listening(make_app(engine, engine.served.result(), **options)) as port:
        yield port


@contextmanager
def listening(app: Starlette) -> Iterator[int]:
    """An app behind a socket of this machine, until the block ends; gives the port."""
    bound = bind("127.0.0.1", 0)
    server = make_server(app)
    bound.listen()  # whoever comes before the server does waits
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        bound.close()
        assert not thread.is_alive()
