"""One request of HTTP and its job: bounded on the way in, and given up with its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from c2c_mlx.serving.job import Done, Event, Failed, Job
from c2c_mlx.serving.refusal import Refusal

BODY_BYTES = 1 << 20  # some 250,000 tokens
BODY_S = 30.0

T = TypeVar("T")


async def read_body(request: Request) -> bytes:
    """The body, which must be JSON, not too long, and not too slow.

    Raises:
        Refusal: if it is not.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a browser may send other types to any address unasked
        raise Refusal(415, "send application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > BODY_BYTES:
                    raise Refusal(413, f"a request has at most {BODY_BYTES} bytes")
    except TimeoutError:
        raise Refusal(408, f"a request must be there within {BODY_S:.0f} s") from None
    return bytes(body)


class Events:
    """What the inference thread tells of one job, for the event loop that this was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Takes an event; from any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self) -> Event:
        """The next one."""
        return await self._queue.get()

    async def rest(self) -> list[Event]:
        """All that are still to come."""
        return [event async for event in self]

    async def __aiter__(self) -> AsyncIterator[Event]:
        event: Event | None = None
        while not isinstance(event, Done | Failed):
            yield (event := await self._queue.get())


async def or_gone(request: Request, wanted: Coroutine[Any, Any, T]) -> T:
    """What is waited for, if the client waits, too.

    Raises:
        ClientDisconnect: if it has gone.
    """
    waiting = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise ClientDisconnect
    finally:
        waiting.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """What a job tells as it goes; it is given up when that can't be sent any more."""

    def __init__(
        self, job: Job, content: AsyncIterator[str | bytes], kind: str = "text/event-stream"
    ) -> None:
        super().__init__(content, media_type=kind)
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would gather it
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends; see ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.gone = True
