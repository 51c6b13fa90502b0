"""What turn 10 of a C2C conversation costs against turn 2, at equal new tokens, in one run."""

from __future__ import annotations

import statistics
from typing import Any

from c2c_mlx import ChatSession, Fuser, load_model, registry
from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Finished

QUESTION = "Tell me one more thing about the sea, please, in a short sentence."


def main() -> None:
    pair = registry.default_pair()
    receiver, sharer = map(load_model, pair)
    folder = registry.find_fuser(*pair)
    assert folder is not None, "the embedded pair's fuser is missing"
    session = ChatSession(
        receiver, sharer, Fuser.load(folder), sampling=SamplingConfig(max_tokens=8)
    )
    costs = []
    for turn in range(1, 12):
        figures: Any = next(e.figures for e in session.ask(QUESTION) if isinstance(e, Finished))
        costs.append((figures.first_token_s, figures.new_prompt_tokens))
        print(f"turn {turn}: {1e3 * costs[-1][0]:.0f} ms for {costs[-1][1]} new tokens")
    early, late = ([s / n for s, n in costs[i : i + 3]] for i in (1, 8))
    ratio = statistics.median(late) / statistics.median(early)
    print(f"turns 9 to 11 against turns 2 to 4, per new token: {ratio:.2f}")


if __name__ == "__main__":
    main()
