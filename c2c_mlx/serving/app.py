"""The whole endpoint: every dialect's routes, health, and who is let in at all."""

from __future__ import annotations

import hmac

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from c2c_mlx.errors import C2CError
from c2c_mlx.serving import openai, share
from c2c_mlx.serving.engine import Engine
from c2c_mlx.serving.job import Served
from c2c_mlx.serving.refusal import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_app(
    engine: Engine,
    served: Served,
    api_key: str | None = None,
    shares: bool = False,
) -> Starlette:
    """The endpoint over an engine that has loaded.

    Args:
        engine: does the jobs.
        served: what it has.
        api_key: that every request but for health must bring; None: no request must, and none may
            come here by another name than this machine has for itself.
        shares: whether receivers on other machines may have its receiver's caches.
    """
    routes = [Route("/health", health, methods=["GET"]), *openai.ROUTES]
    app = Starlette(
        routes=[*routes, *share.ROUTES] if shares else routes,
        middleware=[Middleware(Guard, api_key=api_key)],
        exception_handlers={
            Refusal: _refuse,
            C2CError: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _nobody_listens,
            Exception: _refuse,
        },
    )
    app.state.engine, app.state.served = engine, served
    return app


async def health(request: Request) -> Response:
    """GET /health: whether somebody answers here, and how much there is to do."""
    engine: Engine = request.app.state.engine
    if not engine.is_alive():
        return JSONResponse({"status": "the inference thread has ended"}, 503)
    return JSONResponse({"status": "ok"} | engine.status())


class Guard:
    """Refuses who may not ask.

    A page of another site can have a browser send a request to any address: such a request names
    its origin. One whose name was made to lead here (DNS rebinding) names that as its host;
    it has no key, so where there is one, the host may be any: that of a proxy.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets in or refuses; see ASGI."""
        if scope["type"] != "http":
            return
        try:
            self._check(scope["path"], Headers(scope=scope))
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refusal(403, "requests of other sites' pages are refused")
        if self.api_key is None:
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name.strip("[]") not in LOOPBACK:
                raise Refusal(403, f"nobody is called {name[:80]!r} here")
        elif path != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self.api_key.encode()):
                raise Refusal(401, "send the server's key: Authorization: Bearer KEY")


async def _refuse(request: Request, error: Exception) -> Response:
    return Refusal.of(error).response()


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    response = Refusal(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads
