"""What the two answers cost, in words; from measured figures and nothing else."""

from __future__ import annotations

from c2c_mlx.events import Figures

SAME = 0.05  # closer to 1 than this a ratio is called equal, not '1.0x'


def cost(figures: Figures) -> str:
    """One answer: '0.21 s to first token · 23 tokens/s · 1.9 s in all · 34 tokens'."""
    tokens = f"{figures.generated_tokens} tokens"
    if figures.relayed_tokens:
        tokens = f"{figures.relayed_tokens} relayed + {figures.generated_tokens} tokens"
    rate = figures.tokens_per_s
    speed = f"{rate:.{0 if rate >= 10 else 1}f} tokens/s · " if rate else ""
    first = f"{seconds(figures.first_token_s)} to first token · "
    return (
        f"{first if figures.generated_tokens else ''}{speed}"
        f"{seconds(figures.total_s)} in all · {tokens}"
    )


def verdict(c2c: Figures, relay: Figures) -> str:
    """How C2C did against the relay; each pair of figures is C2C's, then the relay's."""
    first = _ratio(c2c.first_token_s, relay.first_token_s, ("sooner", "later"))
    total = _ratio(c2c.total_s, relay.total_s, ("faster", "slower"))
    spent = relay.relayed_tokens + relay.generated_tokens
    return (
        f"C2C against relay: first token {first}; answer {total}; "
        f"tokens {c2c.generated_tokens} : {spent}"
    )


def seconds(s: float) -> str:
    """Seconds with about two digits."""
    return f"{s:.2f} s" if s < 10 else f"{s:.0f} s"


def _ratio(ours: float, theirs: float, words: tuple[str, str]) -> str:
    times = f"({seconds(ours).removesuffix(' s')} : {seconds(theirs)})"
    if min(ours, theirs) <= 0:
        return times
    if abs(theirs / ours - 1) < SAME:
        return f"equal {times}"
    if theirs > ours:
        return f"{theirs / ours:.1f}x {words[0]} {times}"
    return f"{ours / theirs:.1f}x {words[1]} {times}"
