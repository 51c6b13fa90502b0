"""c2c-serve as a process: what it refuses, who talks to it, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from c2c_mlx.commands import chat, evaluate, serve
from c2c_mlx.config import Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.serving.server import bind, listen

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command at any port, and its address."""
    code = "import sys; from c2c_mlx.commands.serve import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "0", *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    seen = []
    try:
        for line in process.stderr:
            seen.append(line)
            if found := re.search(r"http://\S+/v1", line):
                yield process, found[0]
                break
        else:
            raise AssertionError("".join(seen))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def of(pair: Pair) -> list[str]:
    return ["--receiver", pair.receiver, "--sharer", pair.sharers[0], "--fuser", pair.fusers[0]]


def ask_by_llm(address: str, folder: Path) -> str:
    """What the `llm` command says, which has been told where the model is."""
    folder.mkdir()
    model = {"model_id": "c2c", "model_name": "c2c", "api_base": address, "api_key_name": "c2c"}
    (folder / "extra-openai-models.yaml").write_text(json.dumps([model]))  # which is YAML, too
    (folder / "keys.json").write_text(json.dumps({"c2c": "secret"}))
    command = [sys.executable, "-m", "llm", "-m", "c2c", "-o", "max_tokens", "12"]
    done = subprocess.run(
        [*command, QUESTION[0]["content"]],
        env=os.environ | {"LLM_USER_PATH": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_clients_are_answered_and_a_signal_drains(tiny_pair: Pair, tmp_path: Path) -> None:
    with started(*of(tiny_pair), "--api-key", "secret", "--temp", "0") as (process, address):
        with openai.OpenAI(base_url=address, api_key="secret", max_retries=0) as client:
            told = client.chat.completions.create(model="c2c", messages=QUESTION, max_tokens=12)
            text = told.choices[0].message.content
            assert ask_by_llm(address, tmp_path / "llm").encode("ascii", "replace") == (
                text.strip().encode("ascii", "replace")
            )
            stream = client.chat.completions.create(
                model="c2c", messages=QUESTION, max_tokens=100, stream=True
            )
            pieces = [next(stream).choices[0].delta.content]
            process.send_signal(signal.SIGTERM)  # in the midst of an answer
            pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
            assert "".join(pieces).startswith(text)
        assert process.wait(timeout=60) == 0
        assert process.stderr and process.stderr.read() == ""


def test_ctrl_c_ends_it(tiny_pair: Pair) -> None:
    with started(*of(tiny_pair)) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130


@pytest.mark.pair
def test_the_embedded_pair_is_served(tmp_path: Path) -> None:
    from c2c_mlx.models import registry
    from c2c_mlx.models.embedded import install

    if not install.is_installed(registry.default_pair()[0]):
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    with started() as (_, address):
        assert "Paris" in ask_by_llm(address, tmp_path / "llm")
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
            told = client.chat.completions.create(model="c2c", messages=QUESTION, max_tokens=12)
            assert "Paris" in told.choices[0].message.content
            assert told.c2c["gates_open"] > 0


def test_a_sharer_elsewhere_is_named_by_its_address(
    tiny_pair: Pair, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("C2C_MLX_HOME", str(tmp_path / "home"))
    question = ["--max-tokens", "8", "--json", "--prompt", QUESTION[0]["content"]]
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    with started("--share", tiny_pair.sharers[0]) as (process, address):
        url = address.removesuffix("/v1")
        told = []
        for pair in (tiny_pair, replace(tiny_pair, sharers=(url,))):
            assert chat.main([*of(pair), "--mode", "c2c,receiver", *question]) == 0
            records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            told.append([(r["mode"], r["text"], r["generated_tokens"]) for r in records])
            out = tmp_path / f"{len(told)}.json"
            options = ["--mode", "c2c,receiver,c2c-shuffled", "--json", str(out)]
            assert evaluate.main([*of(pair), "--task", str(task), *options]) == 0
            scores = json.loads(out.read_text())["modes"]
            told[-1] += [(mode, found["scores"]["nll"]["mean"]) for mode, found in scores.items()]
            capsys.readouterr()
        assert told[0][:2] == told[1][:2]
        assert dict(told[0][2:]) == pytest.approx(dict(told[1][2:]), abs=1e-4)
        assert chat.main([*of(pair), "--mode", "relay", *question]) == 2
        assert "take --mode c2c or receiver" in capsys.readouterr().err
        process.kill()
        process.wait()
        assert chat.main([*of(pair), *question]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert url in line and "refused" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "so it needs --api-key"),
        (["--slots", "0"], "--slots 0: must be at least 1"),
        (["--cache-gb", "nan"], "must be a number above 0"),
        (["--cache-gb", "1e300"], "must be a number above 0"),
        (["--temp", "-1"], "temp must not be negative"),
        (["--port", "99999"], "take another --port"),
        (["--receiver", "nobody"], "unknown model 'nobody'"),
        (["--share", "nobody"], "unknown model 'nobody'"),
        (["--share", "gemma3-270m", "--sharer", "qwen"], "--share is of one model"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.delenv(serve.API_KEY, raising=False)
    assert serve.main(["--port", "0", *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told.splitlines()[-1]
    assert not [thread for thread in threading.enumerate() if thread.name == "inference"]


@pytest.mark.parametrize("is_named", [True, False])
def test_a_sharer_elsewhere_that_is_not_there_is_one_line(
    tiny_pair: Pair, is_named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = of(replace(tiny_pair, sharers=("http://127.0.0.1:9",)))
    assert serve.main(["--port", "0", *(pair if is_named else pair[:-2])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sharer http://127.0.0.1:9: " in line and line.endswith("; see to it")


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main(["--port", port, "--receiver", "nobody"]) == 2
    assert "take another --port" in capsys.readouterr().err


def test_of_two_that_have_bound_a_port_one_has_it() -> None:
    first = bind("127.0.0.1", 0)
    with first:
        try:
            second = bind("127.0.0.1", first.getsockname()[1])
        except C2CError:
            return  # as BSD and macOS do
        with second:
            listen(first)
            with pytest.raises(C2CError, match="take another --port"):
                listen(second)


def test_a_pair_without_a_fuser_serves_the_other_modes(tiny_pair: Pair, monkeypatch) -> None:
    monkeypatch.setenv(serve.API_KEY, "")  # which is none, whatever a client brings
    arguments = ["--receiver", tiny_pair.receiver, "--sharer", tiny_pair.sharers[0]]
    with (
        started(*arguments) as (_, address),
        openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["relay", "receiver", "sharer"]
        with pytest.raises(openai.NotFoundError, match="there are relay, receiver, sharer"):
            client.chat.completions.create(model="c2c", messages=QUESTION)
