"""c2c-weights: convert published checkpoints, look into a fuser, list what can be named."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from c2c_mlx.commands import one_line, run

if TYPE_CHECKING:
    from c2c_mlx.config import ModelShape
    from c2c_mlx.fuser import Fuser

PROGRAM = "c2c-weights"
EPILOG = """\
examples:
  c2c-weights convert qwen3_0.6b+qwen2.5_0.5b_Fuser my-fuser   # a folder of nics-efc/C2C_Fuser
  c2c-weights show my-fuser                                    # shapes, layers, open gates
  c2c-weights list                                             # models and fusers with a name
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, runs a subcommand, returns its exit code."""
    args = _parser().parse_args(argv)
    return run(lambda: args.body(args), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Convert, inspect and list fusers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, body: Callable[[argparse.Namespace], None], text: str) -> _Adder:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(body=body)
        return command.add_argument

    argument = add("convert", _convert, "turn a published PyTorch checkpoint into a fuser folder")
    argument("src", metavar="SRC", help="checkpoint folder, with config.json and final/")
    argument("dst", metavar="DST", help="fuser folder to make; must not exist or be empty")
    argument = add("show", _show, "show a fuser's shapes, layer map, open gates and provenance")
    argument("fuser", metavar="FUSER", help="folder, name of a shipped fuser, or hub id")
    add("list", _list, "list the models and fusers that have a name")
    return parser


_Adder = Callable[..., argparse.Action]


def _convert(args: argparse.Namespace) -> None:
    from c2c_mlx.convert import convert

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rprojector {done} of {total}", end=end, file=sys.stderr, flush=True)

    config = convert(args.src, args.dst, progress)
    _print(f"{args.dst}: {config.sharer.name} -> {config.receiver.name}")


def _show(args: argparse.Namespace) -> None:
    from c2c_mlx import checkpoint
    from c2c_mlx.card import layer_map_text

    folder = checkpoint.find_folder(args.fuser)
    fuser = checkpoint.load(folder)
    config, provenance = fuser.config, fuser.provenance
    size = sum(w.size for w in checkpoint.parameters(fuser).values())
    rows = {
        "folder": str(folder),
        "receiver": _model(config.receiver),
        "sharer": _model(config.sharer),
        "layers": f"{layer_map_text(config)} (receiver from sharer)",
        "size": f"{size / 1e6:.1f} million parameters: hidden {config.hidden_dim}, "
        f"intermediate {config.intermediate_dim}, depth {config.depth}, {config.activation}",
        "tokens": f"alignment {config.alignment}, positions {config.positions}",
        "source": provenance.source,
        "steps": str(provenance.steps or ""),
        "data": ", ".join(provenance.data),
        "licence": provenance.licence,
        "metrics": ", ".join(f"{name} {value}" for name, value in provenance.metrics.items()),
        "gates": f"{fuser.gates.sum()} of {fuser.gates.size} open",
    }
    for name, text in rows.items():
        if text:
            _print(f"{name:9} {text}")
    _print_gates(fuser)


def _print_gates(fuser: Fuser) -> None:
    words = {True: "open", False: "closed"}
    print("\nreceiver layer  sharer layer  keys    values")
    for (receiver, sharer), keys, values in zip(
        fuser.config.layer_map, *fuser.gates.tolist(), strict=True
    ):
        print(f"{receiver:14}  {sharer:12}  {words[keys]:6}  {words[values]}")


def _list(args: argparse.Namespace) -> None:
    from c2c_mlx import registry

    default = registry.default_pair()
    print("models (for --sharer and --receiver; * the default pair)")
    for alias in registry.aliases():
        if model := registry.find_model(alias):
            mark = "*" if alias in default else " "
            _print(f"{mark} {alias:14} {model.description} [{model.licence}]")
    print("\nfusers (for --fuser)")
    fusers = registry.fusers()
    for name, folder in fusers.items():
        _print(f"  {name}  {folder}")
    if not fusers:
        print("  none in this installation")


def _model(shape: ModelShape) -> str:
    return f"{shape}, tokenizer {shape.tokenizer[:8] or 'unknown'}"


def _print(text: str) -> None:
    """Prints one line; names in a foreign folder may hold anything."""
    print(one_line(text))


if __name__ == "__main__":
    sys.exit(main())
