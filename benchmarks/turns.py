"""What turn 10 of a C2C conversation costs against turn 2, at equal new tokens, in one run."""

from __future__ import annotations

import statistics
import time

from c2c_mlx import C2C, Fuser, load_model, registry
from c2c_mlx.alignment import align_chat
from c2c_mlx.generate import FusedPrefix

QUESTION = "Tell me one more thing about the sea, please, in a short sentence."
ANSWER = "The sea covers more than two thirds of the Earth, and most of it is deep and dark."
TURNS = 11


def main() -> None:
    pair = registry.default_pair()
    receiver, sharer = map(load_model, pair)
    folder = registry.find_fuser(*pair)
    assert folder is not None, "the embedded pair's fuser is missing"
    fuser = Fuser.load(folder)
    prefix = FusedPrefix(C2C(receiver.model, sharer.model, fuser))
    messages: list[dict[str, str]] = []
    costs = []
    for turn in range(1, TURNS + 1):
        messages.append({"role": "user", "content": QUESTION})
        aligned = align_chat(
            messages, receiver.tokenizer, sharer.tokenizer, strategy=fuser.config.alignment
        )
        tic = time.perf_counter()
        prefix.extend(aligned.receiver_ids, aligned.sharer_ids, aligned.index, aligned.message)
        seconds = time.perf_counter() - tic
        assert prefix.last is not None
        new = prefix.last.stop - prefix.last.start, prefix.last.sharer_tokens
        costs.append((seconds, new))
        print(f"turn {turn}: {1e3 * seconds:.0f} ms to read and fuse {new[0]} new tokens")
        messages.append({"role": "assistant", "content": ANSWER})
    early, late = costs[1:4], costs[8:11]
    counts = {new for _, new in early + late}  # (receiver's, sharer's)
    assert len(counts) == 1 and min(counts) > (1, 1), f"turns differ in new tokens: {counts}"
    ratio = statistics.median(s for s, _ in late) / statistics.median(s for s, _ in early)
    print(f"turns 9 to 11 against turns 2 to 4, at equal new tokens: {ratio:.2f}")


if __name__ == "__main__":
    main()
