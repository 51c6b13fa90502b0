"""A sharer elsewhere that is killed, or stops, in the midst of turns: what does each one cost?

python benchmarks/sharer_ends.py [KILLS [STALLS [SEED]]]

Every turn is a new conversation of two tiny models. SIGKILL or SIGSTOP comes at a random moment of
it; a turn that was over by then does not count. The turn must end in one line, the receiver must go
on alone, and once the sharer is back the same turn must give the answer that it gives when both
models are here.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx import ChatSession, Fuser, load_model
from c2c_mlx.config import FuserConfig, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.events import Finished
from c2c_mlx.models import remote

TINY = Path(__file__).parents[1] / "tests" / "golden" / "data" / "e2e" / "qwen3_llama"
SERVE = "import sys; from c2c_mlx.commands.serve import main; sys.exit(main())"
PATIENCE_S = 3.0  # instead of 30, and of 600
SAMPLING = SamplingConfig(max_tokens=4)


@contextmanager
def sharing(port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`c2c-serve --share`, and its address."""
    command = [sys.executable, "-c", SERVE, "--port", str(port), "--share", str(TINY / "sharer")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        told = iter(process.stderr.readline, "")
        url = next(found[1] for line in told if (found := re.search(r"(http://\S+)/v1", line)))
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def ask(session: ChatSession, number: int, mode: str = "c2c") -> str:
    session.reset()
    question = f"{number} " + " ".join(str(number * i % 997) for i in range(70))
    *_, finished = session.ask(question, mode)
    assert isinstance(finished, Finished)
    return finished.text


def main() -> None:
    given = [int(x) for x in sys.argv[1:]]
    kills, stalls, seed = [*given, *(100, 100, 0)[len(given) :]]
    remote.PATIENCE_S = remote.TURN_S = PATIENCE_S
    receiver, sharer = (load_model(TINY / name) for name in ("receiver", "sharer"))
    mx.random.seed(1)
    layers = tuple((i, i + 2) for i in range(4))
    fuser = Fuser(FuserConfig(receiver.shape, sharer.shape, layers, 24, 20))
    fuser.gate_logit = mx.ones_like(fuser.gate_logit)
    fuser.eval()
    here = ChatSession(receiver, sharer, fuser, sampling=SAMPLING)
    there, rng, port, counted = None, random.Random(seed), 0, {"killed": 0, "stalled": 0}
    lines: dict[str, int] = {}
    while counted["killed"] < kills or counted["stalled"] < stalls:
        with sharing(port) as (process, url):
            port = int(url.rpartition(":")[2])  # it comes back where it was
            if there is None:
                there = ChatSession(receiver, load_model(url), fuser, sampling=SAMPLING)
            while process.poll() is None:
                number = rng.randrange(1, 1 << 20)
                expected = ask(here, number)
                began = time.perf_counter()
                assert ask(there, number + 1)  # how long it takes, and that it can be had
                moment = rng.random() * (time.perf_counter() - began)
                what = "stalled" if counted["stalled"] < stalls else "killed"
                sign = signal.SIGSTOP if what == "stalled" else signal.SIGKILL
                timer = threading.Timer(moment, os.kill, (process.pid, sign))
                timer.start()
                try:
                    assert ask(there, number) == expected
                    ended = False  # all of it was there before the signal
                except C2CError as e:
                    ended, line = True, str(e)
                timer.join()
                assert ask(there, number, "receiver")
                if what == "stalled":
                    os.kill(process.pid, signal.SIGCONT)
                else:
                    process.wait()
                if ended:
                    assert "\n" not in line and url in line, line
                    reason = line.removeprefix(f"sharer {url}: ").partition(";")[0]
                    lines[reason] = lines.get(reason, 0) + 1
                    counted[what] += 1
                    print(f"{what} {counted[what]}: {line}", flush=True)
                if what == "stalled":
                    assert ask(there, number) == expected
                if counted["killed"] >= kills and counted["stalled"] >= stalls:
                    break
    with sharing(port):
        assert there and ask(there, 5) == ask(here, 5)
    left = [t for t in threading.enumerate() if t.name == "remote sharer"]
    for thread in left:
        thread.join(timeout=2 * PATIENCE_S)
        assert not thread.is_alive()
    print(f"{counted['killed']} kills, {counted['stalled']} stalls, a line each:")
    for reason, n in sorted(lines.items(), key=lambda of: -of[1]):
        print(f"{n:4} {reason}")


if __name__ == "__main__":
    main()
