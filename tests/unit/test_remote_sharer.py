"""A sharer on another machine: the same answers, its new tokens alone, and one line if it fails."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection, parse_headers
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from chat_sessions import WORDY, with_template
from safetensors.numpy import load, save
from serving_jobs import SAMPLING, Heard, asked, running, serving, sharing

from c2c_mlx import ChatSession, Fuser, LanguageModel, device, events, load_model
from c2c_mlx.config import FuserConfig, Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models import memory, remote, remote_reader
from c2c_mlx.models.load import find_folder
from c2c_mlx.serving import share as share_dialect
from c2c_mlx.serving.caches import Caches
from c2c_mlx.serving.exchange import Events
from c2c_mlx.serving.job import Accepted, CacheJob, Done, Failed, Job, Slice
from c2c_mlx.serving.refusal import Refusal
from c2c_mlx.serving.sharing import UNSENT, check, share
from c2c_mlx.talk.engine import InferenceThread

QUESTIONS = ("Who wrote it?", "And what else could be said about the sea?", "x")


@pytest.fixture(scope="module")
def engine(tiny_pair: Pair) -> Iterator[Any]:
    with sharing(tiny_pair.sharers[0]) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Any) -> Iterator[str]:
    with serving(engine, shares=True) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(remote.API_KEY, raising=False)


def session(receiver: LanguageModel, sharer: LanguageModel, pair: Pair, **more: Any) -> ChatSession:
    return ChatSession(receiver, sharer, Fuser.load(pair.fusers[0]), sampling=SAMPLING, **more)


def answer(chat: ChatSession, question: str, mode: str = "c2c") -> Any:
    *_, finished = chat.ask(question, mode)
    return finished


def post(url: str, **changes: Any) -> tuple[int, bytes]:
    files = remote.Remote(url).files
    body = {"ids": [5, 6, 7], "since": 0, "layers": [1], "files": files} | changes
    connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/caches", json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("fuse_response", [False, True])
def test_a_conversation_is_the_same(receiver, sharer, tiny_pair, url, fuse_response) -> None:
    here = session(receiver, sharer, tiny_pair, fuse_response=fuse_response)
    there = session(receiver, load_model(url), tiny_pair, fuse_response=fuse_response)
    for question in QUESTIONS:
        ours, theirs = answer(here, question), answer(there, question)
        assert ours.text == theirs.text
        assert ours.figures.new_prompt_tokens == theirs.figures.new_prompt_tokens
        crossed = here.crossed(), there.crossed()
        assert crossed[0].nats == pytest.approx(crossed[1].nats, abs=1e-4)
    here.undo("c2c"), there.undo("c2c")
    assert answer(here, "Once more").text == answer(there, "Once more").text


@pytest.mark.parametrize("alignment", ["first", "longest"])
def test_padding_stays_padding(receiver, sharer, url, alignment) -> None:
    config = FuserConfig(receiver.shape, sharer.shape, ((1, 2), (3, 5)), 24, 20)
    mx.random.seed(5)
    fuser = Fuser(replace(config, alignment=alignment, rotated_keys=False))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    texts = []
    for lm in (sharer, load_model(url)):
        chat = ChatSession(receiver, with_template(lm, WORDY), fuser, sampling=SAMPLING)
        texts.append([answer(chat, question).text for question in QUESTIONS])
    assert texts[0] == texts[1]


def test_a_turn_sends_what_is_new(sharer, url) -> None:
    model = load_model(url).model
    first = model.make_reader([0, 2])
    ids = list(range(10, 300))
    first.extend(ids[:200])
    assert kv.read(first.cache, [2], 0, 200).keys.shape[3] == 200
    first.extend(ids)
    assert first._fetch is not None and first._fetch.since == 200
    own = Reader(sharer.model)
    own.extend(ids)
    for layer in (0, 2):
        theirs, ours = (kv.read(r.cache, [layer], 0, 290) for r in (first, own))
        assert mx.allclose(theirs.keys, ours.keys, atol=1e-4).item()
        assert mx.allclose(theirs.values, ours.values, atol=1e-4).item()
    other = first.fork(50)
    assert other is not None and other.ids == ids[:50]
    other.extend([*ids[:50], 7, 8])
    own.extend([*ids[:50], 7, 8])
    a, b = (kv.read(r.cache, [2], 0, 52).values for r in (other, own))
    assert mx.allclose(a, b, atol=1e-4).item()


def test_slices_wait_for_a_slow_network_and_nobody_else_does(engine, monkeypatch) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 8)
    sleep, waits = time.sleep, set()

    def noted(seconds: float) -> None:
        waits.update(work.wait for work in engine._works)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", noted)
    came: SimpleQueue[Any] = SimpleQueue()
    job = CacheJob("receiver", [], came.put)
    job.ids, job.layers = list(range(10, 310)), [1]
    engine.submit(job)
    while came.qsize() < UNSENT:  # it has come to where it waits
        Heard(engine, "receiver", asked("x")).answers()
    assert Heard(engine, "receiver", asked("one more " * 60)).answers()[0][0]  # a longer one
    assert engine.status()["working"] == 1 and came.qsize() <= UNSENT + 2
    while not waits:  # nobody else is at work any more
        pass
    assert waits == {"others"}
    positions = 0
    while not isinstance(event := came.get(timeout=60), Done):
        if isinstance(event, Slice):
            positions += load(event.data)["keys"].shape[2]
            job.sent += 1
    assert positions == 300


def test_who_waits_for_another_ones_turn_is_told_that_it_is_alive(engine, url, monkeypatch) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 8)
    monkeypatch.setattr(share_dialect, "SIGN_S", 0.01)
    model = load_model(url).model
    first, second = model.make_reader([1]), model.make_reader([1])
    began, told = threading.Event(), threading.Event()
    extend, parse = Reader.extend, remote_reader.load

    def extend_slowly(reader: Reader, ids: Any, progress: Any = None) -> None:
        extend(reader, ids, progress)
        if type(reader) is Reader and reader.ids[0] == 11:
            began.set()
            while engine.status() == {"waiting": 0, "working": 1} and not told.is_set():
                pass  # the second one is on its way
            assert engine.status()["working"] == 1 or told.wait(timeout=20)

    def noted(data: bytes) -> Any:
        pair = parse(data)
        if threading.current_thread() is second._fetch and not pair["keys"].size:
            told.set()
        return pair

    monkeypatch.setattr(Reader, "extend", extend_slowly)
    monkeypatch.setattr(remote_reader, "load", noted)
    first.extend(list(range(11, 311)))
    assert began.wait(timeout=60)
    second.extend(list(range(100, 410)))  # longer, so it does not overtake
    assert len(first.ids) == 300 and len(second.ids) == 310
    assert told.is_set()


def test_a_turn_may_be_long_in_coming(url, engine, monkeypatch) -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold(event: Any) -> None:
        if isinstance(event, Accepted):
            held.set()
            go_on.wait(timeout=60)

    reader = load_model(url).model.make_reader([1])
    engine.submit(Job("receiver", asked("x"), hold))
    assert held.wait(timeout=60)
    with monkeypatch.context() as patched:
        patched.setattr(remote, "PATIENCE_S", 0.5)
        reader.extend([5, 6, 7])
        assert not reader.wait(1.0)
    go_on.set()
    assert reader.ids == [5, 6, 7]


def test_a_large_slice_goes_in_pieces_that_a_slow_network_carries() -> None:
    data = bytes(3 * share_dialect.PIECE_BYTES)

    async def sent() -> list[bytes]:
        events = Events()
        job = CacheJob("receiver", [], events.put)
        job.tell(Slice(data))
        job.tell(Failed(C2CError("no more")))
        pieces = [piece async for piece in share_dialect._frames(job, events) if not job.sent]
        assert job.sent == 1
        return pieces

    pieces = asyncio.run(sent())
    assert b"".join(pieces) == len(data).to_bytes(4) + data
    assert max(map(len, pieces)) <= share_dialect.PIECE_BYTES


def test_what_was_dropped_is_read_again_slice_by_slice(sharer, monkeypatch) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 8)
    job = CacheJob("receiver", [], lambda event: came.append(event))
    job.ids, job.since, job.layers, job.sent = list(range(10, 60)), 30, [1], 1000
    came: list[Any] = []
    caches = Caches()

    def steps() -> Iterator[Any]:
        return share(job, check(sharer, job), caches)

    broken_off = steps()
    assert [next(broken_off) for _ in range(2)] == ["read"] * 2 and len(came) == 2
    broken_off.close()
    (kept,) = caches._kept
    assert kept.ids == job.ids[:16]
    assert [*steps()] == ["read"] * 5  # the rest alone
    told = [load(event.data)["keys"].shape[2] for event in came]
    assert told == [0, 0, 0, 2, 8, 8, 2]


def test_what_a_failure_of_the_gpu_leaves_is_not_kept(sharer, monkeypatch) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 8)
    caches, came = Caches(), []
    job = CacheJob("receiver", [], lambda event: came.append(event))
    job.ids, job.layers, job.sent = list(range(10, 60)), [1], 1000
    given_up = share(job, check(sharer, job), caches)
    assert [next(given_up), next(given_up)] == ["read"] * 2
    given_up.close()
    (kept,) = caches._kept

    def fail(*arrays: Any) -> None:
        """As Metal does, whose arrays then count as computed."""
        for layer in kept.state.cache:
            layer.keys, layer.values = mx.zeros_like(layer.keys), mx.zeros_like(layer.values)
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    with monkeypatch.context() as patched:
        patched.setattr(mx, "eval", fail)
        with pytest.raises(RuntimeError):
            [*share(job, check(sharer, job), caches)]
    came.clear()
    assert len([*share(job, check(sharer, job), caches)]) == 7
    told = mx.array(np.concatenate([load(event.data)["keys"] for event in came], axis=2))
    own = Reader(sharer.model)
    own.extend(job.ids)
    expected = kv.read(own.cache, [1], 0, 50).keys[:, 0]
    near = 1e-5 if expected.dtype == mx.float32 else 2e-2
    assert mx.allclose(told.view(expected.dtype), expected, atol=near).item()


def test_a_conversation_goes_on_when_the_other_side_has_dropped_its_cache(
    receiver, sharer, tiny_pair, monkeypatch
) -> None:
    monkeypatch.setattr(device, "prefill_slice", lambda: 8)
    with sharing(tiny_pair.sharers[0]) as engine, serving(engine, shares=True) as port:
        here = session(receiver, sharer, tiny_pair)
        there = session(receiver, load_model(f"http://127.0.0.1:{port}"), tiny_pair)
        for question in QUESTIONS:
            assert answer(here, question).text == answer(there, question).text
            Heard(engine, "receiver", asked("x")).answers()  # the share's round has ended
            engine._desk.caches.shrink(0)


def test_what_is_wanted_must_exist(url) -> None:
    status, body = post(url)
    size = int.from_bytes(body[:4])
    assert status == 200 and body[4 + size :] == bytes(4)
    assert load(body[4 : 4 + size])["keys"].shape == (1, 3, 3, 8)
    for changes, says in (
        ({"ids": [512]}, "knows 512"),
        ({"ids": [-513]}, "knows 512"),
        ({"ids": [1] * 513}, "reads at most 512"),
        ({"layers": [6]}, "has 6"),
        ({"layers": [1, 1]}, "has 6"),
        ({"since": 3}, "nothing new"),
        ({"since": -1}, "since"),
        ({"ids": []}, "ids"),
        ({"ids": ["1"]}, "ids.0"),
        ({"more": 1}, "more"),
    ):
        status, body = post(url, **changes)
        assert status == 400 and says in json.loads(body)["error"]["message"], (changes, body)
    assert post(url, files={})[0] == 409


def test_the_tokenizer_comes_along_once(sharer, url, tmp_path) -> None:
    found = load_model(url)
    assert found.is_elsewhere and found.fingerprint == sharer.fingerprint
    (folder,) = (tmp_path / "home" / "remote").glob("[!.]*")
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    load_model(url)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    for name in ("../config.json", "model.safetensors", "%2e%2e"):
        connection = HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request("GET", f"/v1/caches/{name}")
        assert connection.getresponse().status == 404
        connection.close()


def test_its_weights_take_no_memory_here(tiny_pair, url) -> None:
    receiver, sharer = (find_folder(name) for name in (tiny_pair.receiver, tiny_pair.sharers[0]))
    here, there = (memory.preflight(receiver, [s]) for s in (sharer, find_folder(url)))
    assert here.sharer > there.sharer == 0 and here.receiver == there.receiver
    assert here.caches == there.caches


def test_it_writes_nothing_here(receiver, tiny_pair, url) -> None:
    there = session(receiver, load_model(url), tiny_pair)
    for mode in ("relay", "sharer"):
        with pytest.raises(C2CError, match="take --mode c2c or receiver"):
            answer(there, "Who wrote it?", mode)
    with pytest.raises(C2CError, match="read from afar"):
        there.sharer.model(mx.zeros((1, 2), mx.int32))
    assert answer(there, "Who wrote it?", "receiver").text


def test_an_endpoint_may_have_its_sharer_elsewhere(engine, tiny_pair) -> None:
    with running(tiny_pair) as here:
        heard = [Heard(here, "c2c", asked(question)) for question in QUESTIONS]
        texts = [h.answers()[0] for h in heard]
    with ExitStack() as stack:
        with serving(engine, shares=True) as port:
            pair = replace(tiny_pair, sharers=(f"http://127.0.0.1:{port}",))
            there = stack.enter_context(running(pair))
            heard = [Heard(there, "c2c", asked(question)) for question in QUESTIONS]
            assert [h.answers()[0] for h in heard] == texts
        assert there.served.result().modes == ("c2c", "receiver")
        with pytest.raises(remote.RemoteError, match="refused") as gone:
            Heard(there, "c2c", asked("What else?")).answers()
        assert Refusal.of(gone.value).status == 502
        assert Heard(there, "receiver", asked("x")).answers()[0][0]


def test_a_key_is_brought(receiver, engine, monkeypatch) -> None:
    with serving(engine, shares=True, api_key="secret") as port:
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(C2CError, match="send the server's key"):
            load_model(url)
        monkeypatch.setenv(remote.API_KEY, "secret")
        assert load_model(url).is_elsewhere


def test_the_system_asks_whether_the_other_machine_is_there(url) -> None:
    with remote.Remote(url).open("GET", "/v1/caches") as response:
        sock = response.fp.raw._sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle = getattr(socket, "TCP_KEEPIDLE", None) or socket.TCP_KEEPALIVE
        options = (idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        first, then, times = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in options)
    assert first + then * times < remote.TURN_S / 10


def read_request(connection: socket.socket) -> None:
    """All of it: whoever closes with some of it unread resets the connection."""
    with connection.makefile("rb") as file:
        file.readline()
        file.read(int(parse_headers(file).get("Content-Length", 0)))


@contextmanager
def impostor(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers one request after the other as `behave` does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    try:
                        read_request(connection)
                        behave(connection)
                    except OSError:
                        pass

        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=60)
    assert not thread.is_alive()


def frame(shape: tuple[int, ...], dtype: Any = np.float32) -> bytes:
    data = save({"keys": np.ones(shape, dtype), "values": np.ones(shape, dtype)})
    return len(data).to_bytes(4) + data


GOOD = frame((4, 3, 1, 8))
NONSENSE = {
    "nothing": b"",
    "half a length": b"\0\0",
    "too long": b"\xff\xff\xff\xff",
    "half a slice": GOOD[:50],
    "no safetensors": (9).to_bytes(4) + b"nonsense!",
    "other names": (lambda d: len(d).to_bytes(4) + d)(save({"k": np.ones(3, np.float32)})),
    "other shapes": frame((4, 3, 1, 7)),
    "other layers": frame((3, 3, 1, 8)),
    "flat": frame((4,)),
    "other numbers": frame((4, 3, 1, 8), np.float16),
    "too many": frame((4, 3, 500, 8)),
    "too few": GOOD + bytes(4),
}


@pytest.mark.parametrize(
    "what", [*NONSENSE, "no http", "half a chunk", "a stall", "a stall in a slice"]
)
def test_who_fails_in_mid_turn_costs_one_line(
    receiver, sharer, tiny_pair, url, monkeypatch, what
) -> None:
    chat = session(receiver, load_model(url), tiny_pair)
    first = answer(chat, QUESTIONS[0]).text
    release = threading.Event()

    def behave(connection: socket.socket) -> None:
        if what == "no http":
            connection.sendall(b"nonsense\r\n\r\n")
        elif what == "half a chunk":  # as a server sends that is killed
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head + b"40\r\n" + GOOD[:10])
        elif what == "a stall":
            release.wait(60)
        else:
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
            connection.sendall(head + NONSENSE.get(what, GOOD + GOOD[:40]))
            if "stall" in what:
                release.wait(60)

    there = chat._fused.sharers[0]._remote
    with impostor(behave) as elsewhere:
        there.url = elsewhere
        with monkeypatch.context() as patched:
            for name in ("PATIENCE_S", "TURN_S") if "stall" in what else ():
                patched.setattr(remote, name, 0.2)
            with pytest.raises(C2CError, match=f"sharer {elsewhere}: ") as failed:
                answer(chat, QUESTIONS[1])
        release.set()
        assert "\n" not in str(failed.value)
        assert what != "half a chunk" or "it ended too early" in str(failed.value)
        assert answer(chat, QUESTIONS[1], "receiver").text
    with pytest.raises(C2CError, match="refused"):
        answer(chat, QUESTIONS[1])
    there.url = url  # it is back: the conversation goes on as if nothing had been
    here = session(receiver, sharer, tiny_pair)
    assert answer(here, QUESTIONS[0]).text == first
    assert answer(chat, QUESTIONS[1]).text == answer(here, QUESTIONS[1]).text


def test_a_stop_is_heard_while_the_other_side_says_nothing(tiny_pair, url, monkeypatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 600.0)
    release = threading.Event()
    engine = InferenceThread(replace(tiny_pair, sharers=(url,)), SAMPLING)

    def until(is_it: Callable[[Any], bool]) -> Any:
        while not is_it(event := engine.events.get(timeout=60)):
            pass
        return event

    engine.start()
    with impostor(lambda connection: release.wait(300)) as elsewhere:
        try:
            until(lambda event: isinstance(event, events.Loaded))
            engine._session._fused.sharers[0]._remote.url = elsewhere
            engine.ask(QUESTIONS[0], ["c2c"])
            until(lambda e: isinstance(e, events.Prefilling) and 0 < e.done == e.total)
            until(lambda e: isinstance(e, events.Prefilling))  # it waits for the other side
            engine.stop()
            assert until(lambda e: isinstance(e, events.Finished)).reason == "stopped"
        finally:
            engine.close()
            engine.join(timeout=60)
            is_over = not engine.is_alive()
            release.set()
    assert is_over


ABOUT = {"name": "x", "dtype": "float32", "weights": "00", "files": {"config.json": "00" * 32}}
STRANGERS = [
    {},
    [],
    ABOUT | {"files": {}},
    ABOUT | {"dtype": "int8"},
    {name: of for name, of in ABOUT.items() if name != "weights"},
    ABOUT | {"files": {"config.json": "00"}},
    ABOUT | {"files": ABOUT["files"] | {"run.py": "00" * 32}},
]


@pytest.mark.parametrize("about", STRANGERS)
def test_who_says_that_it_shares_must_share(about) -> None:
    told = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + json.dumps(about).encode()
    with impostor(lambda connection: connection.sendall(told)) as url:
        with pytest.raises(C2CError, match="shares no model"):
            load_model(url)


def test_files_must_be_what_they_were_said_to_be(tmp_path) -> None:
    told = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + json.dumps(ABOUT).encode()
    with impostor(lambda connection: connection.sendall(told)) as url:
        with pytest.raises(C2CError, match="its config.json is not what it said"):
            load_model(url)
    assert not [p for p in (tmp_path / "home" / "remote").iterdir() if p.is_dir()]


def test_a_cache_folder_that_cannot_be_written_is_one_line(url, tmp_path) -> None:
    (tmp_path / "home").write_text("no folder")
    with pytest.raises(C2CError, match="cannot write to the cache folder .* C2C_MLX_HOME"):
        load_model(url)


def test_of_two_first_uses_one_fetches_and_the_other_waits(url) -> None:
    other = remote.Remote(url)
    told: SimpleQueue[Any] = SimpleQueue()
    waiting = threading.Thread(target=lambda: other.folder(told.put))

    class Slow(remote.Remote):
        def get(self, path: str) -> bytes:
            if not waiting.ident and path != "/v1/caches":
                waiting.start()
                assert "waiting for another process" in told.get(timeout=60).what
            return super().get(path)

    folder = Slow(url).folder()
    waiting.join(timeout=60)
    assert (folder / "tokenizer.json").is_file() and not list(folder.parent.glob(".*.tmp-*"))


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(C2CError, match="sharer http://127.0.0.1:9: "):
        load_model("http://127.0.0.1:9")


def test_random_ends_of_the_other_side_leave_a_conversation_whole(
    receiver, sharer, tiny_pair, url
) -> None:
    """Frames of the true server, cut at any byte."""
    rng = random.Random(0)
    chat, here = session(receiver, load_model(url), tiny_pair), session(receiver, sharer, tiny_pair)
    there = chat._fused.sharers[0]._remote
    cut = 0

    def behave(connection: socket.socket) -> None:
        head, body = sent[0]
        connection.sendall((head + body)[:cut])

    ids = list(range(20, 60))
    status, body = post(url, ids=ids, layers=[2, 3, 4, 5])
    assert status == 200
    sent = [(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", body)]
    with impostor(behave) as elsewhere:
        for _ in range(20):
            cut = rng.randint(0, len(body) - 1)
            there.url = elsewhere
            with pytest.raises(C2CError):
                answer(chat, QUESTIONS[0])
    there.url = url
    assert answer(chat, QUESTIONS[0]).text == answer(here, QUESTIONS[0]).text
