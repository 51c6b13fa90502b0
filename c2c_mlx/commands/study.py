"""c2c-study: the paper's questions about why C2C works, asked of any pair on any task."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_mlx.commands import Parser, pair, run
from c2c_mlx.commands.status import Status
from c2c_mlx.config import Pair
from c2c_mlx.errors import C2CError
from c2c_mlx.progress import Progress

if TYPE_CHECKING:
    from c2c_mlx.evaluation.runner import Log
    from c2c_mlx.evaluation.task import Item, Task
    from c2c_mlx.studies.pairs import Pairing
    from c2c_mlx.studies.study import Work

PROGRAM = "c2c-study"
STUDIES = {
    "enrich": "is a cache better that was computed behind examples, without being longer?",
    "layers": "the same, one layer at a time, and the best and worst together",
    "transform": "how well can one model's cache be mapped into the other's?",
    "gates": "what is each of a fuser's slices worth, and do the app's bars show it?",
    "rank": "how many directions do both models' caches and the fused one use?",
    "pairs": "who gains from whom: pairs of models and modes",
}
# How many of the pair's sharers a study reads, and whether it needs the fuser.
NEEDS = {
    "enrich": (0, False),
    "layers": (0, False),
    "transform": (1, False),
    "gates": (1, True),
    "rank": (1, True),
}
EPILOG = (
    "studies:\n"
    + "\n".join(f"  {name:10} {what}" for name, what in STUDIES.items())
    + """

examples:
  c2c-study gates --task valid.jsonl --limit 60 --out studies/gates
  c2c-study transform --sharer qwen --receiver llama --task valid.jsonl --out studies/transform
  c2c-study pairs --pair qwen,qwen2.5 --pair qwen,llama --task trivia.jsonl --out studies/pairs

DIR gets result.json, report.md and a picture. An interrupted study leaves its records there; the
same command continues it. FILE is a file of c2c-eval, or NAME one of its benchmarks, with reference
answers.
"""
)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, studies, returns an exit code."""
    args = _parser().parse_args(argv)
    command = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: _run(args, command), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Ask one of the paper's questions of any pair, on any task.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("study", choices=STUDIES, help="which question")
    pair.add_arguments(parser)
    add("--task", required=True, metavar="FILE.jsonl|NAME", help="what is asked")
    add("--out", type=Path, required=True, metavar="DIR", help="where results go")
    add("--limit", type=int, metavar="N", help="so many items, drawn with the seed")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--shots", type=int, default=5, metavar="N", help="examples of a question (%(default)s)")
    add(
        "--pair",
        action="append",
        metavar="R,S[,FUSER[,TWIN]]",
        help="of pairs, several times: receiver, sharer, fuser, and a twin trained without sharer",
    )
    return parser


def _run(args: argparse.Namespace, command: str) -> None:
    began = time.perf_counter()
    args.out = Path(os.path.expanduser(args.out))
    task, items = _items(args)
    if args.pair and args.study != "pairs":
        raise C2CError("--pair belongs to c2c-study pairs; name a pair with --receiver, --sharer")
    if args.pair and (args.receiver or args.sharer or args.fuser):
        raise C2CError("--pair names models and fuser: leave out --receiver, --sharer and --fuser")
    if len(args.sharer or ()) > 1 and args.study == "pairs":
        raise C2CError("c2c-study pairs reads one sharer at a time: name each with a --pair")
    _check_out(args.out)

    from c2c_mlx import blas, device
    from c2c_mlx.evaluation import about
    from c2c_mlx.evaluation.runner import Log
    from c2c_mlx.studies import study

    picture = study.figure(11, 6 if args.study == "transform" else 4)
    if blas.notice:
        print(f"{PROGRAM}: {blas.notice}", file=sys.stderr)
    module = import_module(f"c2c_mlx.studies.{args.study}")
    who = [_pairing(text, args) for text in args.pair or [None]]
    names = _names(who)
    status = Status(sys.stderr)

    def progress(what: str, done: int, total: int) -> None:
        status.loading(Progress(f"{what}: {done} of {total},", done, total))
        if done == total and not status.on:
            print(f"{what}: {total} done", file=sys.stderr, flush=True)

    settings = {
        "study": args.study,
        "task": args.task,
        "items": about.digest_of_items(items),
        "seed": args.seed,
        "shots": args.shots,
    }
    logs: list[Log] = []

    def log(name: str, **more: Any) -> Log:
        logs.append(Log(args.out / f"{name}.partial.jsonl", settings | more))
        return logs[-1]

    try:
        with closing(status):
            if args.study == "pairs":
                found = module.run(
                    task,
                    items,
                    _pairings(names, who, status),
                    lambda name, about: log(f"pair-{len(logs)}", pair=name, **about),
                    args.seed,
                    progress,
                )
            else:
                found = module.run(_work(args, who[0][0], task, items, log, status, progress))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; the same command continues", file=sys.stderr)
        raise
    described = {
        "study": args.study,
        "task": args.task,
        "asked": len(items),
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.perf_counter() - began),  # since it was last begun
        "receivers": ", ".join(one.receiver for one, _ in who),
        "sharers": ", ".join(", ".join(one.sharers) for one, _ in who),
        "device": device.describe(),
        "versions": about.versions(),
        "settings": settings,
    }
    text = module.report(found)
    module.draw(found, picture)
    facts = "\n".join(f"- {k}: {v}" for k, v in described.items() if isinstance(v, (str, int)))
    head = f"# c2c-study {args.study}: {STUDIES[args.study]}\n\n{facts}\n\n"
    image = f"![{args.study}]({args.study}.png)\n"
    study.write(args.out, args.study, described | found, f"{head}{text}\n{image}", picture)
    for kept in logs:
        kept.remove()
    print(text)
    print(f"written: {args.out}", file=sys.stderr)


def _items(args: argparse.Namespace) -> tuple[Task, list[Item]]:
    from c2c_mlx.evaluation import questions

    for name, least in (("limit", 1), ("seed", 0), ("shots", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise C2CError(f"--{name} {value}: must be at least {least}")
    task, items = questions.load(args.task, "generate" if args.study == "pairs" else "logits")
    return task, questions.draw(items, args.limit, args.seed)


def _check_out(out: Path) -> None:
    if (out / "result.json").exists():
        raise C2CError(f"--out {out}: a result is there already; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise C2CError(f"--out {out}: cannot be made ({e.strerror})") from None


def _work(
    args: argparse.Namespace,
    who: Pair,
    task: Task,
    items: list[Item],
    log: Callable[..., Log],
    status: Status,
    progress: Callable[[str, int, int], None],
) -> Work:
    """Loads what a study of one pair needs and no more."""
    from c2c_mlx.evaluation import about
    from c2c_mlx.fusers import disk
    from c2c_mlx.studies.study import Work

    n_sharers, needs_fuser = NEEDS[args.study]
    folders = pair.find_fusers(who) if needs_fuser else []
    fusers = [about.digest_of_file(disk.locate(folder, disk.WEIGHTS)) for folder in folders]
    kept = log(args.study, **asdict(who) | {"sharers": list(who.sharers), "fusers": fusers})
    loaded = pair.load(who, folders, len(folders) or n_sharers, status)
    pair.prompts_alone(loaded, PROGRAM, status)
    return Work(
        receiver=loaded.receiver,
        sharers=loaded.sharers,
        fusers=loaded.fusers,
        order=args.order,
        task=task,
        items=items,
        log=kept,
        seed=args.seed,
        shots=args.shots,
        progress=progress,
    )


# --- pairs --------------------------------------------------------------------------------------


def _pairing(text: str | None, args: argparse.Namespace) -> tuple[Pair, str | None]:
    """A pair and its twin: from the pair's arguments, or from a --pair."""
    if text is None:
        return pair.parse(args), None
    parts = [part.strip() for part in text.split(",")]
    if not 2 <= len(parts) <= 4 or not all(parts[:2]):
        raise C2CError(f"--pair {text}: must be RECEIVER,SHARER[,FUSER[,TWIN]]")
    receiver, sharer, fuser, twin = [*parts, "", ""][:4]
    given = argparse.Namespace(**vars(args))
    given.receiver, given.sharer = receiver, [sharer]
    given.fuser = [fuser] if fuser else None
    return pair.parse(given), twin or None


def _names(who: Sequence[tuple[Pair, str | None]]) -> list[str]:
    """What each pair is called; where several have the same models, by fuser and twin as well.

    Raises:
        C2CError: if two are the same all the same.
    """
    names = [f"{one.receiver} <- {one.sharers[0]}" for one, _ in who]
    names = [
        ", ".join(filter(None, (name, *one.fusers, twin))) if names.count(name) > 1 else name
        for name, (one, twin) in zip(names, who, strict=True)
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise C2CError(f"--pair: {twice[0]} is there twice; leave one out, or name another fuser")
    return names


def _pairings(
    names: Sequence[str], who: Sequence[tuple[Pair, str | None]], status: Status
) -> Iterator[Pairing]:
    """Loads one pair after the other, and keeps none of them."""
    for name, (one, twin) in zip(names, who, strict=True):
        yield _load(name, one, twin, status)


def _load(name: str, one: Pair, twin: str | None, status: Status) -> Pairing:
    """Loads a pair; one without a fuser has no C2C modes."""
    from c2c_mlx.evaluation import about
    from c2c_mlx.fusers import disk
    from c2c_mlx.fusers.store import find_for_pair
    from c2c_mlx.studies.pairs import Pairing

    try:
        folders = pair.find_fusers(one)
    except C2CError as e:
        if one.fusers:
            raise
        folders = []
        status.close()
        print(f"{PROGRAM}: {one.receiver} <- {one.sharers[0]} without c2c: {e}", file=sys.stderr)
    twins = [find_for_pair(one.receiver, one.sharers[0], twin)] if twin else []
    fuser, of_twin = (
        [about.digest_of_file(disk.locate(folder, disk.WEIGHTS)) for folder in found]
        for found in (folders, twins)
    )
    loaded = pair.load(one, folders, 1, status)
    pair.prompts_alone(loaded, PROGRAM, status)
    return Pairing(
        name,
        loaded.receiver,
        loaded.sharers[0],
        next(iter(loaded.fusers), None),
        disk.load(twins[0], one.fuser_bits) if twins else None,
        {"fuser": fuser, "twin": of_twin, "fuser_bits": one.fuser_bits},
    )
