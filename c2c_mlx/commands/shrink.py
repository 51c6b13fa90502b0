"""c2c-weights shrink: a big fuser made small, and what that costs."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable

from c2c_mlx.commands import one_line, train
from c2c_mlx.errors import C2CError

TEXT = "make a big fuser small: from its weights, then learning to do what it does"
EPILOG = """\
examples:
  c2c-weights shrink qwen+qwen2.5 --to 5%
  c2c-weights shrink runs/big --to 5% --recipe reading --time 1h --out runs/small
  c2c-weights shrink runs/big --to 10% --recipe runs/big/run.yaml --iters 400 --out runs/small

The small fuser has fewer hidden channels and is one like any other. Prompts are those of --data or
--recipe, as in c2c-train; of a recipe all counts but what it says of a new fuser. Answers are for
the losses at the end alone: both fusers' and the receiver's, on chats that are kept out. Ctrl-C
leaves a fuser that can be used; the same with --resume goes on. The nearer it begins, which is
told, the lower the learning rate that helps: a very small one wants 3e-3. c2c-train --fuser OUT
teaches it more, from answers.
"""
# What a recipe may say of a fresh fuser and how it learns, which is not this one.
_FRESH = ("fuser_config", "preset", "fuse_response", "twin", "gates", "zero_sharer")
_USUAL = {"iters": 300, "learning_rate": 3e-5}  # where nothing is said


def arguments(command: argparse.ArgumentParser) -> None:
    """The subcommand's."""
    add = command.add_argument
    add("fuser", metavar="FUSER", help="folder, known name, or hub id")
    add("--to", type=_share, required=True, metavar="SHARE", help="of its parameters: 5%%, 0.05")
    add("--out", metavar="DIR", help="the small fuser's folder (default: the pair's in the cache)")
    add("--recipe", action="append", metavar="NAME|FILE", help="as in c2c-train")
    add("--data", action="append", metavar="DATA[=WEIGHT]", help="as in c2c-train")
    add("--rows", type=int, metavar="N", help="of each source, at most")
    add("--sharer", metavar="MODEL", help="(default: as the fuser calls it)")
    add("--receiver", metavar="MODEL", help="likewise")
    add("--iters", type=int, metavar="I", help=f"steps ({_USUAL['iters']})")
    add("--time", metavar="TIME", help="as many steps as end in time: 15m, 2h")
    add("--batch-size", type=int, metavar="I", help="chats per batch (8)")
    add("--learning-rate", type=float, metavar="F", help=f"({_USUAL['learning_rate']})")
    add("--seed", type=int, metavar="I", help="(0)")
    add("--prefill-cache", metavar="DIR", help="keeps frozen prefills for later epochs and runs")
    add("--resume", action="store_true", help="continue the run in --out exactly")


def shrink(args: argparse.Namespace, find: Callable[[str], object], program: str) -> None:
    """Trains a small fuser, and prints how it compares with the big one.

    Args:
        args: the subcommand's.
        find: a fuser's name -> its folder.
        program: that is named in the small one's card.
    """
    began = time.monotonic()
    from c2c_mlx.fusers import disk
    from c2c_mlx.models import registry
    from c2c_mlx.training.shrink import smaller

    config, provenance = disk.read_description(str(find(args.fuser)))
    wanted = smaller(config, args.to)  # refused before anything is loaded
    for name in ("sharer", "receiver"):
        if getattr(args, name) is None:
            trained_on = getattr(config, name).name
            published = registry.unquantised(trained_on) if provenance.is_converted else None
            setattr(args, name, published or trained_on)
    values = {k: v for k, v in train.values_of(args).items() if k not in _FRESH}
    for name, value in _USUAL.items():
        if not (name == "iters" and "time" in values):
            values.setdefault(name, value)
    values |= {"fuser": args.fuser, "shrink": args.to}
    line = f"hidden {wanted.hidden_dim} of {config.hidden_dim}, "
    line += f"intermediate {wanted.intermediate_dim} of {config.intermediate_dim}"
    print(f"{program}: {line}", file=sys.stderr)
    command = shlex.join([program, "shrink", args.fuser, "--to", f"{args.to:.4g}"])
    trainer = train.carry_out(args, values, began, command)

    from c2c_mlx.training import shrunk
    from c2c_mlx.training.distil import Distiller

    if not isinstance(trainer, Distiller):
        raise C2CError(f"--out {values['out']}: the run there makes no fuser small")
    found = shrunk.compare(trainer)
    shrunk.write(trainer.folder, found)
    for line in shrunk.lines(found):
        print(one_line(line))
    ask = ["c2c-eval", "--sharer", args.sharer, "--receiver", args.receiver, "--task", "FILE"]
    asked = "; ".join(
        shlex.join([*ask, "--mode", "c2c", "--fuser", str(fuser), "--json", file])
        for fuser, file in ((args.fuser, "big.json"), (trainer.folder, "small.json"))
    )
    print(f"the change of an evaluation: {asked}; c2c-eval --compare small.json big.json")


def _share(text: str) -> float:
    """5%, or 0.05."""
    number = text.strip()
    try:
        share = float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share between 0 and 1, such as 5%")
    return share
