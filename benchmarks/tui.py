"""How the app feels: gate panel, keys while an answer comes, Esc, and its ends in a terminal.

    python benchmarks/tui.py                   all of it, in under two minutes
    python benchmarks/tui.py --cycles 200      with as many ends as a release should survive
    python benchmarks/tui.py --parts panel     one of panel, keys, ends

Ends are real: a pseudo-terminal, the command c2c-chat with two tiny models of the tests, keys
typed into it at a random moment, its exit code. Where others use the machine, too, the clock says
more about them; so what a thread computes is given beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pty
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from c2c_mlx import events
from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.models import registry
from c2c_mlx.models.embedded import install
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import until

TINY = Path(__file__).parents[1] / "tests" / "golden" / "data" / "e2e" / "qwen3_llama"
LONG = SamplingConfig(max_tokens=400, temp=0.7)
SIZE = (140, 50)


def tiny_pair(folder: Path) -> Pair:
    """The tests' models with a random fuser, made in a process of its own."""
    code = (
        "from c2c_mlx import Fuser, load_model\n"
        "from c2c_mlx.config import FuserConfig\n"
        f"r, s = load_model({str(TINY / 'receiver')!r}), load_model({str(TINY / 'sharer')!r})\n"
        "f = Fuser(FuserConfig(r.shape, s.shape, tuple((i, i + 2) for i in range(4)), 24, 20))\n"
        f"f.gate_logit = f.gate_logit + 1; f.save({str(folder)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    return Pair(str(TINY / "receiver"), (str(TINY / "sharer"),), (str(folder),))


def report(layers: int, tokens: int, seed: int) -> events.GateReport:
    """As from a long prompt and a deep receiver."""
    generator = np.random.default_rng(seed)
    weights, changes = generator.random((2, 2, layers, tokens))
    return events.GateReport(
        layers=tuple((i, i) for i in range(layers)),
        gates=((True,) * layers, (True,) * layers),
        weights=tuple(map(tuple, weights.mean(-1).tolist())),
        changes=tuple(map(tuple, changes.mean(-1).tolist())),
        tokens=tuple((f"r{i}", f"s{i}") for i in range(tokens)),
        token_weights=tuple(tuple(map(tuple, kind)) for kind in weights.tolist()),
        token_changes=tuple(tuple(map(tuple, kind)) for kind in changes.tolist()),
        start=0,
    )


async def gate_panel() -> None:
    """From a report that has arrived to its last row drawn, in each view."""
    layers, tokens = 36, 256
    from c2c_mlx.tui.preview import app as replayed

    chat = replayed(speed=float("inf"))
    async with chat.run_test(size=(140, 60)) as pilot:
        await until(lambda: chat.state.loaded is not None)
        view = chat.main.gate_panel.view
        diagonal, is_open = tuple((i, i) for i in range(layers)), ((True,) * layers,) * 2
        link = events.Link("sharer", "fuser", diagonal, is_open)
        view.show_loaded(
            events.Loaded(
                *("receiver", ("sharer",), (link,), "none", 0.0, 4096, layers),
            )
        )
        reports = [report(layers, tokens, seed) for seed in range(40)]
        for name in ("bars", "tokens", "turns"):
            view.view = name  # type: ignore[assignment]
            await pilot.pause()
            times = []
            for at in range(1, len(reports) + 1):
                tic = time.thread_time()
                view.show_reports([[r] for r in reports[:at]])
                rows = [view.render_line(y) for y in range(view.size.height)]
                times.append(1e3 * (time.thread_time() - tic))
            assert len(rows) >= layers
            print(
                f"gate panel, {layers} layers, {name:6}  median {statistics.median(times):5.1f} ms"
            )


async def typing_and_stopping(pair: Pair, rounds: int) -> None:
    """While a model writes: from a key to its letter on the screen, from Esc to the end."""
    engine = InferenceThread(pair, LONG)
    chat = ChatApp(engine, Conversation(pair, LONG), ["receiver"])
    echoes: list[tuple[float, float]] = []
    stops: list[tuple[float, float]] = []
    try:
        async with chat.run_test(size=SIZE) as pilot:
            await until(lambda: chat.state.loaded is not None, seconds=120)
            for _ in range(rounds):
                chat.main.prompt.show("Who wrote it?")
                await pilot.press("enter")
                await until(
                    lambda: chat.state.turn is not None and bool(chat.state.turn.answers), 60
                )
                for letter in "abc":
                    await asyncio.sleep(random.uniform(0, 0.05))
                    if chat.state.is_busy:
                        echoes.append(await echo(chat, letter))
                await asyncio.sleep(random.uniform(0, 0.2))
                if chat.state.is_busy:
                    tic, computed = time.perf_counter(), time.process_time()
                    chat.simulate_key("escape")
                    while chat.state.is_busy:
                        await asyncio.sleep(0.001)
                    spent = time.process_time() - computed
                    stops.append((1e3 * (time.perf_counter() - tic), 1e3 * spent))
                await until(lambda: not chat.state.is_busy, 60)
                await chat.action_new()
    finally:
        engine.close()
        engine.join()
    for what, times in (("key to echo, while writing", echoes), ("Esc to the end", stops)):
        clock, computing = map(list, zip(*times, strict=True))
        print(
            f"{what:27} median {statistics.median(clock):4.0f} ms, p95 {p95(clock):4.0f} ms;"
            f" computing {statistics.median(computing):4.1f} ms, p95 {p95(computing):4.1f} ms"
            f" (n {len(times)})"
        )


async def echo(chat: ChatApp, letter: str) -> tuple[float, float]:
    """Milliseconds from a key to the screen update that shows it, and of the UI's computing."""
    before = chat.main.prompt.text
    tic, computed = time.perf_counter(), time.thread_time()
    chat.simulate_key(letter)
    while chat.main.prompt.text == before:
        await asyncio.sleep(0.001)
    painted = asyncio.Event()
    chat.call_after_refresh(painted.set)
    await painted.wait()
    return 1e3 * (time.perf_counter() - tic), 1e3 * (time.thread_time() - computed)


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return float(np.quantile(values, 0.95))


def ends(pair: Pair, home: Path, cycles: int) -> None:
    """Starts c2c-chat in a pseudo-terminal, asks, stops or not, quits; counts what goes wrong."""
    command = [str(Path(sys.executable).with_name("c2c-chat")), "--max-tokens", "200"]
    command += ["--receiver", pair.receiver, "--sharer", *pair.sharers, "--fuser", *pair.fusers]
    codes: dict[Any, int] = {}
    unclean = 0
    for number in range(cycles):
        code, output = one_end(command, home)
        codes[code] = codes.get(code, 0) + 1
        # The terminal is clean if the alternate screen was left, and the cursor is back.
        is_clean = (
            output.rfind(b"\x1b[?1049l") > output.rfind(b"\x1b[?1049h")
            and output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l")
            and b"Traceback" not in output
        )
        unclean += not is_clean
        if code or not is_clean:
            said = output[output.rfind(b"\x1b[?1049l") :].decode(errors="replace")
            print(f"\rcycle {number + 1} ended with {code} and these words:\n{said[-6000:]}")
        if sys.stdout.isatty():
            print(f"\r{number + 1} of {cycles}", end="", flush=True)
    print(f"\rstart, ask or stop, quit: {cycles} cycles, exit codes {codes}, unclean {unclean}")


def one_end(command: list[str], home: Path) -> tuple[int | str, bytes]:
    """One cycle; returns the exit code (or what kept it from one) and the terminal's bytes."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"C2C_MLX_HOME": str(home), "TERM": "xterm-256color", "LINES": "40"}
        os.execv(command[0], command)
    # Quit while it starts, loads, reads, writes, or after a stop.
    keys = [b"Who wrote it?\r"] + random.choice([[], [b"\x1b"], [b"\x1b", b"And when?\r"]])
    steps = [(random.uniform(0, 1.0), key) for key in keys] if random.random() < 0.8 else []
    steps.append((random.uniform(0, 1.5), b"\x11"))
    output, deadline = b"", time.monotonic() + 120
    painted, when = False, 0.0
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([terminal], [], [], 0.02)
            if ready:
                try:
                    piece = os.read(terminal, 65536)
                except OSError:  # the other side is closed
                    piece = b""
                if not piece:
                    break
                output += piece
            if not painted and b"\x1b[?1049h" in output:
                painted, when = True, time.monotonic()
            if painted and steps and time.monotonic() - when > steps[0][0]:
                os.write(terminal, steps.pop(0)[1])
                when = time.monotonic()
        else:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return "hung", output
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output
    finally:
        os.close(terminal)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=15, help="ends (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns (%(default)s)")
    parser.add_argument("--parts", default="panel,keys,ends", metavar="P[,P]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        pair = tiny_pair(home / "fuser")
        if "panel" in args.parts:
            asyncio.run(gate_panel())
        if "keys" in args.parts:
            real = registry.default_pair()
            if all(map(install.is_installed, real)):
                writing = Pair(real[0], (real[1],))
            else:
                writing = pair
                print("the embedded pair is not in the cache: two tiny models write, and end soon")
            asyncio.run(typing_and_stopping(writing, args.rounds))
        if "ends" in args.parts:
            ends(pair, home, args.cycles)


if __name__ == "__main__":
    main()
