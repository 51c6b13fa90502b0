"""Caches that wait for their conversations to go on, found again by what they have read."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.reader import Reader, common_prefix

State = Reader | FusedCache


@dataclass(eq=False)
class _Kept:
    key: Hashable
    state: State
    prompt: int  # positions before an answer's; what stands behind them can be read again
    nbytes: int  # counted once: every round asks for the sum

    @property
    def ids(self) -> list[int]:
        return read_ids(self.state)


class Caches:
    """Conversations' caches, those of latest use last; one that is taken is nobody else's."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(kept.nbytes for kept in self._kept)

    def take(self, key: Hashable, ids: Sequence[int]) -> State | None:
        """What has read the longest beginning of `ids` under this key.

        The caches of the conversation itself come out, those of one that only began alike stay and
        are copied as far as they agree.
        """
        found = [kept for kept in self._kept if kept.key == key]
        best = max(found, key=lambda kept: common_prefix(kept.ids, ids), default=None)
        if best is None or not (n := common_prefix(best.ids, ids)):
            return None
        self._kept.remove(best)
        if n >= best.prompt:
            return best.state
        self._kept.append(best)
        return best.state.fork(n)

    def put(self, key: Hashable, state: State, prompt: int) -> None:
        """Keeps what has been read; what is only a beginning of it has no use any more.

        Args:
            key: all that decides what the caches hold, but for the ids.
            state: the caches; from now on only `take` gives them out.
            prompt: how many positions of the receiver's are the prompt's.
        """
        ids = read_ids(state)
        self._kept = [
            kept
            for kept in self._kept
            if kept.key != key or common_prefix(kept.ids, ids) < len(kept.ids)
        ]
        self._kept.append(_Kept(key, state, prompt, state.nbytes))

    def shrink(self, nbytes: int) -> None:
        """Drops what has not been used for longest, until the rest takes no more than `nbytes`."""
        while self._kept and self.nbytes > nbytes:
            del self._kept[0]


def read_ids(state: State) -> list[int]:
    """The ids of the answering model that stand in the caches."""
    return state.own.ids if isinstance(state, FusedCache) else state.ids
