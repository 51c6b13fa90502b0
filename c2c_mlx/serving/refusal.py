"""Every way of saying no: a status, and an object that says what is wrong and what to do."""

from __future__ import annotations

from pydantic import ValidationError
from starlette.responses import JSONResponse

from c2c_mlx.errors import C2CError
from c2c_mlx.models.remote import RemoteError
from c2c_mlx.serving.job import Full, TooLong, Unavailable
from c2c_mlx.talk.engine import explain

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}


class Refusal(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field that is to blame.
        code: the same for programs.
        wait_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        wait_s: int | None = None,
    ) -> None:
        super().__init__(message)
        kind = "server_error" if status > 500 else _TYPES.get(status, "invalid_request_error")
        self.status, self.wait_s = status, wait_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """What an error means to a client."""
        match error:
            case Refusal():
                return error
            case Full():
                return cls(429, str(error), code="rate_limit_exceeded", wait_s=error.wait_s)
            case Unavailable():
                return cls(503, str(error), code="unavailable")
            case TooLong():
                return cls(400, str(error), "messages", "context_length_exceeded")
            case RemoteError():
                return cls(502, str(error), code="sharer_unavailable")
            case C2CError():
                return cls(400, str(error))
        return cls(500, explain(error))

    def response(self) -> JSONResponse:
        """The same as an answer of HTTP."""
        headers = {"Retry-After": str(self.wait_s)} if self.wait_s is not None else None
        return JSONResponse(self.body, self.status, headers)


def mistake(error: ValidationError) -> Refusal:
    """The first of the mistakes in a body, in one line."""
    first = error.errors(include_input=False, include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {message}")
    return Refusal(400, f"{param}: {message}" if param else message, param or None)
