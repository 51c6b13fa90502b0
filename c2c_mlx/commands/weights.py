"""c2c-weights: look into fusers, fetch and share them, convert and shrink them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from c2c_mlx import atomic
from c2c_mlx.commands import Parser, one_line, run, shrink
from c2c_mlx.commands.status import Status
from c2c_mlx.errors import C2CError
from c2c_mlx.progress import Progress

if TYPE_CHECKING:
    import mlx.core as mx

    from c2c_mlx.config import FuserConfig, ModelShape, Provenance
    from c2c_mlx.fusion.fuser import Fuser

PROGRAM = "c2c-weights"
EPILOG = """\
examples:
  c2c-weights list
  c2c-weights pull qwen+llama
  c2c-weights show my-fuser
  c2c-weights convert qwen3_0.6b+qwen2.5_0.5b_Fuser my-fuser
  c2c-weights shrink my-fuser --to 5% --recipe reading
  c2c-weights push my-fuser me/my-fuser --dry-run
"""
FUSER = "folder, known name, or hub id"


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, runs a subcommand, returns its exit code."""
    args = _parser().parse_args(argv)
    return run(lambda: args.body(args), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="List, inspect, fetch, share, convert and shrink fusers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, body: Callable[[argparse.Namespace], None], text: str) -> _Adder:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(body=body)
        return command.add_argument

    add("list", _list, "list what is known, and what of it is in the cache")
    argument = add("show", _show, "show a fuser's shapes, layer map, open gates and provenance")
    argument("fuser", metavar="FUSER", help=FUSER)
    argument = add("pull", _pull, "fetch models and fusers into the cache, converted if need be")
    argument("names", nargs="+", metavar="NAME", help="that `list` shows, or a fuser's hub id")
    argument = add("push", _push, "upload a fuser and its model card to the hub")
    argument("fuser", metavar="FUSER", help=FUSER)
    argument("hub_id", metavar="ORG/NAME", help="repository; made if there is none")
    argument("--licence", metavar="ID", help="e.g. cc-by-4.0; needed if the fuser names none")
    argument("--private", action="store_true", help="of a repository that has to be made")
    argument("--dry-run", action="store_true", help="show what would be uploaded; needs no network")
    argument = add("convert", _convert, "turn a published PyTorch checkpoint into a fuser folder")
    argument("src", metavar="SRC", help="checkpoint folder, with config.json and final/")
    argument("dst", metavar="DST", help="fuser folder to make; must not exist or be empty")
    argument = add("quantize", _quantize, "pack a fuser's weights into 8 or 4 bits per number")
    argument("fuser", metavar="FUSER", help=FUSER)
    argument("dst", metavar="DST", help="fuser folder to make; must not exist or be empty")
    argument("--bits", type=int, choices=(8, 4), default=8, help="(%(default)s)")
    command = commands.add_parser(
        "shrink",
        help=shrink.TEXT,
        description=shrink.TEXT,
        epilog=shrink.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(body=lambda args: shrink.shrink(args, _find, PROGRAM))
    shrink.arguments(command)
    argument = add("verify", _verify, "check every byte of a fuser, or of a published checkpoint")
    argument("fuser", metavar="FUSER", help=f"{FUSER}, or checkpoint folder")
    argument = add("remove", _remove, "delete a fuser or a model of the embedded pair's cache")
    argument("name", metavar="NAME", help="a name that `list` shows as cached")
    return parser


_Adder = Callable[..., argparse.Action]


def _list(args: argparse.Namespace) -> None:
    from c2c_mlx.fusers import store, trained
    from c2c_mlx.models import hub, registry
    from c2c_mlx.models.embedded.install import model_folder
    from c2c_mlx.models.paths import downloads, size

    default = registry.default_pair()
    print("models (for --sharer and --receiver; * the default pair)")
    for alias in registry.aliases():
        if model := registry.find_model(alias):
            cached = hub.cached_size(model.hub) if model.hub else size(model_folder(alias))
            mark = "*" if alias in default else " "
            _print(f"{mark} {alias:17} {_size(cached):>8}  {model.description} [{model.licence}]")
    print("\nfusers (for --fuser, by receiver+sharer; * what a pair gets where none is named)")
    kept, first = dict(store.cached()), store.defaults()
    rows: list[tuple[str, Path | None, str]] = []
    for entry in registry.fusers():
        origin = f"on the hub, {store.find_remote(entry.name)}" if entry.hub else "shipped"
        rows.append((entry.name, kept.pop(entry.name, None), origin))
    rows += [(name, folder, "from the hub") for name, folder in kept.items()]
    rows += [(name, folder, "trained here") for name, folder in trained.every()]
    width = max(len(name) for name, *_ in rows)
    for name, folder, origin in rows:
        mark = "*" if name in first else " "
        _print(f"{mark} {name:{width}} {_size(size(folder)) if folder else '':>8}  {origin}")
    _print("  Those of the hub were trained on models that are not quantised: ...-bf16 above.")
    for unfinished in sorted(downloads("").glob("*")):
        _print(f"\nunfinished download: {unfinished.name}, {_size(size(unfinished))}")


def _show(args: argparse.Namespace) -> None:
    from c2c_mlx.fusers import disk
    from c2c_mlx.fusers.card import layer_map_text, tokens_text
    from c2c_mlx.fusion.fuser import count

    folder = _find(args.fuser)
    fuser = disk.load(folder)
    config, provenance = disk.read_description(folder)
    millions = count(replace(config, bits=0)) / 1e6
    rows = {
        "folder": str(folder),
        "receiver": _model(config.receiver),
        "sharer": _model(config.sharer),
        "layers": f"{layer_map_text(config)} (receiver from sharer)",
        "size": f"{_size(disk.locate(folder, disk.WEIGHTS).stat().st_size)}, "
        f"{millions:.1f} million parameters: hidden {config.hidden_dim}, "
        f"intermediate {config.intermediate_dim}, depth {config.depth}, {config.activation}"
        + (f", {config.bits} bits" if config.bits else ""),
        "tokens": tokens_text(config),
        "source": provenance.source,
        "trained": _trained_on(config, provenance),
        "steps": str(provenance.steps or ""),
        "data": ", ".join(provenance.data),
        "licence": provenance.licence,
        "metrics": ", ".join(f"{name} {value:.4g}" for name, value in provenance.metrics.items()),
        "gates": f"{fuser.gates.sum()} of {fuser.gates.size} open",
    }
    for name, text in rows.items():
        if text:
            _print(f"{name:9} {text}")
    _print_gates(fuser)


def _trained_on(config: FuserConfig, provenance: Provenance) -> str:
    """Which aliases give the models as a published fuser knows them."""
    from c2c_mlx.models import registry

    names = [registry.unquantised(m.name) for m in (config.receiver, config.sharer)]
    if not provenance.is_converted or None in names:
        return ""
    return f"on models that are not quantised, --receiver {names[0]} --sharer {names[1]}"


def _print_gates(fuser: Fuser) -> None:
    """One column per layer of the receiver."""
    can_draw = (sys.stdout.encoding or "").lower().startswith("utf")
    marks = {True: "█", False: "·"} if can_draw else {True: "#", False: "."}
    n_layers = fuser.config.receiver.layers
    print("".join(f"{n:<10}" for n in range(0, n_layers, 10)).rjust(10 * -(-n_layers // 10) + 10))
    for kind, gates in zip(("keys", "values"), fuser.gates.tolist(), strict=True):
        row = [" "] * n_layers
        for (layer, _), is_open in zip(fuser.config.layer_map, gates, strict=True):
            row[layer] = marks[is_open]
        print(f"  {kind:8}" + "".join(row).rstrip())
    print(f"  ({marks[True]} open, {marks[False]} closed, blank not fused; by receiver layer)")


def _pull(args: argparse.Namespace) -> None:
    from c2c_mlx.fusers import store
    from c2c_mlx.models import registry
    from c2c_mlx.models.load import find_folder

    for name in args.names:
        if registry.find_model(name):
            with closing(Status(sys.stderr)) as status:
                _print(str(find_folder(name, status.loading)))
            continue
        if Path(name).is_dir():
            raise C2CError(f"{name} is a folder: there is nothing to fetch")
        if store.cached_folder(name).is_dir():
            print(f"{PROGRAM}: was there; to fetch it anew, `remove` it first", file=sys.stderr)
        _print(str(_find(name)))


def _push(args: argparse.Namespace) -> None:
    import tempfile
    from dataclasses import replace

    from c2c_mlx.fusers import card, disk
    from c2c_mlx.models import hub

    if not hub.is_hub_id(args.hub_id):
        raise C2CError(f"'{args.hub_id}' is no name on the hub: give ORG/NAME")
    folder = _find(args.fuser)
    config, provenance = card.public(*disk.read_description(folder))
    licence = args.licence or provenance.licence
    if not licence:
        raise C2CError(f"{args.fuser} names no licence: give one, e.g. --licence cc-by-4.0")
    with tempfile.TemporaryDirectory() as staging:
        disk.copy(folder, Path(staging))  # what is uploaded has been looked through
        disk.write_description(Path(staging), config, replace(provenance, licence=licence))
        if not args.dry_run:
            url = hub.push(Path(staging), hub.FUSER_FILES, args.hub_id, private=args.private)
        for name in hub.FUSER_FILES:
            _print(f"{_size((Path(staging) / name).stat().st_size):>8}  {name}")
        if args.dry_run:
            shown = (Path(staging) / disk.CARD).read_text(encoding="utf-8")
            print("", *map(one_line, shown.splitlines()), sep="\n")
            print(f"{PROGRAM}: nothing was uploaded (--dry-run)", file=sys.stderr)
        else:
            _print(url)


def _convert(args: argparse.Namespace) -> None:
    from c2c_mlx.fusers.published import convert

    with closing(Status(sys.stderr)) as status:
        config = convert(args.src, args.dst, partial(_show_step, status, "converting"))
    _print(f"{args.dst}: {config.sharer.name} -> {config.receiver.name}")


def _quantize(args: argparse.Namespace) -> None:
    import c2c_mlx.blas  # noqa: F401

    import mlx.core as mx

    from c2c_mlx.fusers import disk
    from c2c_mlx.fusion.fuser import parameters
    from c2c_mlx.fusion.project import GROUP

    folder, target = _find(args.fuser), Path(args.dst)
    atomic.check_free(target)
    if disk.read_description(folder)[0].bits:
        raise C2CError(f"{args.fuser} is quantised already: start from the original")
    fuser = disk.load(folder)
    before = _change(fuser)
    fuser.quantise(args.bits)
    if not any(name.endswith(".packed") for name in parameters(fuser)):
        wide = f"hidden {fuser.config.hidden_dim}, intermediate {fuser.config.intermediate_dim}"
        raise C2CError(
            f"{args.fuser}: too narrow to be packed ({wide}; rows of {GROUP} are packed)"
        )
    disk.save(fuser, target, mx.float16)
    difference = mx.linalg.norm(_change(disk.load(target)) - before)
    sizes = [disk.locate(f, disk.WEIGHTS).stat().st_size for f in (folder, target)]
    error = (difference / mx.maximum(mx.linalg.norm(before), 1e-12)).item()
    _print(
        f"{target}: {_size(sizes[1])} of {_size(sizes[0])} ({sizes[1] / sizes[0]:.2f}); what it "
        f"adds to random caches differs by {error:.2%}"
    )


def _change(fuser: Fuser) -> mx.array:
    """What the open slices add to caches of random numbers, with any message gate held open."""
    import mlx.core as mx

    config = fuser.config
    mx.random.seed(0)
    shapes = [
        (len(config.layer_map), 1, m.kv_heads, 64, m.head_dim)
        for m in (config.sharer, config.receiver)
    ]
    sharer, receiver = ((mx.random.normal(s), mx.random.normal(s)) for s in shapes)
    if not config.message_gate:
        return fuser.change(sharer=sharer, receiver=receiver).delta.astype(mx.float32)
    bias = fuser.message_head.bias
    fuser.message_head.bias = mx.full(bias.shape, 1e4, bias.dtype)
    delta = fuser.change(sharer=sharer, receiver=receiver).delta.astype(mx.float32)
    fuser.message_head.bias = bias
    return delta


def _verify(args: argparse.Namespace) -> None:
    import hashlib

    from c2c_mlx.fusers import disk, published, store
    from c2c_mlx.fusion.fuser import parameters

    if (folder := Path(os.path.expanduser(args.fuser))).is_dir() and store.is_checkpoint(folder):
        with closing(Status(sys.stderr)) as status:
            config = published.check(folder, partial(_show_step, status, "reading"))
        _print(f"{folder}: {len(config.layer_map)} layers, fit to be converted")
        return
    folder = _find(args.fuser)
    fuser = disk.load(folder)
    with disk.locate(folder, disk.WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tensors = parameters(fuser)
    _print(f"{folder}: {len(tensors)} tensors as described, all finite, sha256 {digest}")


def _remove(args: argparse.Namespace) -> None:
    from c2c_mlx.fusers import store, trained
    from c2c_mlx.models import registry
    from c2c_mlx.models.embedded.install import model_folder
    from c2c_mlx.models.paths import discard
    from c2c_mlx.training.checkpoints import check_alone

    model = registry.find_model(args.name)
    if model and model.hub:
        raise C2CError(
            f"{args.name} lies in the hub's own cache: `hf cache rm model/{model.hub}` deletes it"
        )
    entry = store.find_entry(args.name)
    if entry and entry.shipped:
        raise C2CError(f"{args.name} is part of this installation and stays")
    is_known = store.find_remote(args.name) or args.name in dict(store.cached())
    if run := trained.find(args.name):
        check_alone(run)
    kept = run or (store.cached_folder(args.name) if is_known else None)
    folder = model_folder(args.name) if model else kept
    if folder is None or not (freed := discard(folder)):
        raise C2CError(f"{args.name} is not in the cache; `{PROGRAM} list` shows what is")
    _print(f"{args.name}: deleted, {_size(freed)}")


def _find(name: str) -> Path:
    from c2c_mlx.fusers import store

    with closing(Status(sys.stderr)) as status:

        def note(text: str) -> None:
            status.close()
            print(f"{PROGRAM}: {one_line(text)}", file=sys.stderr)

        return store.find_folder(name, status.loading, note)


def _show_step(status: Status, what: str, done: int, total: int) -> None:
    status.loading(Progress(what, done, total))


def _model(shape: ModelShape) -> str:
    return f"{shape}, tokenizer {shape.tokenizer[:8] or 'unknown'}"


def _size(n: int) -> str:
    """Bytes for people; nothing for nothing."""
    if n >= 1e9:
        return f"{n / 1e9:.2f} GB"
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB" if n else ""


def _print(text: str) -> None:
    """Prints one line; names in a foreign folder may hold anything."""
    print(one_line(text))


if __name__ == "__main__":
    sys.exit(main())
