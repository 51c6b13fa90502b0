"""What crossed: does it point at what only the sharer can know, and what does asking cost?

python benchmarks/crossed.py words valid.jsonl --limit 100 --json crossed.json
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

from c2c_mlx import ChatSession, Fuser, bootstrap, load_model
from c2c_mlx.config import SamplingConfig
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


def sides(item: Item, tokens: Owed) -> dict[str, list[float]]:
    """Nats of an answer's words: content words of the source, made-up ones, function words.

    A content word is of the source alone if the reference has it and the prompt does not spell it;
    it is made up if neither has it.
    """
    prompt, reference = (
        {w.lower() for w in re.findall(r"[\w'’]+", text)}
        for text in (item.messages[-1]["content"], item.reference)
    )
    found: dict[str, list[float]] = {"source": [], "made up": [], "function": [], "later": []}
    for number, (word, nats) in enumerate(words(tokens)):
        plain = word.lower().replace("’", "'")
        if plain in FUNCTION_WORDS:
            found["function"].append(nats)
            if number:  # an answer's first word decides that it is English
                found["later"].append(nats)
        elif plain[0].isalpha() and plain not in prompt:
            found["source" if plain in reference else "made up"].append(nats)
    return found


def auc(a: np.ndarray, b: np.ndarray) -> float:
    """How often one of `a` owes more than one of `b`; a tie counts a half."""
    return float((a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean())


def tell(name: str, found: Sequence[dict[str, list[float]]]) -> None:
    """AUCs with bootstrap intervals over answers."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(found), size=(2000, len(found)))

    def side(kind: str, rows: Sequence[int]) -> np.ndarray:
        return np.concatenate([found[i][kind] for i in rows])

    print(f"{name}, {len(found)} answers")
    for kind in ("source", "made up", "function"):
        values = side(kind, range(len(found)))
        print(f"  {kind:9} {len(values):4} words, {values.mean():+.2f} nats")
    for of in found:
        of["content"] = of["source"] + of["made up"]
    pairs = (("source", "function"), ("source", "later"), ("source", "made up"))
    for a, b in (*pairs, ("content", "function")):
        drawn = [auc(side(a, rows), side(b, rows)) for rows in draws]
        low, high = np.quantile(drawn, [0.025, 0.975])
        whole = auc(*(side(kind, range(len(found))) for kind in (a, b)))
        print(f"  {a} over {b}: AUC {whole:.3f} [{low:.3f}, {high:.3f}]", flush=True)


def point(items: Sequence[Item], out: Path) -> None:
    """The same answers, weighed with their own sharer and with another item's."""
    receiver, sharer, fuser = load()
    modes = Modes(receiver, [sharer], [fuser], "sequential", items, 0, 32)
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
            kept += [(item.id, name, of) for item, of in zip(batch, owes, strict=True)]
        print(f"{at + len(batch)} of {len(items)}", flush=True)
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
    low, high = bootstrap.interval(ratios, 0)
    print(
        f"crossed / answer: median {statistics.median(ratios):.1%}, mean "
        f"{statistics.fmean(ratios):.1%} [{low:.1%}, {high:.1%}] over {len(ratios)} answers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("words", "cost"))
    parser.add_argument("task", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="so many of the drawn items first")
    parser.add_argument("--longest", action="store_true", help="the items with the longest answers")
    parser.add_argument("--json", type=Path, default=Path("crossed.json"), help="kept tokens")
    args = parser.parse_args()
    _, items = read(args.task, "generate")
    drawn = np.random.default_rng(0).permutation(len(items)).tolist()
    chosen = drawn[args.skip : args.skip + args.limit]
    chosen_items = [items[i] for i in chosen]
    if args.longest:
        chosen_items = sorted(items, key=lambda item: -len(item.reference))[: args.limit]
    if args.what == "cost":
        cost(chosen_items)
        return
    if not args.json.exists():
        point(chosen_items, args.json)
    by_id, rows = {item.id: item for item in items}, json.loads(args.json.read_text())
    for name in ("own", "shuffled"):
        tell(f"{name} sharer", [sides(by_id[i], of) for i, kind, of in rows if kind == name])


if __name__ == "__main__":
    main()
