"""c2c-eval: the same items through every mode, with differences that say what they are worth."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from c2c_mlx.commands import Parser, pair, run
from c2c_mlx.commands.status import Status
from c2c_mlx.errors import C2CError
from c2c_mlx.evaluation.task import C2C_MODES, MODES, Item, Task
from c2c_mlx.progress import Progress
from c2c_mlx.talk import relay

PROGRAM = "c2c-eval"
EPILOG = """\
examples:
  c2c-eval --task valid.jsonl --json result.json
  c2c-eval --task trivia.jsonl --method text --mode receiver,sharer,c2c --limit 200
  c2c-eval --task arc-challenge --sharer qwen --receiver llama --fuser my-fuser --json arc.json
  c2c-eval --compare mine.json twin.json:c2c-zeroed

FILE holds one object per line, and its keys say what it is: 'question', 'choices' and 'answer'
(multiple choice); 'prompt' or 'messages' with 'accept', a list of texts (a fact: whether what is
written says one of them as whole words); 'messages', 'prompt' and 'completion', or another layout
that c2c-train reads (a reference answer: its NLL, and chrF and BLEU of what is written); the same
without an answer (how far a mode leaves the receiver's own answers alone). Rows with 'lang' or
'subject' are reported per group, too.
NAME is one of: mmlu-redux, arc-challenge, openbookqa, c-eval, gsm8k (from the hub).

An interrupted run leaves OUT.partial.jsonl; the same command continues it. --compare goes item by
item, and needs no model.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, evaluates, returns an exit code."""
    args = _parser().parse_args(argv)
    command = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: _run(args, command), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Run the same items through each mode, and report paired differences.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", metavar="FILE.jsonl|NAME", help="what is asked")
    what.add_argument(
        "--compare",
        nargs=2,
        metavar="OUT[:MODE]",
        help="difference of two results, mode c2c unless said otherwise",
    )
    add("--mode", metavar="M[,M]", help=f"of {', '.join(MODES)} (default: all that make sense)")
    add("--json", type=Path, metavar="OUT", help="write the result there, and a report beside it")
    pair.add_arguments(parser)
    add(
        "--method",
        choices=("generate", "logits", "text"),
        default="generate",
        help="of multiple choice: read the written answer, take the likeliest letter, or take the "
        "choice whose text is likeliest behind the question, in nats per byte (%(default)s)",
    )
    add("--limit", type=int, metavar="N", help="so many items, drawn with the seed")
    add("--crossed", action="store_true", help="note what each token of c2c owes to the sharer")
    add("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    add("--max-tokens", type=int, metavar="N", help="of an answer (default: 64, gsm8k 512)")
    add("--batch-size", type=int, default=16, metavar="N", help="items at a time (%(default)s)")
    add(
        "--latency",
        type=int,
        default=10,
        metavar="N",
        help="so many items are asked one by one and timed (%(default)s)",
    )
    return parser


def _run(args: argparse.Namespace, command: str) -> None:
    from c2c_mlx.evaluation.result import check_free

    if args.json:  # before hours of work
        check_free(args.json)
    if args.compare:
        _compare(args)
    else:
        _evaluate(args, command)


def _evaluate(args: argparse.Namespace, command: str) -> None:
    task, names, items = _task(args)
    who = pair.parse(args)
    folders = pair.find_fusers(who) if set(names) & set(C2C_MODES) else []

    from c2c_mlx import blas, device
    from c2c_mlx.evaluation import about, report, result, runner
    from c2c_mlx.evaluation.modes import Modes
    from c2c_mlx.fusers import disk

    if blas.notice:
        print(f"{PROGRAM}: {blas.notice}", file=sys.stderr)
    settings = {
        "task": args.task,
        "kind": task.kind,
        "items": about.digest_of_items(items),
        "modes": names,
        **asdict(who),
        "sharers": list(who.sharers),
        "fusers": [about.digest_of_file(disk.locate(f, disk.WEIGHTS)) for f in folders],
        "method": args.method if task.kind == "choice" else "",
        "seed": args.seed,
        "max_tokens": args.max_tokens or task.max_tokens,
        "latency": args.latency,
        "crossed": args.crossed,
    }
    log = runner.Log(args.json and args.json.with_name(f"{args.json.name}.partial.jsonl"), settings)
    status = Status(sys.stderr)

    def progress(mode: str, done: int, total: int) -> None:
        status.loading(Progress(f"{mode}: {done} of {total} items,", done, total))
        if done == total and not status.on:
            print(f"{mode}: {total} items done", file=sys.stderr, flush=True)

    try:
        with closing(status):
            n_sharers = len(folders) or int(names != ["receiver"])
            # A token has about three bytes of text; templates and answers come on top.
            longest = max(len(json.dumps(item.messages, ensure_ascii=False)) for item in items)
            relayed = relay.BACKGROUND_TOKENS if "relay" in names else 0
            loaded = pair.load(
                who,
                folders,
                n_sharers,
                status,
                modes=names,
                tokens=longest // 3 + 64 + relayed + settings["max_tokens"],
                batch=args.batch_size,
            )
            note = pair.prompts_alone(loaded, PROGRAM, status)
            modes = Modes(
                loaded.receiver,
                loaded.sharers,
                loaded.fusers,
                order=who.order,
                items=items,
                seed=args.seed,
                max_tokens=settings["max_tokens"],
            )
            runner.run(
                task,
                items,
                names,
                modes,
                log,
                batch_size=args.batch_size,
                alone=args.latency,
                crossed=args.crossed,
                progress=progress,
            )
    except KeyboardInterrupt:
        if log.path:
            print(f"{PROGRAM}: stopped; the same command continues", file=sys.stderr)
        raise
    except Exception as e:
        if device.is_interrupted(e):
            again = "the same command continues" if log.path else "start again"
            raise C2CError(f"macOS interrupted the GPU: {again}; {device.UNDISTURBED}") from None
        if not device.is_out_of_memory(e):
            raise
        raise C2CError(_too_much(str(e), args.batch_size, bool(log.path))) from None
    records = {mode: log.records[mode] for mode in names}
    if errors := runner.all_failed(records):
        log.remove()  # whatever is done about it, they are to be asked again
        raise C2CError(f"every item failed in every mode, the first one because {errors[0]}")
    facts = {
        "task": args.task,
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "receiver": who.receiver,
        "sharer": ", ".join(who.sharers),
        "fuser": ", ".join(map(str, folders)),
        "device": device.describe(),
        "versions": about.versions(),
        "settings": settings,
    }
    if note:
        facts["note"] = note
    found = report.summarise(task, items, records, facts, args.seed)
    print(f"{args.task}: {len(items)} items\n\n{report.tables(found, every_group=False)}")
    if args.json:
        result.write(args.json, found, report.markdown(found))
        log.remove()
        print(f"\nwritten: {args.json}, {result.report_path(args.json)}", file=sys.stderr)


def _too_much(error: str, batch_size: int, is_kept: bool) -> str:
    """What to do when the device is out of memory."""
    smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else "smaller models"
    continues = ", which continues where this broke off" if is_kept and batch_size > 1 else ""
    return f"out of memory ({' '.join(error.split())[:200]}): try {smaller}{continues}"


# --- what is asked ------------------------------------------------------------------------------


def _task(args: argparse.Namespace) -> tuple[Task, list[str], list[Item]]:
    """The task, its modes and its items, before anything is loaded."""
    from c2c_mlx.evaluation import questions

    least = {"limit": 1, "seed": 0, "max_tokens": 1, "batch_size": 1, "latency": 0}
    for name, n in least.items():
        if (value := getattr(args, name)) is not None and value < n:
            raise C2CError(f"--{name.replace('_', '-')} {value}: must be at least {n}")
    task, items = questions.load(args.task, args.method)
    names = _modes(args.mode, task)
    items = questions.draw(items, args.limit, args.seed)
    if "c2c-shuffled" in names and len(items) < 2:
        raise C2CError("c2c-shuffled needs at least two items; choose other modes with --mode")
    return task, names, items


def _modes(given: str | None, task: Task) -> list[str]:
    """Modes in the order of a report; the receiver is there where its answers are the reference."""
    if given is None:
        return list(task.modes)
    names = {part.strip() for part in given.split(",") if part.strip()}
    if not names or not names <= set(MODES):
        raise C2CError(f"--mode {given}: must be of {', '.join(MODES)}, with commas between")
    if not names <= set(task.modes):
        raise C2CError(
            f"--mode {given}: rows without an answer ask how far the receiver's own answers are "
            f"left alone; choose of {', '.join(task.modes)}"
        )
    if task.kind == "agreement":
        names.add("receiver")
    return [mode for mode in MODES if mode in names]


# --- two results --------------------------------------------------------------------------------


def _compare(args: argparse.Namespace) -> None:
    from c2c_mlx.evaluation import report, result

    names, sides = [], []
    for text in args.compare:
        file, _, mode = text.rpartition(":")
        path, mode = (Path(file), mode) if mode in MODES else (Path(text), "c2c")
        names.append(f"{path.stem} {mode}")
        sides.append((result.read(path), mode))
    found = result.compare(sides[0], sides[1], args.seed)
    text = report.compare_table(found, names)
    print(text)
    if args.json:
        sources = dict(zip(("a", "b"), args.compare, strict=True))
        result.write(args.json, {**sources, "scores": found}, text + "\n")
