"""Cache-to-Cache on token ids: two prompts in, a fused mlx-lm prompt cache out (Contract 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.fused import FusedCache
from c2c_mlx.fusion.link import Link
from c2c_mlx.text.alignment import TokenAlignment


class C2C(Link):
    """A receiver, a sharer, and the fuser between them; see `Link`."""

    def prefill(
        self,
        receiver_ids: Sequence[int],
        sharer_ids: Sequence[int] | None = None,
        index: Sequence[int] | None = None,
        messages: Sequence[int] | None = None,
    ) -> kv.Cache:
        """Prefills both models and fuses what the fuser's `positions` say of the prompt.

        `text.alignment.align_chat` gives all four arguments for a conversation.

        Args:
            receiver_ids: the receiver's prompt, n ids.
            sharer_ids: the sharer's prompt; None: the receiver's ids.
            index: position in `sharer_ids` that feeds receiver position i; None: i itself.
            messages: the number of the message that position i belongs to, -1 for template text;
                None: all of it is one message.

        Returns:
            An mlx-lm prompt cache over `receiver_ids[:-1]`.

        Raises:
            C2CError: for an empty prompt, an index or messages that do not fit the prompts, or if
                `sharer_ids` are missing though the models have two tokenizers.
        """
        n = len(receiver_ids)
        if n == 0:
            raise C2CError("the prompt is empty: C2C needs at least one token")
        if sharer_ids is None:
            self._check_one_tokenizer()
            sharer_ids = receiver_ids
        feeding = np.arange(n) if index is None else np.array(index[:n])
        if len(feeding) == n - 1:  # the last position is not in the cache: nothing feeds it
            feeding = np.append(feeding, feeding[-1:] if n > 1 else 0)
        numbers = np.zeros(n) if messages is None else np.array(messages[:n])
        if len(feeding) < n or (
            n > 1 and not 0 <= feeding[:-1].min() <= feeding[:-1].max() < len(sharer_ids)
        ):
            raise C2CError(
                f"index must name one of the sharer's {len(sharer_ids)} positions for each of the "
                f"receiver's {n - 1}"
            )
        if len(numbers) < n:
            raise C2CError(f"messages must have a number for each of the receiver's {n} positions")
        prompt = TokenAlignment(
            list(receiver_ids),
            list(sharer_ids),
            feeding.astype(np.int32),
            numbers.astype(np.int32),
        )
        return FusedCache(self).extend([prompt])

    def _check_one_tokenizer(self) -> None:
        config = self.fuser.config
        ours, theirs = config.receiver.tokenizer, config.sharer.tokenizer
        if ours != theirs or (config.alignment != "same" and not ours):
            raise C2CError(
                "the two models have tokenizers of their own: prefill needs sharer_ids and index "
                "(text.alignment.align_chat makes them)"
            )
