"""Who talks: the arguments that say so, and the loading of what they name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from c2c_mlx.commands.status import Status
from c2c_mlx.config import Pair, from_dict
from c2c_mlx.models import registry

if TYPE_CHECKING:
    from c2c_mlx.fusion.fuser import Fuser
    from c2c_mlx.models.load import LanguageModel
    from c2c_mlx.models.memory import Need


@dataclass(frozen=True)
class Loaded:
    """What the arguments named, as far as it takes part."""

    receiver: LanguageModel
    sharers: list[LanguageModel]
    fusers: list[Fuser]  # one per sharer, or none
    need: Need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `parse` reads."""
    add = parser.add_argument
    models = "alias, folder or hub id (default: the embedded pair's)"
    add("--receiver", metavar="MODEL", help=models)
    add(
        "--sharer",
        action="append",
        metavar="MODEL",
        help="likewise; several times for several, the first of which also writes the relay",
    )
    add(
        "--fuser",
        action="append",
        metavar="FUSER",
        help="folder, name or hub id, one per sharer (default: the pair's)",
    )
    add(
        "--order",
        choices=("sequential", "parallel"),
        default="sequential",
        help="of several sharers: each sees the changes of those before it, or none (%(default)s)",
    )
    add(
        "--fuser-bits",
        type=int,
        choices=(4, 8),
        default=0,
        metavar="4|8",
        help="round the fuser's weights when it is loaded; saves memory on a GPU",
    )


def parse(args: argparse.Namespace, fuse_response: bool = False) -> Pair:
    """Who talks, the embedded pair where nobody else is named.

    Raises:
        C2CError: if fusers and sharers don't match.
    """
    receiver, sharer = registry.default_pair()
    fields = {
        "receiver": args.receiver or receiver,
        "sharers": args.sharer or [sharer],
        "fusers": args.fuser or [],
        "order": args.order,
        "fuse_response": fuse_response,
        "fuser_bits": args.fuser_bits,
    }
    return from_dict(Pair, fields, "--fuser")


def find_fusers(pair: Pair) -> list[Path]:
    """The folders of the fusers that were asked for, or of those that are known for the pair.

    Raises:
        C2CError: if there is none, or it or one of the models can't be had.
    """
    from c2c_mlx.fusers.store import find_for_pair

    with closing(Status(sys.stderr)) as status:

        def note(text: str) -> None:
            status.close()
            print(text, file=sys.stderr)

        return [
            find_for_pair(pair.receiver, sharer, given, status.loading, note)
            for sharer, given in pair.links
        ]


def load(
    pair: Pair,
    fusers: list[Path],
    n_sharers: int,
    status: Status,
    *,
    modes: Sequence[str] = (),
    tokens: int = 0,
    batch: int = 0,
) -> Loaded:
    """Loads the receiver, so many of the sharers, and the fusers, if all of it fits.

    Args:
        pair: who talks.
        fusers: their folders.
        n_sharers: how many of the sharers take part.
        status: told how far it is.
        modes: that will be asked; none: any. Like the next two, for the estimate of memory alone.
        tokens: of the longest conversation; 0: a long chat's.
        batch: conversations that are answered at once.

    Raises:
        C2CError: if something can't be had, or there is no room for it.
    """
    from c2c_mlx.fusers import disk
    from c2c_mlx.models import memory
    from c2c_mlx.models.load import find_folder, load_model

    sharers = pair.sharers[:n_sharers]
    need = memory.preflight(
        find_folder(pair.receiver, status.loading),
        [find_folder(sharer, status.loading) for sharer in sharers],
        [disk.measure(folder) for folder in fusers],
        bits=pair.fuser_bits,
        tokens=tokens or memory.CONTEXT,
        modes=modes or memory.MODES,
        batch=batch,
    )
    if status.on:
        status.close()
        print(need, file=sys.stderr)
    names = dict.fromkeys([pair.receiver, *sharers])
    models = {name: load_model(name, progress=status.loading) for name in names}
    return Loaded(
        models[pair.receiver],
        [models[sharer] for sharer in sharers],
        [disk.load(folder, pair.fuser_bits) for folder in fusers],
        need,
    )


def prompts_alone(loaded: Loaded, program: str, status: Status) -> str:
    """Says, and returns, that more could be fused than a command fuses; empty if it could not."""
    if not any(fuser.config.fuse_response for fuser in loaded.fusers):
        return ""
    status.close()
    note = "the fuser was made for answers, too; here prompts alone are fused"
    print(f"{program}: {note}", file=sys.stderr)
    return note
