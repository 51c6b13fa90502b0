"""c2c-doctor: what this machine is, what fits on it, and whether its numbers are right."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from c2c_mlx.commands import Parser, run
from c2c_mlx.commands.status import Status
from c2c_mlx.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from c2c_mlx.doctor.check import Check

PROGRAM = "c2c-doctor"
EPILOG = """\
It computes what is known on this very device and compares: a projector of the C2C authors, packed
against dense products, keys without their RoPE, conversations that grew by turns against prefills
from scratch, and the receiver alone against a fuser whose gates are shut. The embedded pair takes
part if it is in the cache folder; nothing is fetched.

exit code: 0 if all is well, 1 if a number is wrong, 2 for a mistake in the arguments
"""
UNITS = (
    ("_tokens_per_s", " tokens/s"),
    ("_billion_weights", " billion weights"),
    ("_gb", " GB"),
    ("_s", " s"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, examines, returns an exit code."""
    args = _parser().parse_args(argv)
    return run(lambda: _examine(args), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Say what this machine is, and prove that its numbers are right.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one object with everything")
    return parser


def _examine(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    from c2c_mlx.doctor import machine
    from c2c_mlx.doctor.check import run as prove
    from c2c_mlx.doctor.examination import Examination

    report: dict[str, Any] = {
        "device": machine.device_facts(),
        "versions": machine.versions(),
        "folders": machine.folders(),
        "models": machine.models(),
        "fusers": machine.fusers(),
    }
    examination = Examination()
    with closing(Status(sys.stderr)) as status:

        def show(what: str, done: int, total: int) -> None:
            status.loading(Progress(what, done, total))

        checks = list(prove(examination.proofs, show))
        show("timing", 1, 1)
        speed = examination.speed()
    failed = [check.name for check in checks if not check.passed]
    report |= {
        "checks": [dataclasses.asdict(check) for check in checks],
        "speed": speed,
        "not_examined": examination.left_out,
        "gpu_tests": machine.gpu_tests(),
        "failed": failed,
        "ok": not failed,
        "total_s": time.perf_counter() - began,
    }
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report, checks)
    return 1 if failed else 0


def _print(report: dict[str, Any], checks: Sequence[Check]) -> None:
    """For people: what there is, what was found, how fast it is."""
    from rich.console import Console

    console = Console(highlight=False)
    for section in ("device", "versions", "folders", "models", "fusers", "speed"):
        facts = report[section]
        if section in ("models", "fusers"):
            facts = {x["name"]: x.get("fits") or f"{x['size_gb']} GB" for x in facts}
        console.print(section, style="bold")
        console.print(_grid(facts) if facts else "  none here")
    console.print(_table(checks))
    for left_out in report["not_examined"]:
        console.print(left_out, markup=False)
    if tests := report["gpu_tests"]:
        console.print(f"`python -m pytest -m metal` runs {len(tests)} tests that need a GPU:")
        console.print(*(f"  {name}" for name in tests), sep="\n")
    seconds = f"{report['total_s']:.1f} s"
    if not report["failed"]:
        console.print(f"all {len(checks)} checks passed in {seconds}", style="bold green")
        return
    for check in checks:
        if not check.passed:
            console.print(f"FAIL {check.name}: {check.note}", style="bold red", markup=False)
    console.print(
        f"{len(report['failed'])} of {len(checks)} checks failed in {seconds}; please report it: "
        f"open an issue with what `{PROGRAM} --json` prints"
    )


def _grid(facts: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if value != "" and not isinstance(value, dict):
            grid.add_row(*map(Text, _fact(name, value)))
    return grid


def _fact(name: str, value: Any) -> tuple[str, str]:
    """A figure's name without its unit, and the figure with it."""
    suffix, unit = next(((s, u) for s, u in UNITS if name.endswith(s)), ("", ""))
    text = name.removesuffix(suffix).replace("_", " ")
    if isinstance(value, float):
        value = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"  {text}", f"{value}{unit}"


def _table(checks: Sequence[Check]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("check", "", "found", "allowed", "s"):
        table.add_column(column, justify="left" if column in ("check", "") else "right")
    for check in checks:
        table.add_row(
            check.name,
            Text("pass", "green") if check.passed else Text("FAIL", "bold red"),
            "" if check.error is None else f"{check.error:.1e}",
            "" if check.tolerance is None else f"{check.tolerance:.1e}",
            f"{check.seconds:.1f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
