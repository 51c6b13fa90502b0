"""The dialect of receivers on other machines: ids in, keys and values out, slice by slice."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from c2c_mlx.models.remote import FILES
from c2c_mlx.serving.exchange import Events, Stream, or_gone, read_body
from c2c_mlx.serving.job import CacheJob, Done, Event, Failed, Served, Slice
from c2c_mlx.serving.refusal import Refusal, mistake

PIECE_BYTES = 1 << 18  # that a slow network carries in the time that a client has to read them
SIGN_S = 10.0  # after which one of life is sent, if there is nothing else
_NOTHING = np.empty((0, 0, 0, 0), np.uint16)
_SIGN = Slice(save({"keys": _NOTHING, "values": _NOTHING}))


class CacheRequest(BaseModel):
    """The body of a request for a cache."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ids: list[int] = Field(min_length=1)  # of the whole conversation; one below zero is padding
    since: int = Field(ge=0)  # positions that the other side has already
    layers: list[int] = Field(min_length=1)
    files: dict[str, str]  # what it takes the model for


async def about(request: Request) -> Response:
    """GET /v1/caches: what is shared."""
    served: Served = request.app.state.served
    files = await run_in_threadpool(_digests, served.folder)
    what = {"name": served.receiver, "dtype": served.dtype, "weights": served.weights}
    return JSONResponse(what | {"files": files})


async def file(request: Request) -> Response:
    """GET /v1/caches/{name}: a file of the tokenizer's, or the model's configuration."""
    served: Served = request.app.state.served
    name = request.path_params["name"]
    path = Path(served.folder) / name
    if name not in FILES or not path.is_file():
        raise Refusal(404, f"no file {name[:80]!r} is shared")
    return FileResponse(path, media_type="application/octet-stream")


async def caches(request: Request) -> Response:
    """POST /v1/caches.

    The answer is a row of slices, each behind its length in four bytes, the last one empty: keys
    and values [layers, heads, positions, head_dim], as safetensors. Some hold nothing: while others
    have their turn, they are signs of life.
    """
    served: Served = request.app.state.served
    try:
        asked = CacheRequest.model_validate_json(await read_body(request))
    except ValidationError as e:
        raise mistake(e) from None
    if asked.files != await run_in_threadpool(_digests, served.folder):
        raise Refusal(409, "another model is shared here by now: start again")
    if asked.since >= len(asked.ids):
        raise Refusal(400, "since: there is nothing new in these ids", "since")
    events = Events()
    job = CacheJob("receiver", [], events.put)
    job.ids, job.since, job.layers = asked.ids, asked.since, asked.layers
    request.app.state.engine.submit(job)
    try:
        first = await or_gone(request, events.get())
        if isinstance(first, Failed):
            raise first.error
        return Stream(job, _frames(job, events), "application/octet-stream")
    except BaseException:
        job.gone = True
        raise


ROUTES = [
    Route("/v1/caches", about, methods=["GET"]),
    Route("/v1/caches", caches, methods=["POST"]),
    Route("/v1/caches/{name}", file, methods=["GET"]),
]


async def _frames(job: CacheJob, events: Events) -> AsyncIterator[bytes]:
    """An error in the midst of it ends the row too early, which the other side sees."""
    event: Event | None = None
    while not isinstance(event, Done | Failed):
        try:
            async with asyncio.timeout(SIGN_S):
                event = await events.get()
        except TimeoutError:
            event = _SIGN
        match event:
            case Slice():
                frame = len(event.data).to_bytes(4) + event.data
                for at in range(0, len(frame), PIECE_BYTES):
                    yield frame[at : at + PIECE_BYTES]
                job.sent += event is not _SIGN
            case Done():
                yield bytes(4)


@lru_cache
def _digests(folder: str) -> dict[str, Any]:
    paths = [path for name in FILES if (path := Path(folder) / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
