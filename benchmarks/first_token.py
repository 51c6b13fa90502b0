"""How long until the first word: C2C, the receiver alone, and relays that write more or less.

Each round measures all of them in turn, so that load slows all of them down. The relay ends its
text by itself; beside it stand relays that are made to write a given number of tokens.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
from mlx_lm.generate import generate_step

from c2c_mlx import ChatSession, Fuser, LanguageModel, load_model
from c2c_mlx.config import SamplingConfig
from c2c_mlx.events import Finished, Mode
from c2c_mlx.fusers import store
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.models import registry
from c2c_mlx.talk import relay
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import tokenize

QUESTIONS = [
    f"Translate to English: {sentence}"
    for sentence in (
        "Il pleut depuis ce matin.",
        "Je cherche la gare.",
        "Mon frère habite à Lyon.",
        "Nous avons mangé du pain.",
        "Elle a perdu ses clés hier soir.",
        "今天天气很好。",
        "我喜欢喝茶。",
        "他昨天没有来。",
    )
]
RELAYED = (16, 64)  # tokens


def asked(session: ChatSession, question: str, mode: Mode) -> tuple[float, int]:
    """Seconds to the first token of the answer, and the relayed tokens."""
    session.reset()
    *_, finished = session.ask(question, mode)
    assert isinstance(finished, Finished)
    return finished.figures.first_token_s, finished.figures.relayed_tokens


def written(lm: LanguageModel, messages: list[dict[str, str]], n: int) -> str:
    """A prompt read, and exactly so many tokens written."""
    ids, prefix = tokenize(render(messages, lm.tokenizer), lm.tokenizer), Reader(lm.model)
    prefix.extend(ids[:-1])
    steps = generate_step(mx.array(ids[-1:]), lm.model, max_tokens=n, prompt_cache=prefix.cache)
    return str(lm.tokenizer.decode([int(token) for token, _ in itertools.islice(steps, n)]))


def relayed(sharer: LanguageModel, receiver: LanguageModel, question: str, n: int) -> float:
    """Seconds to the first token of the answer behind a relay of n tokens."""
    tic = time.perf_counter()
    background = written(sharer, [relay.background_message(question)], n)
    written(receiver, relay.with_background(question, background), 1)
    return time.perf_counter() - tic


def show(what: str, seconds: Sequence[float], c2c: Sequence[float]) -> None:
    ratio = statistics.median(a / b for a, b in zip(seconds, c2c, strict=True))
    print(f"{what:34} {statistics.median(seconds):6.2f} s, {ratio:5.1f} x C2C's")


def main() -> None:
    pair = registry.default_pair()
    receiver, sharer = map(load_model, pair)
    name = registry.find_fuser(*pair)
    assert name is not None, "the embedded pair's fuser is missing"
    sampling = SamplingConfig(max_tokens=64)
    fuser = Fuser.load(store.find_folder(name))
    session = ChatSession(receiver, sharer, fuser, sampling=sampling)
    times: dict[str, list[float]] = {}
    lengths = []
    for question in [QUESTIONS[0], *QUESTIONS]:
        for mode in ("c2c", "receiver", "relay"):
            seconds, n = asked(session, question, mode)
            times.setdefault(mode, []).append(seconds)
            lengths += [n] if mode == "relay" else []
        for n in RELAYED:
            times.setdefault(str(n), []).append(relayed(sharer, receiver, question, n))
    times = {what: seconds[1:] for what, seconds in times.items()}  # the first round warms up
    show("C2C", times["c2c"], times["c2c"])
    show("receiver alone", times["receiver"], times["c2c"])
    show(
        f"relay, {statistics.median(lengths[1:]):.0f} tokens of its own",
        times["relay"],
        times["c2c"],
    )
    for n in RELAYED:
        show(f"relay made to write {n} tokens", times[str(n)], times["c2c"])


if __name__ == "__main__":
    main()
