"""chrF of greedy answers per mode on a file of chats, and how often English answers stay intact.

    python benchmarks/answers.py --fuser runs/mine --chats valid.jsonl --prompts english.jsonl

`--chats` has `messages`; `--prompts` has `prompt`s whose first 16 tokens should be the receiver's.
This is a first look at a fuser of the embedded pair; intervals and controls are c2c-eval's job.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from sacrebleu.metrics import CHRF

from c2c_mlx import ChatSession, Fuser, load_model, registry
from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Finished, Mode


def answer(session: ChatSession, prompt: str, mode: Mode) -> Finished:
    session.reset()
    return next(e for e in session.ask(prompt, mode) if isinstance(e, Finished))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuser", type=Path, required=True)
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--modes", default="receiver,c2c")
    parser.add_argument("--every", type=int, default=1, help="take one item of so many")
    args = parser.parse_args()
    receiver, sharer = map(load_model, registry.default_pair())
    session = ChatSession(receiver, sharer, Fuser.load(args.fuser))
    if args.chats:
        rows = [json.loads(x) for x in args.chats.read_text().splitlines()][:: args.every]
        session.sampling = SamplingConfig(max_tokens=48)
        for mode in args.modes.split(","):
            done = [answer(session, r["messages"][0]["content"], mode) for r in rows]
            for lang in sorted({r.get("lang", "") for r in rows}):
                scores = [
                    CHRF().sentence_score(d.text, [r["messages"][-1]["content"]]).score
                    for r, d in zip(rows, done, strict=True)
                    if r.get("lang", "") == lang
                ]
                print(f"{mode} {lang}: chrF {statistics.mean(scores):.1f} (n={len(scores)})")
            first = statistics.median(d.figures.first_token_s for d in done)
            print(f"{mode}: first token after {first:.2f} s (median)", flush=True)
    if args.prompts:
        rows = [json.loads(x)["prompt"] for x in args.prompts.read_text().splitlines()]
        session.sampling = SamplingConfig(max_tokens=16)
        same = [
            answer(session, p, "c2c").text == answer(session, p, "receiver").text
            for p in rows[:: args.every]
        ]
        print(f"first 16 tokens intact: {sum(same)} of {len(same)}")


if __name__ == "__main__":
    main()
