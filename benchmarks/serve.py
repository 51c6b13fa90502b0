"""Sixteen C2C conversations at once against one after the other, and 20 turns against c2c-chat.

All of it goes through `c2c-serve` in a process of its own, with the embedded pair.

python benchmarks/serve.py [turns] [at-once] [long]
"""

from __future__ import annotations

import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import ChatSession, Fuser, load_model
from c2c_mlx.config import SamplingConfig
from c2c_mlx.fusers import store
from c2c_mlx.models import registry

CHATS, TOKENS, TURNS, LONG = 16, 16, 20, 1000
SENTENCES = (
    "Translate to English: Il pleut depuis ce matin.",
    "What is the capital of France?",
    "Tell me one more thing about the sea, please, in a short sentence.",
    "Traduis en anglais : Je ne sais pas encore si je viendrai demain, mais je vais essayer.",
)


def main() -> None:
    parts = sys.argv[1:] or ["turns", "at-once", "long"]
    chat = in_c2c_chat() if "turns" in parts else []
    mx.clear_cache()
    code = "import sys; from c2c_mlx.commands.serve import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            told = iter(process.stderr.readline, "")
            port = next(int(found[1]) for line in told if (found := re.search(r":(\d+)/v1", line)))
            if "turns" in parts:
                turns(port, chat)
            if "at-once" in parts:
                at_once(port)
            if "long" in parts:
                beside_a_long_prompt(port)
        finally:
            process.terminate()


def ask(port: int, messages: Any, tokens: int = TOKENS) -> tuple[str, list[float], dict[str, Any]]:
    """Text, when each piece came (seconds after the request), and the last chunk."""
    body = {"model": "c2c", "messages": messages, "max_tokens": tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    text, times, last = "", [], {}
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            last |= chunk  # costs and usage may come in two of them
            for choice in chunk["choices"]:
                if (piece := choice["delta"].get("content")) is not None:
                    text += piece
                    times.append(time.perf_counter() - began)
    connection.close()
    return text, times, last


def at_once(port: int) -> None:
    """Throughput, first tokens, and whether every answer is what it is alone."""
    chats = [
        [{"role": "user", "content": f"{number}. " + " ".join(SENTENCES[: 1 + number % 4])}]
        for number in range(CHATS)
    ]
    ask(port, [{"role": "user", "content": "Hello"}])
    began = time.perf_counter()
    alone = [ask(port, chat) for chat in chats]
    middle = time.perf_counter()
    # The same prompts again would be found read: a word before each makes them new, not longer.
    with ThreadPoolExecutor(CHATS) as pool:
        fresh = [[{"role": "system", "content": "Hi."}, *chat] for chat in chats]
        together = list(pool.map(lambda chat: ask(port, chat), fresh))
        ended = time.perf_counter()
        again = list(pool.map(lambda chat: ask(port, chat), chats))
    same = sum(a[0] == b[0] for a, b in zip(alone, again, strict=True))
    one_by_one = [ask(port, chat) for chat in fresh]
    same += sum(a[0] == b[0] for a, b in zip(one_by_one, together, strict=True))
    counts = [sum(told[2]["usage"]["completion_tokens"] for told in of) for of in (alone, together)]
    rates = counts[0] / (middle - began), counts[1] / (ended - middle)
    firsts = [sorted(told[1][0] for told in of) for of in (alone, together)]
    print(
        f"{same} of {2 * CHATS} answers among {CHATS} at once are the same as alone, to the token"
    )
    print(f"one after the other {rates[0]:.1f} tokens/s, {CHATS} at once {rates[1]:.1f}, ", end="")
    print(f"{rates[1] / rates[0]:.2f} x, prompts included")
    for what, times in zip(("alone", "at once"), firsts, strict=True):
        print(
            f"first token {what}: median {statistics.median(times):.2f} s, last {times[-1]:.2f} s"
        )


def beside_a_long_prompt(port: int) -> None:
    """The longest gap between two tokens of an answer while a long prompt is read."""
    story = [{"role": "user", "content": "Tell me a long story about the sea."}]
    long = [{"role": "user", "content": "The sea is deep and wide, and " * (LONG // 8)}]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, port, story, 96)
        long_one = pool.submit(ask, port, long, 1).result()
        _, times, _ = running.result()
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    tokens, seconds = long_one[2]["usage"]["prompt_tokens"], long_one[1][0]
    print(
        f"while {tokens} tokens were read in {seconds:.1f} s, an answer's tokens came every ",
        end="",
    )
    print(f"{statistics.median(gaps):.2f} s (median), at the most after {max(gaps):.2f} s")


def in_c2c_chat() -> list[tuple[Any, str, Any, float]]:
    """A conversation: messages, answer, figures and seconds of every turn."""
    names = registry.default_pair()
    receiver, sharer = map(load_model, names)
    fuser = Fuser.load(store.find_for_pair(*names, None))
    session = ChatSession(receiver, sharer, fuser, sampling=SamplingConfig(max_tokens=16))
    told = []
    for turn in range(TURNS):
        question = SENTENCES[turn % len(SENTENCES)]
        messages = [*session.messages("c2c"), {"role": "user", "content": question}]
        tic = time.perf_counter()
        *_, finished = session.ask(question)
        seconds = time.perf_counter() - tic
        told.append((messages, finished.text, finished.figures, seconds))
    return told


def turns(port: int, chat: list[tuple[Any, str, Any, float]]) -> None:
    """The same conversation through the endpoint."""
    same, ratios, parts = 0, [], []
    for messages, text, figures, seconds in chat:
        tic = time.perf_counter()
        told, _, last = ask(port, messages, 16)
        ratios.append((time.perf_counter() - tic) / seconds)
        assert told.strip() == text, (told, text)
        usage = last["usage"]
        new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        same += new == figures.new_prompt_tokens
        cost, here = last["c2c"], vars(figures)
        first, tokens = "first_token_s", max(figures.generated_tokens - 1, 1)
        reading = ("align_s", "sharer_s", "receiver_s", "fuse_s", first)
        a_token = [(of["total_s"] - of[first]) / tokens for of in (here, cost)]
        parts.append([*((here[name], cost[name]) for name in reading), a_token])
    print(f"{same} of {TURNS} turns read as many new tokens as in c2c-chat, ", end="")
    print(f"and took {statistics.median(ratios[1:]):.2f} x its time (median)")
    for name, of in zip((*reading, "a token"), zip(*parts[1:], strict=True), strict=True):
        here, there = (statistics.median(x) for x in zip(*of, strict=True))
        print(f"  {name:14} {1000 * here:6.1f} ms in c2c-chat, {1000 * there:6.1f} by the endpoint")


if __name__ == "__main__":
    main()
