"""How the app feels, and how it ends: gate panel, keys while an answer comes, Esc, quits.

    python benchmarks/tui.py                   all of it, in under two minutes
    python benchmarks/tui.py --cycles 200      with as many ends as a release should survive
    python benchmarks/tui.py --parts panel     one of panel, keys, quits, ends

Quits are at random moments of a turn, in the real app under Textual's Pilot, with two tiny models.
What their thread says has ended is noted beside the app, up to the thread's own end: all of that,
and every question that was sent, must be in the session file.

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
from collections import Counter
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from c2c_mlx import events
from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.models import registry
from c2c_mlx.models.embedded import install
from c2c_mlx.talk.engine import InferenceThread
from c2c_mlx.tui import session_file
from c2c_mlx.tui.app import ChatApp
from c2c_mlx.tui.conversation import Conversation
from c2c_mlx.tui.preview import until
from c2c_mlx.tui.run import leave
from c2c_mlx.tui.session_file import SessionFile

TINY = Path(__file__).parents[1] / "tests" / "golden" / "data" / "e2e" / "qwen3_llama"
LONG = SamplingConfig(max_tokens=400, temp=0.7)
SHORT = SamplingConfig(max_tokens=60, temp=0.7)
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


class Noting:
    """The engine's queue of events, and a note of every answer that ended."""

    def __init__(self, queue: SimpleQueue[events.EngineEvent]) -> None:
        self.queue = queue
        self.ended: list[events.Finished] = []

    def put(self, event: events.EngineEvent) -> None:
        """Called by the thread."""
        if isinstance(event, events.Finished):
            self.ended.append(event)
        self.queue.put(event)

    def get_nowait(self) -> events.EngineEvent:
        """Called by the app."""
        return self.queue.get_nowait()


async def one_quit(pair: Pair, number: int) -> tuple[ChatApp, InferenceThread, list[str], Noting]:
    """Asks once or twice, stops or not, quits; returns what was sent and what ended."""
    engine: Any = InferenceThread(pair, SHORT)
    engine.events = noted = Noting(engine.events)
    chat = ChatApp(engine, Conversation(pair, SHORT), ["c2c", "relay"], SessionFile())
    sent: list[str] = []
    async with chat.run_test(size=(120, 40)) as pilot:
        if random.random() < 0.8:  # else while it loads
            await until(lambda: chat.state.loaded is not None)
        for _ in range(random.choice((1, 1, 2))):
            await until(lambda: len(chat.state.conversation.turns) == len(sent))
            if chat.state.is_busy:
                break
            sent.append(f"Who wrote number {number}, {len(sent)}?")
            chat.main.prompt.show(sent[-1])
            chat.simulate_key("enter")
            await asyncio.sleep(random.choice((0, random.uniform(0, 0.6))))
            if random.random() < 0.3:
                chat.simulate_key("escape")
                await asyncio.sleep(random.uniform(0, 0.1))
        chat.simulate_key("ctrl+q")
        await pilot.pause()
    return chat, engine, sent, noted


def quits(pair: Pair, cycles: int) -> None:
    """Quits in the middle of a turn; counts what of it is in the session file."""
    counts: Counter[str] = Counter()
    for number in range(cycles):
        chat, engine, sent, noted = asyncio.run(one_quit(pair, number))
        leave(chat, engine)
        name = chat.state.conversation.name
        turns = session_file.read(name).turns if name else []
        saved = [a for turn in turns for a in turn.answers.values() if a.figures]
        known = [(a.text, a.reason, a.figures) for a in saved]
        asked = [turn.question for turn in turns]
        counts["quits"] += 1
        counts["questions"] += len(sent)
        counts["in the file"] += sum(question in asked for question in sent)
        counts["answers that ended"] += len(noted.ended)
        counts["in the file, too"] += sum(
            (e.text, e.reason, e.figures) in known for e in noted.ended
        )
        counts["cut short"] += sum(e.reason == "stopped" for e in noted.ended)
    print("; ".join(f"{what}: {n}" for what, n in counts.items()))
    if counts["questions"] != counts["in the file"]:
        raise SystemExit("a question was lost")
    if counts["answers that ended"] != counts["in the file, too"]:
        raise SystemExit("an answer was lost")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=15, help="ends (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns (%(default)s)")
    parser.add_argument("--parts", default="panel,keys,quits,ends", metavar="P[,P]")
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
        if "quits" in args.parts:
            os.environ["C2C_MLX_HOME"] = str(home)
            quits(pair, args.cycles)
        if "ends" in args.parts:
            ends(pair, home, args.cycles)


if __name__ == "__main__":
    main()
