"""The endpoint over a socket of this machine, as its clients use it, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from http.client import HTTPConnection, HTTPResponse
from threading import Event
from typing import Any

import openai
import pytest
from serving_jobs import QUESTION, SAMPLING, Heard, asked, chat, listening, running, send, serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from c2c_mlx.errors import C2CError
from c2c_mlx.serving import exchange, server
from c2c_mlx.serving.engine import Limits
from c2c_mlx.serving.job import Accepted, Failed, Job, Piece
from c2c_mlx.serving.openai import ChatRequest, Reply

# --- what clients do ----------------------------------------------------------------------------


def test_a_completion_is_the_answer_of_c2c_chat(client, c2c_chat) -> None:
    told = client.chat.completions.create(model="c2c", messages=QUESTION)
    (choice,) = told.choices
    assert choice.message.content.strip() == c2c_chat("Who wrote it?")
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert told.usage.completion_tokens == SAMPLING.max_tokens
    assert told.usage.total_tokens == told.usage.prompt_tokens + SAMPLING.max_tokens
    again = client.chat.completions.create(model="c2c", messages=QUESTION, max_tokens=None)
    assert again.usage.prompt_tokens_details.cached_tokens == told.usage.prompt_tokens - 1
    assert again.choices[0].message.content == choice.message.content
    assert again.c2c["gates_open"] == 8 and 0 < again.c2c["first_token_s"] < again.c2c["total_s"]


def test_a_stream_is_the_completion_in_pieces(client) -> None:
    options: dict[str, Any] = {"model": "c2c", "messages": QUESTION, "n": 2, "seed": 3}
    options |= {"temperature": 1.0, "top_p": 0.95}
    whole = client.chat.completions.create(**options)
    texts, reasons, roles, last = ["", ""], ["", ""], [[], []], None
    for chunk in client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **options
    ):
        assert chunk.id.startswith("chatcmpl-") and chunk.model == "c2c"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            roles[choice.index].append(choice.delta.role)
        last = chunk if not chunk.choices else last
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert all(said[0] == "assistant" and not any(said[1:]) for said in roles)
    assert last and last.usage.completion_tokens == whole.usage.completion_tokens


def test_no_character_of_an_answer_ends_a_line_of_a_stream() -> None:
    text = "a\u2028b\u2029c\x85d"

    async def told() -> list[str]:
        events = exchange.Events()
        events.put(Piece(0, text))
        events.put(Failed(C2CError(text)))
        reply = Reply(ChatRequest.model_validate(chat()))
        return [chunk async for chunk in reply.chunks(events)]

    lines = "".join(asyncio.run(told())).splitlines()  # as httpx does, among others
    first, second = (json.loads(line.removeprefix("data: ")) for line in lines if line)
    assert first["choices"][0]["delta"]["content"] == second["error"]["message"] == text


@pytest.mark.parametrize("options", [{}, {"stream_options": {}}])
def test_a_stream_ends_with_done(port, options) -> None:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        body = json.dumps(chat(stream=True) | options)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["X-Accel-Buffering"] == "no"
        *lines, last, end = answer.read().decode().split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    assert "c2c" in chunks[-1]


def test_logprobs_are_those_of_the_text(client) -> None:
    told = client.chat.completions.create(
        model="receiver", messages=QUESTION, logprobs=True, top_logprobs=3, max_tokens=16
    )
    content = told.choices[0].logprobs.content
    data = bytes(byte for token in content for byte in token.bytes)
    assert data.decode("utf-8", "replace").lstrip() == told.choices[0].message.content.lstrip()
    assert len(content) == 16
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob < 0  # greedy
    without = client.chat.completions.create(model="receiver", messages=QUESTION)
    assert without.choices[0].logprobs is None


def test_a_stop_text_ends_an_answer(client, c2c_chat) -> None:
    text = client.chat.completions.create(model="receiver", messages=QUESTION)
    text = text.choices[0].message.content
    stop = text[10:13]
    told = client.chat.completions.create(model="receiver", messages=QUESTION, stop=stop)
    assert told.choices[0].message.content == text[: text.index(stop)]
    assert told.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(
        model="receiver", messages=QUESTION, stop=["never said", stop], stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text[: text.index(stop)]


def test_parts_are_lines_and_developers_give_the_system_prompt(client, c2c_chat) -> None:
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "wrote it?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    told = client.chat.completions.create(
        model="receiver", messages=messages, response_format={"type": "text"}, user="me"
    )
    assert told.choices[0].message.content.strip() == c2c_chat(
        "Who\nwrote it?", "receiver", "Be brief."
    )


def test_models_are_the_modes(client) -> None:
    assert [m.id for m in client.models.list()] == ["c2c", "relay", "receiver", "sharer"]
    assert client.models.retrieve("relay").owned_by == "c2c-mlx"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")
    for model in ("relay", "sharer"):
        told = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=4)
        assert told.model == model and told.usage.completion_tokens <= 4


def test_what_crossed_is_told_where_it_is_asked_for(client) -> None:
    options: dict[str, Any] = {"model": "c2c", "messages": QUESTION}
    told = client.chat.completions.create(extra_body={"c2c": {"crossed": True}}, **options)
    text = "".join(text for text, _ in told.c2c["crossed"])
    assert text == told.choices[0].message.content.lstrip()
    assert len(told.c2c["crossed"]) == told.usage.completion_tokens
    assert "crossed" not in client.chat.completions.create(**options).c2c


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "no JSON"),
        (b'{"model": "c2c", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "no JSON"),
        ({}, 400, "model: Field required"),
        (chat(messages=[]), 400, "at least 1"),
        (chat(messages=asked("x") * 1025), 400, "at most 1024"),
        (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
        (chat(messages=[{"role": "user", "content": 3}]), 400, "messages.0.content"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            400,
            "only parts of type text are read, not image_url",
        ),
        (chat(max_tokens=0), 400, "max_tokens"),
        (chat(max_tokens="4"), 400, "max_tokens"),
        (chat(temperature=3), 400, "temperature"),
        (chat(top_p=0), 400, "top_p"),
        (chat(n=5), 400, "at most 4 answers"),
        (chat(stop=["a"] * 5), 400, "stop"),
        (chat(stop=""), 400, "1 to 256 characters"),
        (chat(seed=2**63), 400, "seed"),
        (chat(top_logprobs=2), 400, "needs logprobs"),
        (chat(response_format={"type": "json_object"}), 400, "only text is written"),
        (chat(tools=[{"type": "function"}]), 400, "tools is not supported"),
        (chat(frequency_penalty=0.5), 400, "frequency_penalty is not supported"),
        (chat(n=2, c2c={"crossed": True}), 400, "of one answer of c2c"),
        (chat(model="relay", c2c={"crossed": True}), 400, "of one answer of c2c"),
        (chat(model="gpt"), 404, "there are c2c, relay, receiver, sharer"),
        (chat(model="relay", messages=[{"role": "assistant", "content": "x"}]), 400, "user's"),
        (chat(messages=asked("sea " * 600)), 400, "reads at most 512: shorten it"),
        (chat(model="relay", messages=asked("sea " * 600)), 400, "reads at most 512: shorten it"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_is_an_object_that_says_so(port, body, status, says, stream) -> None:
    if stream and isinstance(body, dict):
        body = body | {"stream": True}
    got, told, _ = send(port, body)
    error = told["error"]
    assert got == status and says in error["message"]
    assert error["type"] == "invalid_request_error" and {"param", "code"} <= error.keys()


def test_errors_have_codes_for_programs(client, port) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="c2c", messages=asked("sea " * 600))
    assert refused.value.code == "context_length_exceeded"
    status, told, headers = send(port, None, "PUT", "/v1/models")
    assert status == 405 and "Method Not Allowed" in told["error"]["message"]
    assert "GET" in headers["allow"]
    assert send(port, None, "GET", "/v1/files")[0] == 404
    assert send(port, chat(), Content_Type="text/plain")[0] == 415


def test_other_sites_are_refused(port) -> None:
    for origin in ("https://example.com", "http://localhost:3000", "null", ""):
        status, told, headers = send(port, chat(), Origin=origin)
        assert status == 403 and "other sites" in told["error"]["message"]
        assert not [name for name in headers if name.lower().startswith("access-control")]
    assert send(port, None, "OPTIONS", Origin="https://example.com")[0] == 403
    assert send(port, chat(), Origin=f"http://127.0.0.1:{port}")[0] == 200
    for host in ("example.com", f"example.com:{port}", "127.0.0.1.example.com", "[::2]:80", ""):
        assert send(port, chat(), Host=host)[0] == 403
    for host in ("localhost", f"localhost:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert send(port, None, "GET", "/v1/models", Host=host)[0] == 200


def test_the_key_opens(engine) -> None:
    with serving(engine, api_key="secret") as port:
        url = f"http://127.0.0.1:{port}/v1"
        for wrong in ("", "Bearer", "Bearer secre", "Bearer sécret", "Basic secret"):
            assert send(port, chat(), Authorization=wrong)[0] == 401
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            assert len(client.models.list().data) == 4
        assert send(port, None, "GET", "/health", Host="any.name")[0] == 200
        # As behind a proxy that passes on by which name it was asked.
        assert send(port, chat(), Host="any.name")[0] == 401
        assert send(port, chat(), Host="any.name", Authorization="Bearer secret")[0] == 200


def test_a_full_queue_is_429_with_a_wait(tiny_pair) -> None:
    held, go_on = Event(), Event()

    def hold(event: Any) -> None:
        if isinstance(event, Accepted):
            held.set()
            go_on.wait(timeout=60)

    with running(tiny_pair, Limits(slots=1, queue=1)) as engine, serving(engine) as port:
        engine.submit(Job("receiver", QUESTION, hold))
        assert held.wait(timeout=60)
        waiting = Heard(engine, "receiver", QUESTION)  # nobody takes it up now
        status, told, headers = send(port, chat())
        go_on.set()
        assert status == 429 and told["error"]["code"] == "rate_limit_exceeded"
        assert int(headers["retry-after"]) >= 1
        assert waiting.answers()[1] == ["length"]


def test_health_says_that_the_thread_is_dead(tiny_pair) -> None:
    def die(event: Any) -> None:
        if isinstance(event, Accepted):
            raise SystemExit

    with running(tiny_pair) as engine, serving(engine) as port:
        status, told, _ = send(port, None, "GET", "/health")
        assert (status, told) == (200, {"status": "ok", "waiting": 0, "working": 0})
        engine.submit(Job("c2c", QUESTION, die))
        engine.join(timeout=60)
        status, told, _ = send(port, None, "GET", "/health")
        assert status == 503 and "has ended" in told["status"]
        status, told, _ = send(port, chat())
        assert status == 503 and told["error"]["code"] == "unavailable"


def test_bodies_and_patience_have_bounds(port, monkeypatch) -> None:
    assert send(port, b" " * (exchange.BODY_BYTES + 1))[0] == 413
    monkeypatch.setattr(exchange, "BODY_S", 0.05)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
        slow.sendall(head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")
    monkeypatch.setattr(server, "HEADER_S", 0.05)
    for before in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
            slow.sendall(before)
            answer = b""
            while before and b"}" not in answer:
                answer += slow.recv(1 << 16)
            slow.sendall(head)
            assert slow.recv(1 << 16) == b""  # it is hung up
    with socket.create_connection(("127.0.0.1", port), timeout=60) as long:
        long.sendall(head + b"X: " + b"x" * (2 * server.HEADER_BYTES))
        assert refused(long) == (400, "invalid_request_error")


def test_who_does_not_read_is_hung_up_on(monkeypatch) -> None:
    monkeypatch.setattr(server, "SEND_S", 0.05)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1 << 8):
            yield bytes(1 << 16)

    def whole(request: Request) -> Response:
        return Response(bytes(1 << 24))

    def stream(request: Request) -> Response:
        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/whole", whole), Route("/stream", stream)])
    with contextlib.ExitStack() as clients, listening(app) as port:
        for path in ("whole", "stream"):
            client = socket.create_connection(("127.0.0.1", port), timeout=60)
            clients.enter_context(client)
            client.sendall(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.recv(1) == b"H"
    # It has ended, though both of them were still there.


def refused(connection: socket.socket) -> tuple[int, str]:
    """Status, and the type of the error object, of an answer after which nothing comes."""
    answer = HTTPResponse(connection)
    answer.begin()
    assert answer.headers["content-type"] == "application/json"
    error = json.loads(answer.read())["error"]
    assert error["message"] and {"param", "code"} <= error.keys()
    return answer.status, error["type"]


def test_what_the_server_itself_refuses_is_an_object_too(port, monkeypatch) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as nonsense:
        nonsense.sendall(b"nonsense\r\n\r\n")
        assert refused(nonsense) == (400, "invalid_request_error")
    assert send(port, None, "GET", "/health")[0] == 200
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        with monkeypatch.context() as patched:
            patched.setattr(server, "CONNECTIONS", 0)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            error = json.loads(answer.read())["error"]
            assert answer.status == 503 and error["type"] == "server_error"
            assert "connections are open already" in error["message"]
            assert answer.headers["retry-after"] == "1"
        connection.request("GET", "/health")  # there is room by now
        assert connection.getresponse().status == 200
