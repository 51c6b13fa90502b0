"""What the app asks of whoever answers: the inference thread, or a replay of what one said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import EngineEvent, Gates, Mode
from c2c_mlx.talk.engine import HISTORIES


class Backend(Protocol):
    """`engine.InferenceThread` documents each of these; none of them waits."""

    def start(self) -> None: ...  # noqa: D102
    def drain(self) -> list[EngineEvent]: ...  # noqa: D102
    def ask(self, question: str, modes: Sequence[Mode], attempt: int = 0) -> None: ...  # noqa: D102
    def train(self, seconds: float) -> None: ...  # noqa: D102
    def stop_training(self) -> None: ...  # noqa: D102
    def weigh(self) -> None: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102
    def undo(self, modes: Sequence[Mode]) -> None: ...  # noqa: D102
    def restore(self, histories: HISTORIES, gates: Sequence[Gates]) -> None: ...  # noqa: D102
    def set_gates(self, gates: Sequence[Gates]) -> None: ...  # noqa: D102
    def configure(self, sampling: SamplingConfig, system: str | None) -> None: ...  # noqa: D102
    def reload(self, pair: Pair) -> None: ...  # noqa: D102
