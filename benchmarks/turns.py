"""What turn 10 of a C2C conversation costs against turn 2, at equal new tokens, in one run.

The two are timed in turns, so that a machine that gets busier slows down both.
"""

from __future__ import annotations

import statistics
import time

from c2c_mlx import C2C, Fuser, load_model
from c2c_mlx.fusers import store
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.models import registry
from c2c_mlx.text.alignment import align_chat

QUESTION = "Tell me one more thing about the sea, please, in a short sentence."
ANSWER = "The sea covers more than two thirds of the Earth, and most of it is deep and dark."
EARLY, LATE, RUNS = 2, 10, 9


def main() -> None:
    pair = registry.default_pair()
    receiver, sharer = map(load_model, pair)
    name = registry.find_fuser(*pair)
    assert name is not None, "the embedded pair's fuser is missing"
    fuser = Fuser.load(store.find_folder(name))
    c2c = C2C(receiver.model, sharer.model, fuser)
    asked = {"role": "user", "content": QUESTION}
    turn = [asked, {"role": "assistant", "content": ANSWER}]

    def extend(prefix: FusedCache, turns: int) -> tuple[float, tuple[int, int]]:
        """Seconds, and the new tokens of receiver and sharer."""
        aligned = align_chat(
            [*turn * (turns - 1), asked],
            receiver.tokenizer,
            sharer.tokenizer,
            strategy=fuser.config.alignment,
        )
        tic = time.perf_counter()
        prefix.extend([aligned])
        seconds, last = time.perf_counter() - tic, prefix.last
        assert last is not None
        return seconds, (last.stop - last.start, last.sharer_tokens)

    prefixes = {turns: FusedCache(c2c) for turns in (EARLY, LATE)}
    times: dict[int, list[float]] = {turns: [] for turns in prefixes}
    counts = set()
    for _ in range(RUNS + 1):
        for turns, prefix in prefixes.items():
            extend(prefix, turns - 1)  # rolls back, but for the first time
            seconds, new = extend(prefix, turns)
            times[turns].append(seconds)
            counts.add(new)
    assert len(counts) == 1 and min(counts) > (1, 1), f"turns differ in new tokens: {counts}"
    early, late = (statistics.median(t[1:]) for t in times.values())
    print(f"{min(counts)[0]} new tokens: turn {EARLY} {1e3 * early:.0f} ms, ", end="")
    ratios = [b / a for a, b in zip(times[EARLY][1:], times[LATE][1:], strict=True)]
    print(f"turn {LATE} {1e3 * late:.0f} ms, {statistics.median(ratios):.2f} x")


if __name__ == "__main__":
    main()
