"""How long `--help` of every command takes, next to an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("c2c-chat", "c2c-train", "c2c-eval", "c2c-weights", "c2c-serve", "c2c-doctor")
RUNS = 7


def seconds(*arguments: str) -> float:
    """Median over RUNS fresh interpreters."""
    times = []
    for _ in range(RUNS):
        tic = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - tic)
    return statistics.median(times)


def main() -> None:
    bare = seconds("-c", "pass")
    print(f"{'interpreter alone':20} {1e3 * bare:5.0f} ms")
    for name in COMMANDS:
        cost = seconds(str(Path(sys.executable).with_name(name)), "--help")
        print(f"{f'{name} --help':20} {1e3 * cost:5.0f} ms  {cost / bare:.1f} x")


if __name__ == "__main__":
    main()
