"""The socket: an app served until a signal comes, with bounds on connections and on patience."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from c2c_mlx.errors import C2CError
from c2c_mlx.serving.refusal import Refusal

CONNECTIONS = 256
HEADER_BYTES = 1 << 14
HEADER_S = 10.0  # from the first byte of a request, or the connection, to its last header
IDLE_S = 30  # between two requests
SEND_S = 60.0  # that a client may take to read what waits for it
DRAIN_S = 120  # for answers that are being written when the server is told to end


class Protocol(H11Protocol):
    """uvicorn's, which alone would wait for ever for headers and readers, and refuse in text."""

    _patience: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The clock begins to run, and one connection too many is told so, whatever it asks."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # else the last of an answer would wait unnoticed
        if len(self.connections) > CONNECTIONS:
            full = Refusal(503, f"{CONNECTIONS} connections are open already: try again", wait_s=1)
            self.app = response = full.response()
            response.headers["Connection"] = "close"  # the next one may have room
        self._wait()

    def data_received(self, data: bytes) -> None:
        """It stops with the last header, and runs again from the first byte of the next ones."""
        super().data_received(data)
        is_over = self.cycle is None or self.cycle.response_complete
        if not is_over and self._patience:
            self._patience.cancel()
            self._patience = None
        elif is_over and not self._patience:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused with an object, as everything else is."""
        response = Refusal(400, msg).response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(response.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """Something waits for the client, and so would a close: who does not read is cut off."""
        super().pause_writing()
        self._unread = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        """All of it has been read."""
        super().resume_writing()
        if self._unread:
            self._unread.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        for timer in (self._patience, self._unread):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADER_S, self.transport.close)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, on which nobody listens yet.

    Raises:
        C2CError: if it can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as e:
        bound.close()
        raise _taken(host, port, e) from None
    return bound


def listen(bound: socket.socket) -> None:
    """Lets clients in; on Linux two may have bound an address, and the first to listen has it.

    Raises:
        C2CError: if it can't be had.
    """
    host, port = bound.getsockname()[:2]
    try:
        bound.listen()
    except OSError as e:
        raise _taken(host, port, e) from None


def _taken(host: str, port: int, error: Exception) -> C2CError:
    reason = getattr(error, "strerror", None) or error
    return C2CError(f"{host}:{port}: {reason}; take another --port")


def make_server(app: Starlette) -> uvicorn.Server:
    """A server for the app; `run` serves until SIGINT or SIGTERM, or `should_exit` is set."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=DRAIN_S,
        )
    )


def serve(app: Starlette, bound: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; answers that are being written then are written first.

    Raises:
        KeyboardInterrupt: after SIGINT.
    """
    # uvicorn raises the signals again that it was ended by; a SIGTERM has had its way then.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        make_server(app).run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
