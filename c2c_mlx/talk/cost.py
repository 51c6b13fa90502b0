"""What an answer costs, counted while it is being made."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx.events import Figures, Reason


@dataclass
class Cost:
    """Figures of a turn while it runs; times in seconds."""

    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    prompt_tokens: int = 0
    new_prompt_tokens: int = 0
    generated: int = 0
    thoughts: int = 0  # of them, before the answer
    reason: Reason = "stop"
    relayed: int = 0
    align_s: float = 0.0
    sharer_s: float = 0.0
    receiver_s: float = 0.0
    fuse_s: float = 0.0

    def figures(self, gates_open: int) -> Figures:
        """What it came to, by now."""
        now = time.perf_counter()
        first = self.first or now
        decoding, answered = now - first, self.generated - self.thoughts
        return Figures(
            prompt_tokens=self.prompt_tokens,
            new_prompt_tokens=self.new_prompt_tokens,
            generated_tokens=self.generated,
            relayed_tokens=self.relayed,
            align_s=self.align_s,
            sharer_s=self.sharer_s,
            receiver_s=self.receiver_s,
            fuse_s=self.fuse_s,
            first_token_s=first - self.began,
            total_s=now - self.began,
            tokens_per_s=(answered - 1) / decoding if answered > 1 else 0.0,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            gates_open=gates_open,
        )
