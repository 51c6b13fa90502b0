"""OpenAI's dialect: chat completions, whole and streamed, and the list of models."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from c2c_mlx.events import Mode
from c2c_mlx.serving.exchange import Events, Stream, or_gone, read_body
from c2c_mlx.serving.job import Done, Ended, Event, Failed, Job, Piece, Sampling, Served, Token
from c2c_mlx.serving.refusal import Refusal, mistake

MESSAGES = 1024  # of a conversation, at most
# What would change an answer can't just be let be.
_UNSUPPORTED = (
    *("tools", "functions", "logit_bias", "audio", "web_search_options"),
    *("frequency_penalty", "presence_penalty"),
)
_TOLD_AS_USAGE = {"prompt_tokens", "cached_tokens", "completion_tokens"}


class _Typed(BaseModel):
    """JSON that is what it says: no text for numbers, no infinities; unknown keys are let be."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Message(_Typed):
    """One message; the text parts of a list are its lines."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return "" if content is None else content
        lines = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"only parts of type text are read, not {str(kind)[:40]}")
            lines.append(part["text"])
        return "\n".join(lines)


class StreamOptions(_Typed):
    """What a stream tells besides its text."""

    include_usage: bool | None = None


class ResponseFormat(_Typed):
    """Text is the only one."""

    type: str


class C2COptions(_Typed):
    """What OpenAI's dialect has no words for."""

    crossed: bool | None = None  # what each token of the answer owes to the sharers


class ChatRequest(_Typed):
    """The body of a request for chat completions; null is as good as nothing."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int | None = Field(None, ge=1)
    stop: list[str] | None = Field(None, max_length=4)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    c2c: C2COptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, body: Any) -> Any:
        for name in _UNSUPPORTED if isinstance(body, dict) else ():
            if body.get(name):
                raise ValueError(f"{name} is not supported: leave it out")
        return body

    @field_validator("response_format")
    @classmethod
    def _text(cls, wanted: ResponseFormat | None) -> ResponseFormat | None:
        if wanted and wanted.type != "text":
            raise ValueError(f"only text is written, not {wanted.type[:40]}")
        return wanted

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _short(cls, stop: list[str] | None) -> list[str] | None:
        if any(not 0 < len(text) <= 256 for text in stop or []):
            raise ValueError("a stop text has 1 to 256 characters")
        return stop

    @model_validator(mode="after")
    def _top_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    def job(self, served: Served, emit: Callable[[Event], object]) -> Job:
        """What is to be done.

        Raises:
            Refusal: if nobody of that name answers here.
        """
        mode = _mode(self.model, served)
        messages = [message.model_dump() for message in self.messages]
        for message in messages:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
        if mode == "relay" and messages[-1]["role"] != "user":
            raise Refusal(400, "a relay answers a message of the user's", "messages")
        crossed = bool(self.c2c and self.c2c.crossed)
        if crossed and (mode != "c2c" or (self.n or 1) > 1):
            raise Refusal(400, "what crossed is told of one answer of c2c", "c2c.crossed")
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        return Job(
            mode,
            messages,
            emit,
            Sampling(
                self.max_completion_tokens or self.max_tokens, self.temperature, self.top_p, seed
            ),
            self.n or 1,
            tuple(self.stop or ()),
            (self.top_logprobs or 0) if self.logprobs else None,
            crossed,
        )


class Reply:
    """What is sent back for one request: a whole completion, or the chunks of a stream."""

    def __init__(self, asked: ChatRequest) -> None:
        self.asked, self.n = asked, asked.n or 1
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The completion, from all events of a job that was done."""
        texts, reasons = [""] * self.n, [""] * self.n
        tokens: list[list[Token]] = [[] for _ in range(self.n)]
        usage: dict[str, Any] = {}
        for event in events:
            match event:
                case Piece():
                    texts[event.choice] += event.text
                    tokens[event.choice] += event.tokens
                case Ended():
                    reasons[event.choice] = event.reason
                case Done():
                    usage = {"usage": _usage(event), "c2c": _c2c(event)}
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(told),
                "finish_reason": reason,
            }
            for index, (text, told, reason) in enumerate(zip(texts, tokens, reasons, strict=True))
        ]
        return self._body("chat.completion", choices) | usage

    async def chunks(self, events: AsyncIterable[Event]) -> AsyncIterator[str]:
        """The stream, as server-sent events; an error in the midst of it is its last one."""
        options = self.asked.stream_options
        more: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        begun: set[int] = set()
        ended: list[Ended] = []
        async for event in events:
            match event:
                case Piece():
                    delta = {"content": event.text}
                    if event.choice not in begun:
                        delta = {"role": "assistant"} | delta
                        begun.add(event.choice)
                    yield _sse(self._chunk(event.choice, delta, event.tokens) | more)
                case Ended():
                    ended.append(event)
                    if len(ended) < self.n:  # the last one comes with what all of it has cost
                        yield _sse(self._chunk(event.choice, {}, (), event.reason) | more)
                case Done():
                    last = self._chunk(ended[-1].choice, {}, (), ended[-1].reason) | more
                    yield _sse(last | {"c2c": _c2c(event)})
                    if more:
                        usage = {"usage": _usage(event)}
                        yield _sse(self._body("chat.completion.chunk", []) | usage)
                    yield "data: [DONE]\n\n"
                case Failed():
                    yield _sse(Refusal.of(event.error).body)

    def _chunk(
        self, choice: int, delta: dict[str, str], tokens: Sequence[Token], reason: str | None = None
    ) -> dict[str, Any]:
        chosen = {
            "index": choice,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": reason,
        }
        return self._body("chat.completion.chunk", [chosen])

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "model": self.asked.model, "choices": choices}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return {"content": [_token(t) | {"top_logprobs": list(map(_token, t.top))} for t in tokens]}


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    try:
        asked = ChatRequest.model_validate_json(await read_body(request))
    except ValidationError as e:
        raise mistake(e) from None
    events, reply = Events(), Reply(asked)
    job = asked.job(request.app.state.served, events.put)
    request.app.state.engine.submit(job)
    try:
        first = await or_gone(request, events.get())  # so that a refusal has a status of its own
        if isinstance(first, Failed):
            raise first.error
        if asked.stream:
            return Stream(job, reply.chunks(events))
        told = await or_gone(request, events.rest())
        if isinstance(told[-1], Failed):
            raise told[-1].error
        return JSONResponse(reply.whole(told))
    except BaseException:
        job.gone = True
        raise


async def models(request: Request) -> Response:
    """GET /v1/models."""
    served: Served = request.app.state.served
    data = [_model(mode, served) for mode in served.modes]
    return JSONResponse({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    served: Served = request.app.state.served
    name = request.path_params["name"]
    return JSONResponse(_model(_mode(name, served), served))


ROUTES = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", models, methods=["GET"]),
    Route("/v1/models/{name}", model, methods=["GET"]),
]


def _mode(name: str, served: Served) -> Mode:
    """The mode that a model's name stands for."""
    if mode := next((mode for mode in served.modes if mode == name), None):
        return mode
    known = ", ".join(served.modes)
    raise Refusal(404, f"no model {name[:80]!r}: there are {known}", "model", "model_not_found")


def _model(mode: Mode, served: Served) -> dict[str, Any]:
    sharer, sharers = next(iter(served.sharers), ""), ", ".join(served.sharers)
    who = {
        "c2c": f"{served.receiver} reads the caches of {sharers}",
        "relay": f"{served.receiver} reads what {sharer} writes",
        "receiver": served.receiver,
        "sharer": sharer,
    }
    return {
        "id": mode,
        "object": "model",
        "created": served.created,
        "owned_by": "c2c-mlx",
        "description": who[mode],
    }


def _usage(done: Done) -> dict[str, Any]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


def _c2c(done: Done) -> dict[str, Any]:
    """What OpenAI's dialect has no words for."""
    told = {name: v for name, v in asdict(done).items() if name not in _TOLD_AS_USAGE}
    if done.crossed is None:
        del told["crossed"]
    return told


def _token(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _sse(body: dict[str, Any]) -> str:
    # In ASCII: some clients take U+2028 and the like for ends of lines.
    return f"data: {json.dumps(body)}\n\n"
