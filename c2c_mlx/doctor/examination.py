"""All that the doctor does on one device, in order."""

from __future__ import annotations

import c2c_mlx.blas  # noqa: F401

from c2c_mlx import device
from c2c_mlx.doctor import arithmetic, conversation, projector, speed
from c2c_mlx.doctor.check import Proof
from c2c_mlx.doctor.pair import EmbeddedPair


class Examination:
    """The checks that this machine can run, and what it times.

    Attributes:
        proofs: what to run; those of the embedded pair if it is in the cache.
        left_out: why something is not, one sentence each.
    """

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.proofs: list[Proof] = [
            *projector.proofs(),
            *arithmetic.proofs(),
            *conversation.proofs(),
        ]
        self._pair: EmbeddedPair | None = None
        if not EmbeddedPair.is_here():
            self.left_out.append(
                "the embedded pair is not in the cache folder: `c2c-chat` fetches it, and then it "
                "is examined, too"
            )
        elif device.is_rehearsed():
            self.left_out.append(
                "the embedded pair is left out of a rehearsal: a CPU takes minutes to read with "
                "packed weights"
            )
        else:
            self._pair = EmbeddedPair()
            self.proofs += self._pair.proofs()

    def speed(self) -> dict[str, float | str]:
        """Figures of one turn, of the pair if it takes part, else of two small random models."""
        if self._pair:
            return {"of": "the embedded pair"} | speed.measure(*self._pair.timed())
        return {"of": "two tiny models"} | speed.measure(*conversation.timed())
