"""c2c-train: fine-tune a fuser between two frozen models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from c2c_mlx.commands import Parser, run
from c2c_mlx.config import TrainConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.training import recipe
from c2c_mlx.training.run import (
    ARGUMENTS,
    BESIDE,
    PRESETS,
    TRACKERS,
    TRAIN,
    RunConfig,
    check_tracker,
    described,
)

if TYPE_CHECKING:
    from c2c_mlx.training.trainer import Trainer

PROGRAM = "c2c-train"
EPILOG = """\
examples:
  c2c-train --sharer qwen --receiver llama
  c2c-train --sharer qwen --receiver llama --plan
  c2c-train --sharer qwen --receiver llama --time 2h
  c2c-train --recipe list
  c2c-train --sharer qwen --receiver llama --recipe reading
  c2c-train --recipe run.yaml --iters 4000
  c2c-train --sharer qwen --receiver llama --data chats=3 --data more=1 --out runs/mine
  c2c-train --out runs/mine --resume
  c2c-train --plot runs/mine
  mlx.launch -n 2 -- c2c-train --recipe run.yaml
  c2c-chat --sharer gemma3-270m --receiver smollm2-135m --fuser runs/mine

Without --out a run goes into the cache folder, where every command finds it by its pair: what is
shipped comes first, then the latest that was trained here, then what is published. `c2c-weights
list` shows them, and the names by which --fuser takes any of them.

Without --data a recipe is taken: chat, from the hub, or reading, whose text lies in the package, if
the hub can't be had. A recipe is a file of YAML with any of these flags as keys (answer_with,
batch_size, ...), data as a list or as DATA: WEIGHT, fuser_config: fields of the fuser that the
preset does not fix, and for people why and licence. Several may be given, the later over the
earlier, and flags over all; --config is another word for --recipe. Every run keeps what it was told
as run.yaml. Under mlx.launch -n 2 two processes share each batch.

DATA is a hub data set (ORG/NAME, or ORG/NAME@REVISION), mine:sessions, or a folder with train.jsonl
and, if you like, valid.jsonl: one object per line, {"messages": [...]}, or {"prompt": ...,
"completion": ...}.
Rows may also have conversations (from, value), instruction with output, or question with answer;
input, context, system and history belong to these; --fields says what other data calls them.

Without a valid.jsonl up to 64 chats, and never more than a tenth, are kept out of training. At its
end a run says what they cost C2C, the receiver alone, and C2C with another chat's sharer or none,
and whether the fuser is worth using: in verdict.json, and on its card. --twin trains the control
behind it (OUT/twin), the same with nothing to read: what C2C gains over that is what the sharer
is worth. With --time both share it.

With --answer-with, rows without an answer are answered by one of the two models first: by the
receiver, and the fuser learns to leave alone what it can do by itself; by the sharer, and the fuser
learns what the sharer knows.
A row's "answer_to" (a text or messages) is what the answering model sees instead of the prompt: the
same in another language, with a document, a better question. Templates that tell the date tell
26 July 2024, so that a run does not depend on the day.

--plan says how long a run will take here and what it needs, and trains nothing; --time 2h chooses
the number of steps, the schedule and the evaluations, so that the run ends in time.

--resume continues exactly, as run.yaml says where a flag is left out, and refuses a run with other
models, chats or settings. What is reported and kept may change, and --iters: the learning rate then
follows the new length. With --time it keeps the number of steps that was planned.
"""

ANSWERERS = ("receiver", "sharer")


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, trains, returns an exit code."""
    args = _parser().parse_args(argv)
    command = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: _main(args, command), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Train a fuser: both models frozen, next-token loss on the answers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--recipe",
        "--config",
        action="append",
        metavar="NAME|FILE",
        help="YAML with what is not given as a flag; 'list' shows those that are here",
    )
    add("--sharer", metavar="MODEL", help="alias, folder, hub id, or URL of a c2c-serve --share")
    add("--receiver", metavar="MODEL", help="alias, folder or hub id")
    add(
        "--data",
        action="append",
        metavar="DATA[=WEIGHT]",
        help="folder or hub data set; may be given several times",
    )
    add(
        "--rows",
        type=int,
        metavar="N",
        help="of each source, at most; the hub is asked for no more",
    )
    add(
        "--fields",
        type=_fields,
        metavar="NAME=FIELD,...",
        help="what the data calls a layout's fields: prompt=query,completion=reply",
    )
    add("--out", metavar="DIR", help="the run's folder, and the fuser's (default: in the cache)")
    add("--answer-with", choices=ANSWERERS, help="answers rows that have no answer")
    add("--answer-tokens", type=int, metavar="N", help="of such an answer, at most (default: 40)")
    add("--preset", choices=PRESETS, help="size of the fuser (default: small)")
    add("--fuser", metavar="DIR", help="start from this fuser instead of a fresh one")
    add(
        "--fuse-response",
        action="store_true",
        default=None,
        help="for answers that are fused while they are written",
    )
    add(
        "--twin",
        action="store_true",
        default=None,
        help="then train the control, the same with nothing to read, and judge by it",
    )
    add("--time", metavar="TIME", help="as many steps as end in time: 90s, 15m, 2h, 1h30m")
    add("--plan", action="store_true", help="say what would happen, after a probe of ten steps")
    add("--json", action="store_true", help="with --plan: as one object")
    add("--resume", action="store_true", help="continue the run in --out exactly")
    add("--track", choices=TRACKERS, help="also report there (needs the extra of that name)")
    add("--plot", type=Path, metavar="RUN", help="only draw a run's curves into RUN/curves.png")
    group = parser.add_argument_group("the run (defaults in brackets)")
    for field in dataclasses.fields(TrainConfig):
        flag, kind = "--" + field.name.replace("_", "-"), get_type_hints(TrainConfig)[field.name]
        meaning = field.metadata["help"]
        if kind is bool:
            group.add_argument(flag, action="store_true", default=None, help=meaning)
        elif get_origin(kind) is tuple:
            group.add_argument(
                flag, type=float, nargs=2, metavar="B", help=f"{meaning} ({field.default})"
            )
        else:
            values = get_args(kind) or None
            group.add_argument(
                flag,
                type=str if values else kind,
                choices=values,
                metavar=None if values else kind.__name__[0].upper(),
                help=f"{meaning} ({field.default})" if field.default != "" else meaning,
            )
    return parser


def _seconds(text: str) -> float:
    """90s, 15m, 2h, 1h30m."""
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.replace(" ", ""))
    try:
        parts = [float(part or 0) for part in found.groups()] if found else [0.0]
    except ValueError:
        parts = [0.0]
    seconds = sum(n * unit for n, unit in zip(parts, (3600, 60, 1), strict=False))
    if not seconds > 0:
        raise C2CError(f"--time {text}: give hours, minutes or seconds, as in 2h, 15m or 1h30m")
    return seconds


def _fields(text: str) -> dict[str, str]:
    """NAME=FIELD,NAME=FIELD."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and field.strip() for name, _, field in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form prompt=query,...")
    return {name.strip(): field.strip() for name, _, field in pairs}


def _main(args: argparse.Namespace, command: str) -> None:
    began = time.monotonic()
    if args.plot:
        from c2c_mlx.training.plot import plot

        print(plot(args.plot))
        return
    if args.json and not args.plan:
        raise C2CError("--json is for --plan; a run writes its figures into metrics.jsonl")
    if args.plan and args.resume:
        raise C2CError("--plan is for a run that has not begun: leave it out to go on")
    if "list" in (args.recipe or ()):
        print(recipe.table())
        return
    carry_out(args, values_of(args), began, command)


def carry_out(
    args: argparse.Namespace, values: dict[str, Any], began: float, command: str
) -> Trainer | None:
    """Trains, or plans.

    Args:
        args: as this command's; what they lack was not given.
        values: what describes the run.
        began: on the clock of `time.monotonic`, from which `--time` counts.
        command: where the fuser comes from, for its card.

    Returns:
        The trainer, finished; None of a plan.
    """
    told = dict(values)
    track, limit = (values.pop(name, None) for name in BESIDE)
    if track is not None:
        check_tracker(track)
    deadline = began + _seconds(str(limit)) if limit is not None else None
    if deadline and "iters" in values:
        raise C2CError("--time finds the number of steps: leave --iters out, or --time")
    # A run that is resumed goes on with what was chosen for it, whatever it was told first.
    flags = [name for name in TRAIN if getattr(args, name, None) is not None]
    given = flags if args.resume else [name for name in TRAIN if name in values]
    config = described(values | {"given": given})
    if getattr(args, "plan", False):
        _plan(config, deadline, args.json, command)
        return None
    return _train(config, args.resume, deadline, track, command, told)


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """What describes the run: recipes, the later over the earlier, and flags over all of them.

    A run that is resumed was described before; without --out it is one of the pair's in the cache,
    without --data a recipe's.

    Raises:
        C2CError: for a recipe that can't be read, or what is missing.
    """
    given: dict[str, Any] = {}
    for name in args.recipe or ():
        given = _over(given, recipe.read(name))
    flags = {name: getattr(args, name, None) for name in (*ARGUMENTS, *BESIDE)}
    given = _over(given, {name: value for name, value in flags.items() if value is not None})
    if args.resume and given.get("out") is not None:
        given = _over(_told(Path(os.path.expanduser(str(given["out"])))), given)
        if not {"sharer", "receiver"} <= given.keys():
            raise C2CError(f"--resume: {given['out']} holds no run (no {recipe.FILE} there)")
    for name in ("sharer", "receiver"):
        if given.get(name) is None:
            raise C2CError(f"--{name} is missing; c2c-train --help has examples")
    if given.get("out") is None:
        if given.get("zero_sharer"):
            raise C2CError("--zero-sharer: a control is no fuser of its pair; name its --out")
        from c2c_mlx.fusers import trained
        from c2c_mlx.models import remote
        from c2c_mlx.training import checkpoints

        pair = str(given["receiver"]), remote.name_of(str(given["sharer"]))
        there = trained.runs(*pair)
        if args.resume and not there:
            raise C2CError("--resume: no run of this pair is in the cache; name it with --out")
        out = there[-1] if args.resume else checkpoints.place(*pair)
        given = _over(_told(out) if args.resume else {}, given | {"out": str(out)})
    if given.get("data") is None:
        name, line = recipe.default()
        print(line, file=sys.stderr)
        given = _over(recipe.read(name), given)
    return given


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """What two say of a run; a length that `above` gives takes the place of any other.

    So does a fuser to start from, of what describes a new one, and data, of the licence of other.
    """
    lengths, fuser, data = {"iters", "time"}, {"fuser"}, {"data"}
    for given, gone in ((lengths, lengths), (fuser, {"fuser_config"}), (data, {"licence"})):
        if given & above.keys():
            below = {name: value for name, value in below.items() if name not in gone}
    return below | above


def _told(out: Path) -> dict[str, Any]:
    """What a run was told when it began; nothing of one that kept no such file."""
    return recipe.read(str(out / recipe.FILE)) if (out / recipe.FILE).exists() else {}


def _plan(config: RunConfig, deadline: float | None, as_json: bool, command: str) -> None:
    """Plans on the clock of `time.monotonic`."""
    import c2c_mlx.blas  # noqa: F401

    from c2c_mlx.training import plan
    from c2c_mlx.training.assemble import assemble
    from c2c_mlx.training.display import Display

    with Display(plan.PROBE) as display:
        trainer = assemble(
            config, display, resume=False, source=command, dry=True, deadline=deadline
        )
        if deadline:
            fixed, until = {*config.given}, deadline - trainer.answering
            pace = plan.fit(trainer, until, fixed, config.twin, display.trying)
        else:
            pace = plan.probe(trainer, config.twin, display.trying)
        found = plan.describe(config, trainer, pace)
    print(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(plan.lines(found)))


def _train(
    config: RunConfig,
    resume: bool,
    deadline: float | None,
    track: str | None,
    command: str,
    told: dict[str, Any],
) -> Trainer:
    import c2c_mlx.blas  # noqa: F401

    import mlx.core as mx

    from c2c_mlx.fusers import trained
    from c2c_mlx.training import interrupt, plan
    from c2c_mlx.training.assemble import assemble, assemble_twin
    from c2c_mlx.training.dataset import refusals
    from c2c_mlx.training.display import Display, tracker

    is_first, out = mx.distributed.init().rank() == 0, config.folder
    fixed = set(told)
    if resume and deadline:
        config = plan.as_planned(config, fixed)
    with Display(config.train.iters, is_first) as display:
        trainer = assemble(config, display, resume=resume, source=command, deadline=deadline)
        if is_first:
            recipe.write(out / recipe.FILE, told)
        if deadline and not resume:
            pace = plan.fit(trainer, deadline, fixed, config.twin, display.trying)
            display.iters = trainer.config.iters
            lasts = plan.told(pace.seconds(trainer.config))
            display.say(f"{display.iters} steps fit into the time: about {lasts}")
        if config.twin and not trainer.valid:
            display.say("--twin: with no chats to measure on it will be compared with nothing")
        train = trainer.config
        if trainer.judged and not config.twin:
            display.say(f"finished already: {trainer.step} steps; a larger --iters goes on")
            return trainer
        tracking = None
        if track and is_first:
            tracking = tracker(track, out, dataclasses.asdict(train))

        def go_on(at_work: Trainer) -> bool:
            """Trains, and returns whether somebody asked to stop."""

            def report(metrics: dict[str, float]) -> None:
                display.report(metrics)
                if tracking and at_work is trainer:
                    tracking.log(metrics, step=int(metrics["step"]))

            def interrupted() -> None:
                display.say("stopping after what it is at; Ctrl-C again stops at once")

            with interrupt.noticed(interrupted) as stopped:
                at_work.run(report, display.step, stopped)
                return interrupt.anywhere(stopped)()

        is_stopped, last = go_on(trainer), trainer
        if config.twin and trainer.finished and not is_stopped:
            last = assemble_twin(trainer, config, display)
            display.say(f"the twin, which has nothing to read, from step {last.step} on")
            go_on(last)
            if last.finished and is_first:
                trainer.compare(last)
        if tracking:
            tracking.finish()
        if left_out := len(trainer.train.too_long):
            display.say(f"{left_out} chats were longer than {train.max_tokens} tokens and left out")
        if trainer.train.refused:
            display.say(refusals(trainer.train.refused))
        if trainer.verdict:
            display.say(trainer.verdict["verdict"])
        name = next((name for name, run in trained.every() if run == out), config.out)
        names = ["--fuser", name, "--sharer", config.sharer, "--receiver", config.receiver]
        display.say(f"fuser saved in {out}; chat with it: {shlex.join(['c2c-chat', *names])}")
        if not last.finished:
            display.say(
                f"stopped at step {last.step} of {train.iters}; the same with --resume goes on"
            )
            raise KeyboardInterrupt
        if config.twin and last is trainer:
            display.say("stopped before the twin; the same with --resume trains it")
            raise KeyboardInterrupt
        return trainer
