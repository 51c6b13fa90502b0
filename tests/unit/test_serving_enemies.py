"""Clients that go away, and requests that mean no good: nothing of them stays, nothing breaks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
from http.client import HTTPConnection

import mlx.core as mx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_jobs import QUESTION, Heard, asked, chat, send

from c2c_mlx.serving.job import Sampling

# Clients that go away, bodies, and lines of HTTP; docs/experiments.md has the last large run.
CLIENTS, BODIES, LINES = map(int, os.environ.get("C2C_MLX_HOSTILE", "100,150,60").split(","))


def test_clients_that_go_away_leave_nothing_behind(engine, port) -> None:
    rng = random.Random(0)
    right = send(port, chat(max_tokens=16))[1]["choices"]
    before = mx.get_active_memory()
    for number in range(CLIENTS):
        body = chat(
            model=rng.choice(["c2c", "relay", "receiver"]),
            messages=asked(f"{number} " * rng.randint(1, 60)),
            stream=rng.random() < 0.7,
            max_tokens=200,
            n=rng.choice([1, 1, 2]),
        )
        data = json.dumps(body).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        whole = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            sent = len(whole) if rng.random() < 0.8 else rng.randint(1, len(whole))
            connection.sendall(whole[:sent])
            if body["stream"] and sent == len(whole):
                for _ in range(rng.randint(0, 2)):
                    connection.recv(rng.choice([1, 4096]))
    assert send(port, chat(max_tokens=16))[1]["choices"] == right
    while engine.status() != {"waiting": 0, "working": 0}:  # the last ones leave within a token
        Heard(engine, "receiver", QUESTION, sampling=Sampling(max_tokens=1)).answers()
    assert all(not batch.rows for batch in engine._desk.batches.values())
    assert mx.get_active_memory() <= before + engine._desk.caches.nbytes + (8 << 20)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
field_names = st.sampled_from(
    "model messages stream stream_options max_tokens max_completion_tokens temperature top_p n "
    "seed stop logprobs top_logprobs response_format tools frequency_penalty user c2c".split()
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool", ""])},
        optional={"content": st.text(max_size=30) | json_values, "name": json_values},
    ),
    max_size=4,
)
valid = st.fixed_dictionaries(
    {"model": st.sampled_from(["c2c", "relay", "receiver", "sharer"]), "messages": messages},
    optional={
        "max_tokens": st.none() | st.integers(-1, 3),
        "n": st.integers(0, 5),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
        "temperature": st.floats(-1, 3),
        "seed": st.integers(),
        "stream": st.booleans() | st.none(),
    },
)
broken = st.tuples(valid, st.dictionaries(field_names, json_values, max_size=3)).map(
    lambda pair: pair[0] | pair[1]
)


@settings(max_examples=BODIES, deadline=None, suppress_health_check=[*HealthCheck])
@given(body=st.one_of(broken, json_values, st.binary(max_size=50)), data=st.data())
def test_nothing_that_is_sent_is_an_error_of_ours(port, body, data) -> None:
    if isinstance(body, dict) and body.get("max_tokens") is None:
        body = body | {"max_tokens": 2}
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    if data.draw(st.integers(0, 4)) == 0 and sent:
        at = data.draw(st.integers(0, len(sent) - 1))
        sent = sent[:at] + data.draw(st.binary(max_size=2)) + sent[at + 1 :]
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(
            "POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        text = answer.read().decode()
    assert answer.status < 500, text
    if answer.status != 200:
        assert {"message", "type", "param", "code"} == json.loads(text)["error"].keys()
    elif text.startswith("data:"):
        assert text.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(text)["choices"]


@settings(max_examples=LINES, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "\x00"]),
    path=st.text(st.characters(max_codepoint=255), max_size=30),
    headers=st.dictionaries(
        st.sampled_from(["Host", "Origin", "Content-Type", "Content-Length", "Transfer-Encoding",
                         "Expect", "Upgrade", "Connection", "Authorization"]),
        st.text(st.characters(max_codepoint=255, blacklist_characters="\r\n"), max_size=20),
        max_size=3,
    ),
    rest=st.binary(max_size=40),
)  # fmt: skip
def test_whatever_comes_down_the_wire_is_no_error_of_ours(port, method, path, headers, rest):
    lines = [f"{method} /{path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        with contextlib.suppress(OSError):
            connection.sendall("\r\n".join(lines).encode("latin-1") + rest)
            connection.shutdown(socket.SHUT_WR)
            assert not connection.recv(1 << 16).startswith(b"HTTP/1.1 5")


def test_it_is_still_right_afterwards(client, engine, c2c_chat) -> None:
    told = client.chat.completions.create(model="c2c", messages=QUESTION)
    assert told.choices[0].message.content.strip() == c2c_chat("Who wrote it?")
    assert engine.status() == {"waiting": 0, "working": 0}
