"""Which fuser fits which models: shapes, and tokenizers where both sides know theirs."""

from __future__ import annotations

import dataclasses

from c2c_mlx.config import FuserConfig, ModelShape
from c2c_mlx.errors import C2CError


def check_models(config: FuserConfig, receiver: ModelShape, sharer: ModelShape) -> None:
    """Refuses two models that the fuser was not made for.

    Args:
        config: the fuser's configuration.
        receiver: the receiver at hand.
        sharer: the sharer at hand.

    Raises:
        C2CError: if shapes differ, or tokenizer fingerprints where both sides know theirs.
    """
    for role, wanted, given in (
        ("receiver", config.receiver, receiver),
        ("sharer", config.sharer, sharer),
    ):
        same = dataclasses.replace(given, name=wanted.name, tokenizer=wanted.tokenizer)
        if same != wanted:
            raise C2CError(f"the fuser's {role} is {wanted}, but the {role} here is {given}")
        if wanted.tokenizer and given.tokenizer and wanted.tokenizer != given.tokenizer:
            raise C2CError(
                f"the fuser's {role} is {wanted.name} with tokenizer {wanted.tokenizer[:8]}, but "
                f"the {role} here, {given.name}, has tokenizer {given.tokenizer[:8]}"
            )
