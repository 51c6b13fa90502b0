"""What crossed: does it point at what only the sharer can know, and what does asking cost?

python benchmarks/crossed.py words valid.jsonl --limit 100
python benchmarks/crossed.py cost valid.jsonl --limit 12
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import numpy as np

from c2c_mlx import ChatSession, Fuser, load_model
from c2c_mlx.config import SamplingConfig
from c2c_mlx.evaluation import scoring
from c2c_mlx.evaluation.files import read
from c2c_mlx.evaluation.modes import Modes, Reading, write
from c2c_mlx.evaluation.owed import Owed, owed
from c2c_mlx.evaluation.task import Item
from c2c_mlx.events import Finished
from c2c_mlx.fusers.store import find_for_pair
from c2c_mlx.text.words import words

PAIR = ("smollm2-135m", "gemma3-270m")
BATCH = 10
FUNCTION_WORDS = set(
    """a an the and or but if so as of at by for with about into to from up down in out on off over
    under than then i me my you your he him his she her it its we us our they them their this that
    these those who whom which what is am are was were be been being have has had do does did will
    would shall should can could may might must not no nor there here when where why how all any
    both each some such too very just i'm you're he's she's it's we're they're i've you've we've
    they've i'd you'd he'd she'd we'd they'd i'll you'll he'll she'll we'll they'll isn't aren't
    wasn't weren't hasn't haven't hadn't doesn't don't didn't won't wouldn't can't couldn't
    shouldn't that's there's what's let's""".split()
)


def load() -> tuple[object, object, Fuser]:
    receiver, sharer = map(load_model, PAIR)
    return receiver, sharer, Fuser.load(find_for_pair(*PAIR, ""))


def sides(item: Item, tokens: Owed) -> tuple[list[float], list[float]]:
    """Nats of an answer's content words that the prompt does not spell out; of function words."""
    prompt = {w.lower() for w in re.findall(r"[\w'’]+", item.messages[-1]["content"])}
    content, function = [], []
    for word, nats in words(tokens):
        plain = word.lower().replace("’", "'")
        if plain in FUNCTION_WORDS:
            function.append(nats)
        elif plain[0].isalpha() and plain not in prompt:
            content.append(nats)
    return content, function


def auc(content: Sequence[float], function: Sequence[float]) -> float:
    """How often a content word owes more than a function word; a tie counts a half."""
    a, b = np.array(content)[:, None], np.array(function)[None]
    return float((a > b).mean() + 0.5 * (a == b).mean())


def tell(name: str, found: list[tuple[list[float], list[float]]]) -> None:
    rng = np.random.default_rng(0)

    def of(rows: Sequence[int]) -> float:
        return auc(*(np.concatenate([found[i][side] for i in rows]) for side in (0, 1)))

    drawn = [of(rng.integers(len(found), size=len(found))) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    content, function = (np.concatenate([row[side] for row in found]) for side in (0, 1))
    print(
        f"{name}: {len(found)} answers, AUC {of(range(len(found))):.3f} [{low:.3f}, {high:.3f}]; "
        f"{len(content)} content words {content.mean():+.2f} nats, "
        f"{len(function)} function words {function.mean():+.2f}",
        flush=True,
    )


def point(items: Sequence[Item], out: Path | None) -> None:
    """The same answers, weighed with their own sharer and with another item's."""
    receiver, sharer, fuser = load()
    modes = Modes(receiver, [sharer], [fuser], "sequential", items, 0, 32)
    found: dict[str, list[tuple[list[float], list[float]]]] = {"own": [], "shuffled": []}
    kept = []
    for at in range(0, len(items), BATCH):
        batch = items[at : at + BATCH]
        names = ("c2c", "c2c-shuffled", "c2c-zeroed")
        own, shuffled, silent = (
            [r for r in modes.read(name, batch) if isinstance(r, Reading)] for name in names
        )
        written = write(own, modes.max_tokens)
        for name, readings in (("own", own), ("shuffled", shuffled)):
            owes = owed(readings, silent, written)
            found[name] += [sides(*pair) for pair in zip(batch, owes, strict=True)]
            kept += [(item.id, name, of) for item, of in zip(batch, owes, strict=True)]
            tell(f"{name} sharer", found[name])
        if out:
            out.write_text(json.dumps(kept))


def cost(items: Sequence[Item]) -> None:
    """Seconds of `ChatSession.crossed` over seconds of the answer, answer by answer."""
    receiver, sharer, fuser = load()
    session = ChatSession(receiver, sharer, fuser, sampling=SamplingConfig(max_tokens=64))
    ratios = []
    for number, item in enumerate(items):
        session.reset()
        *_, finished = session.ask(item.messages[-1]["content"])
        assert isinstance(finished, Finished)
        began = time.perf_counter()
        session.crossed()
        seconds = time.perf_counter() - began
        if number:  # the first one warms up
            ratios.append(seconds / finished.figures.total_s)
            print(
                f"{finished.figures.generated_tokens} tokens in {finished.figures.total_s:.2f} s, "
                f"crossed {seconds:.3f} s: {ratios[-1]:.1%}",
                flush=True,
            )
    low, high = scoring.interval(ratios, 0)
    print(
        f"crossed / answer: median {statistics.median(ratios):.1%}, mean "
        f"{statistics.fmean(ratios):.1%} [{low:.1%}, {high:.1%}] over {len(ratios)} answers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("words", "cost"))
    parser.add_argument("task", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--json", type=Path, help="of words: every token and what it owes")
    args = parser.parse_args()
    _, items = read(args.task, "generate")
    chosen = np.random.default_rng(0).permutation(len(items))[: args.limit].tolist()
    chosen_items = [items[i] for i in chosen]
    if args.what == "words":
        point(chosen_items, args.json)
    else:
        cost(chosen_items)


if __name__ == "__main__":
    main()
