"""c2c-chat: answers from a fused cache, beside the text relay and each model alone."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_mlx import atomic
from c2c_mlx.commands import Parser, pair, run
from c2c_mlx.commands.status import Status
from c2c_mlx.config import Pair, SamplingConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.events import MODES, Crossed, Finished, Mode, RelayedText, Text
from c2c_mlx.talk import relay

if TYPE_CHECKING:
    from c2c_mlx.models.memory import Need
    from c2c_mlx.talk.session import ChatSession

PROGRAM = "c2c-chat"
EPILOG = """\
examples:
  c2c-chat
  c2c-chat --prompt "What is the capital of France?"
  echo "Translate to English: Il pleut." | c2c-chat --mode c2c,relay,receiver --prompt -
  c2c-chat --sharer qwen --receiver llama --fuser my-fuser --json --prompt "Hello"
  c2c-chat --sharer gemma3-270m --fuser one --sharer gemma3-270m --fuser another

--mode says who answers: c2c (the receiver, from the fused cache), relay (the sharer writes, the
receiver reads), receiver or sharer (one model alone). Several, with commas, answer one by one; the
app, which opens in a terminal where there is no --prompt, begins with c2c,relay.
"""
MARKED_NATS = 1.0  # what a word must owe to the sharer, either way, to be marked
HELP = """\
/mode MODE[,MODE]  who answers: c2c, relay, receiver, sharer
/system TEXT       set the system prompt and start anew (no text: remove it)
/save FILE         write the conversations to FILE as JSON
/reset             forget the conversation
/quit              leave (also Ctrl-D); Ctrl-C stops an answer"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, chats, returns an exit code."""
    args = _parser().parse_args(argv)
    return run(lambda: _chat(args), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    defaults = SamplingConfig()
    parser = Parser(
        prog=PROGRAM,
        description="Chat with a receiver that reads a sharer's KV cache.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    pair.add_arguments(parser)
    add("--fuse-response", action="store_true", help="feed the answer, too, not the prompt alone")
    add("--mode", metavar="M[,M]", help=f"of {', '.join(MODES)} (default: c2c)")
    add("--prompt", metavar="TEXT", help="answer once; - reads standard input")
    add("--system", metavar="TEXT", help="system prompt")
    # Without defaults: what is not given is a resumed session's own.
    add("--max-tokens", type=int, metavar="N", help=f"({defaults.max_tokens})")
    add("--temp", type=float, metavar="T", help=f"0 is greedy ({defaults.temp})")
    add("--top-p", type=float, metavar="P", help=f"({defaults.top_p})")
    add("--seed", type=int, metavar="N", help=f"({defaults.seed})")
    add("--json", action="store_true", help="one object per mode and line, with figures")
    add("--crossed", action="store_true", help="say what each word of c2c owes to the sharer, nats")
    add("--plain", action="store_true", help="a conversation line by line, through a pipe, too")
    add("--resume", nargs="?", const="", metavar="NAME", help="reopen a session (default: latest)")
    return parser


def _chat(args: argparse.Namespace) -> int | None:
    modes = parse_modes(args.mode or "c2c")
    who = pair.parse(args, args.fuse_response)
    fields = {f: getattr(args, f) for f in ("max_tokens", "temp", "top_p", "seed")}
    given = {f: value for f, value in fields.items() if value is not None}
    sampling = from_dict(SamplingConfig, given, "arguments")
    if args.system is not None:
        _as_utf8(args.system, "--system")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    interactive = args.prompt is None and (args.plain or on_terminal)
    # The app is drawn on standard error.
    can_show = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if interactive and args.json:
        raise C2CError("--json is for single answers: give a --prompt, or one on standard input")
    if interactive and can_show and not args.plain:
        if args.crossed:
            raise C2CError("--crossed needs --prompt or --plain: in the app F9 tints the words")
        from c2c_mlx.tui.run import run as open_app

        if args.resume is not None and who != pair.parse(_parser().parse_args([])):
            raise C2CError("--resume goes on with the session's own models: leave out others")
        return open_app(who, given, args.system, modes if args.mode else (), args.resume)
    if args.resume is not None:
        raise C2CError("--resume needs a terminal, and neither --prompt nor --plain")
    prompt = None if interactive else _prompt(args.prompt)
    session, need = _session(who, modes, sampling, args.system)
    if prompt is None:
        _converse(session, modes, args.crossed)
    else:
        for mode in modes:
            weigh = args.crossed and mode == "c2c"
            _answer_once(session, prompt, mode, need if args.json else None, len(modes) > 1, weigh)
    return None


def parse_modes(text: str) -> list[Mode]:
    """'c2c,relay' -> modes, in order, each once.

    Raises:
        C2CError: for a name that is none.
    """
    names = dict.fromkeys(part.strip() for part in text.split(",") if part.strip())
    modes: list[Mode] = [m for name in names for m in MODES if m == name]
    if len(modes) != len(names) or not modes:
        raise C2CError(f"--mode {text}: must be of {', '.join(MODES)}, with commas between")
    return modes


def _prompt(given: str | None) -> str:
    try:
        text = sys.stdin.read() if given in (None, "-") else str(given)
    except UnicodeDecodeError:
        raise C2CError("standard input is not UTF-8 text") from None
    _as_utf8(text, "the prompt")
    if not text.strip():
        raise C2CError('the prompt is empty: --prompt "your question", or text on standard input')
    return text.strip("\n")


def _as_utf8(text: str, what: str) -> None:
    """Refuses bytes that are no UTF-8: to Python they are surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise C2CError(f"{what} is not UTF-8 text") from None


# --- models -------------------------------------------------------------------------------------


def _session(
    who: Pair, modes: list[Mode], sampling: SamplingConfig, system: str | None
) -> tuple[ChatSession, Need]:
    """Loads what the modes need and no more; a missing fuser is said before any model is read."""
    folders = pair.find_fusers(who) if "c2c" in modes else []
    status = Status(sys.stderr)

    from c2c_mlx import blas
    from c2c_mlx.talk.opening import open_session

    if blas.notice:
        print(f"{PROGRAM}: {blas.notice}", file=sys.stderr)
    with closing(status):
        n_sharers = len(folders) or int(modes != ["receiver"])
        loaded = pair.load(who, folders, n_sharers, status, modes=modes)
        session = open_session(
            who,
            loaded.receiver,
            loaded.sharers,
            loaded.fusers,
            sampling=sampling,
            system=system,
            on_prefill=status.reading,
        )
    return session, loaded.need


# --- answers ------------------------------------------------------------------------------------


def _answer_once(
    session: ChatSession,
    prompt: str,
    mode: Mode,
    json_with: Need | None,
    heading: bool,
    weigh: bool,
) -> None:
    """Prints text, or with `json_with` an object that holds the estimated memory as well.

    With `weigh` it also says what crossed: the text comes when it is all there, with marks.
    """
    if heading and not json_with:
        print(f"{mode}:")
    begun = False
    for event in session.ask(prompt, mode):
        if isinstance(event, Text) and not (json_with or weigh):
            text = event.text if begun else event.text.lstrip()
            begun = begun or bool(text)
            print(text, end="", flush=True)
        elif isinstance(event, Finished):
            if why := _why_nothing(event):
                print(f"{PROGRAM}: {mode}: {why}", file=sys.stderr)
            found = session.crossed() if weigh else None
            if json_with:
                record = _record(event) | {"memory": json_with.record()}
                if weigh:
                    pairs = zip(found.tokens, found.nats, strict=True) if found else ()
                    record["crossed"] = [[text, round(nats, 4)] for text, nats in pairs]
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                print(_marked(found) if found else "", flush=True)  # the text itself is out


def _marked(found: Crossed) -> str:
    """The answer, with the nats behind every word that owes the sharer a nat or more."""
    from c2c_mlx.text.words import spans

    marked, at = "", 0
    text = "".join(found.tokens)
    for _, end, nats in spans(list(zip(found.tokens, found.nats, strict=True))):
        marked += text[at:end] + (f"[{nats:+.1f}]" if abs(nats) >= MARKED_NATS else "")
        at = end
    return (marked + text[at:]).strip()


def _record(event: Finished) -> dict[str, Any]:
    """Contract 2's object; figures that the mode has no part in are left out."""
    record = {"mode": event.mode, "text": event.text, "reason": event.reason}
    figures = asdict(event.figures)
    if event.mode != "c2c":
        for name in ("gates_open", "fuse_s", "align_s"):
            del figures[name]
    if event.mode == "relay":
        record["relayed_text"] = event.relayed_text
    else:
        del figures["relayed_tokens"]
    return record | {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}


def _why_nothing(event: Finished) -> str:
    """Why there is no answer, or no text for a relay; empty where there is one."""
    if event.mode == "relay" and not event.relayed_text and event.reason != "stopped":
        return f"the sharer wrote nothing: {relay.why_nothing(event.figures.relayed_tokens)}"
    if not event.text and event.reason == "length":
        return f"no answer within {event.figures.generated_tokens} tokens, thoughts included"
    return ""


def _converse(session: ChatSession, modes: list[Mode], weigh: bool) -> None:
    """A conversation line by line; ends with Ctrl-D or /quit."""
    try:
        import readline  # noqa: F401  (history and editing for input())
    except ImportError:
        pass
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a wrong byte costs its line alone
    from c2c_mlx import device
    from c2c_mlx.talk.explain import explain

    names = " <- ".join([session.receiver.name, *filter(None, [_sharers(session)])])
    print(f"{names}; /help says what else can be typed", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        try:
            _as_utf8(line, "this line")
            if line == "/quit":
                return
            if line.startswith("/"):
                modes = _command(session, modes, line)
            elif line:
                for mode in modes:
                    _show_answer(session, line, mode, heading=len(modes) > 1)
                    if weigh and mode == "c2c" and (found := session.crossed()):
                        print(f"  crossed: {_marked(found)}")
        except KeyboardInterrupt:
            print("\n(stopped)")
        except Exception as e:
            is_told = device.is_out_of_memory(e) or device.is_interrupted(e)
            if not isinstance(e, C2CError) and not is_told:
                raise
            print(explain(e))


def _sharers(session: ChatSession) -> str:
    return ", ".join(lm.name for lm in session.sharers)


def _show_answer(session: ChatSession, question: str, mode: Mode, heading: bool) -> None:
    if heading or mode == "relay":
        print(f"[{mode}]")
    relayed = False
    with closing(session.ask(question, mode)) as answer:  # what was said stays, Ctrl-C or not
        for event in answer:
            if isinstance(event, RelayedText):
                print("" if relayed else "(sharer: ", event.text, sep="", end="", flush=True)
                relayed = True
            elif isinstance(event, Text):
                print(")\n" if relayed else "", event.text, sep="", end="", flush=True)
                relayed = False
            elif isinstance(event, Finished):
                if why := _why_nothing(event):
                    print(f"\n({why})", end="")
                f = event.figures
                print(f"\n  {f.first_token_s:.2f} s to the first token, {f.total_s:.2f} s in all")


def _command(session: ChatSession, modes: list[Mode], line: str) -> list[Mode]:
    """Runs a /command; returns the modes that answer from now on."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    commands: dict[str, Callable[[], None]] = {
        "/help": lambda: print(HELP),
        "/reset": session.reset,
        "/save": lambda: _save(session, argument),
        "/system": lambda: _set_system(session, argument),
    }
    if name == "/mode":
        wanted = parse_modes(argument)
        for mode in wanted:
            if mode != "receiver" and not (session.links if mode == "c2c" else session.sharers):
                raise C2CError(
                    f"{mode} needs what was not loaded: start again with --mode {','.join(wanted)}"
                )
        return wanted
    if name not in commands:
        raise C2CError(f"{name} is no command; /help lists them")
    commands[name]()
    return modes


def _set_system(session: ChatSession, text: str) -> None:
    session.system = text or None
    session.reset()


def _save(session: ChatSession, name: str) -> None:
    if not name:
        raise C2CError("/save needs a file: /save chat.json")
    path = Path(os.path.expanduser(name))
    text = json.dumps({mode: session.messages(mode) for mode in session.history}, indent=2)
    atomic.write_text(path, text + "\n")
    print(f"saved to {path}")
