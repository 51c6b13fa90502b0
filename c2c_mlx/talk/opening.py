"""A session between what a pair of names was loaded as, the same for the command and the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from c2c_mlx.config import Pair, SamplingConfig
from c2c_mlx.events import Prefilling
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.talk.session import ChatSession


def open_session(
    pair: Pair,
    receiver: LanguageModel,
    sharers: Sequence[LanguageModel],
    fusers: Sequence[Fuser],
    *,
    sampling: SamplingConfig,
    system: str | None,
    on_prefill: Callable[[Prefilling], None],
) -> ChatSession:
    """A session between what a pair named, as far as it could be loaded: without fusers, no `c2c`.

    Raises:
        C2CError: if a fuser was not made for its models.
    """
    fused = list(zip(sharers, fusers, strict=False))
    return ChatSession(
        receiver,
        sharers[0] if sharers else None,
        fusers[0] if fusers else None,
        others=fused[1:],
        order=pair.order,
        fuse_response=pair.fuse_response,
        sampling=sampling,
        system=system,
        on_prefill=on_prefill,
    )
