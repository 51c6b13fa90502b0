"""c2c-serve: the pair as an endpoint for every client that speaks OpenAI's dialect."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from c2c_mlx.commands import Parser, pair, run
from c2c_mlx.commands.status import Status
from c2c_mlx.config import Pair, SamplingConfig, from_dict
from c2c_mlx.errors import C2CError
from c2c_mlx.progress import Progress

if TYPE_CHECKING:
    from c2c_mlx.serving.reading import Team

PROGRAM = "c2c-serve"
API_KEY = "C2C_API_KEY"
EPILOG = """\
examples:
  c2c-serve
  c2c-serve --sharer qwen --receiver llama --fuser my-fuser --port 9000
  C2C_API_KEY=secret c2c-serve --host 0.0.0.0
  C2C_API_KEY=secret c2c-serve --host 0.0.0.0 --share gemma3-270m
  C2C_API_KEY=secret c2c-chat --sharer http://studio.local:8080

By default it is the embedded pair, at http://127.0.0.1:8080/v1; with --host 0.0.0.0 other machines
can come, too. What --share serves is read on another machine, as by the last example.

A request's model says who answers: c2c, relay, receiver or sharer. Docs: docs/serving.md.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: parses arguments, serves, returns an exit code."""
    args = _parser().parse_args(argv)
    return run(lambda: _serve(args), PROGRAM)


def _parser() -> argparse.ArgumentParser:
    defaults = SamplingConfig(max_tokens=2048)
    parser = Parser(
        prog=PROGRAM,
        description="Serve a receiver that reads a sharer's KV cache, to any OpenAI client.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    pair.add_arguments(parser)
    add("--share", metavar="MODEL", help="a sharer for receivers on other machines, and no pair")
    add("--fuse-response", action="store_true", help="feed the answer, too; unbatched")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (%(default)s)")
    add("--port", type=int, default=8080, metavar="N", help="(%(default)s)")
    add("--api-key", metavar="KEY", help=f"that every request must bring (or ${API_KEY})")
    add("--slots", type=int, default=16, metavar="N", help="answers at a time (%(default)s)")
    add("--queue", type=int, default=64, metavar="N", help="requests that wait (%(default)s)")
    add("--cache-gb", type=float, metavar="GB", help="of all caches (default: half of the rest)")
    unsaid = "where a request does not say (%(default)s)"
    add("--max-tokens", type=int, default=defaults.max_tokens, metavar="N", help=unsaid)
    add("--temp", type=float, default=defaults.temp, metavar="T", help=f"0 is greedy; {unsaid}")
    add("--top-p", type=float, default=defaults.top_p, metavar="P", help=unsaid)
    return parser


class _Loading(Status):
    """Of a load that nobody waits for any more after Ctrl-C."""

    is_over = False

    def loading(self, p: Progress) -> None:
        """As `Status.loading`."""
        if self.is_over:
            raise C2CError("stopped")
        super().loading(p)


def _serve(args: argparse.Namespace) -> None:
    fields = ("max_tokens", "temp", "top_p")
    sampling = from_dict(SamplingConfig, {f: getattr(args, f) for f in fields}, "arguments")
    for name in ("slots", "queue"):
        if getattr(args, name) < 1:
            raise C2CError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.cache_gb is not None and not 0 < args.cache_gb * 1e9 < math.inf:
        raise C2CError(f"--cache-gb {args.cache_gb}: must be a number above 0")
    api_key = args.api_key or os.environ.get(API_KEY) or None
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn", "pydantic"))):
        raise C2CError("c2c-serve needs its extra: pip install 'c2c-mlx[serve]'")

    from c2c_mlx.serving.app import LOOPBACK, make_app
    from c2c_mlx.serving.engine import Engine, Limits
    from c2c_mlx.serving.server import bind, listen, serve

    if args.host not in LOOPBACK and not api_key:
        raise C2CError(f"--host {args.host}: other machines can come there, so it needs --api-key")
    if args.share and (args.receiver or args.sharer or args.fuser):
        raise C2CError("--share is of one model: leave out --receiver, --sharer and --fuser")
    bound = bind(args.host, args.port)  # before minutes of loading
    status = _Loading(sys.stderr)
    limits = Limits(args.slots, args.queue, args.cache_gb)
    if args.share:
        engine = Engine(lambda: _load_one(args.share, status), sampling, limits)
    else:
        who = pair.parse(args, args.fuse_response)
        engine = Engine(lambda: _load(who, status), sampling, limits)
    engine.start()
    try:
        served = engine.served.result()
        status.close()
        listen(bound)
        host, port = bound.getsockname()[:2]
        _say(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1: {', '.join(served.modes)}")
        if served.fuse_response:
            _say("answers of c2c are fused while they are written: one token of one at a time")
        if args.share:
            _say(f"caches of {args.share} are shared with receivers elsewhere")
        serve(make_app(engine, served, api_key, bool(args.share)), bound)
    finally:
        status.is_over = True
        bound.close()
        engine.close()
        engine.join()


def _load(who: Pair, status: Status) -> Team:
    """On the inference thread: the pair; without a fuser, the modes that need none."""
    from c2c_mlx import blas
    from c2c_mlx.models.remote import RemoteError
    from c2c_mlx.serving.reading import Team
    from c2c_mlx.talk.links import link

    if blas.notice:
        _say(blas.notice)
    try:
        folders = pair.find_fusers(who)
    except RemoteError:  # without a sharer there is no relay either
        raise
    except C2CError as e:
        _say(str(e))
        folders = []
    loaded = pair.load(who, folders, len(who.sharers), status)
    links = [
        link(loaded.receiver, sharer, fuser)
        for sharer, fuser in zip(loaded.sharers, loaded.fusers, strict=False)
    ]
    made_for_it = any(link.fuser.config.fuse_response for link in links)
    return Team(loaded.receiver, loaded.sharers, links, who.order, who.fuse_response or made_for_it)


def _load_one(name: str, status: Status) -> Team:
    from c2c_mlx.models import memory
    from c2c_mlx.models.load import find_folder, load_model
    from c2c_mlx.serving.reading import Team
    from c2c_mlx.training.fingerprint import of_weights

    memory.preflight(find_folder(name, status.loading))
    lm = load_model(name, progress=status.loading)
    return Team(lm, weights=of_weights(lm.model))


def _say(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
