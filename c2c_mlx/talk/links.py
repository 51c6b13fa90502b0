"""Loaded models and their fusers put together: who feeds whom, and each prompt aligned to that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from c2c_mlx.config import ModelShape, SamplingConfig
from c2c_mlx.errors import C2CError
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.c2c import C2C
from c2c_mlx.fusion.fit import check_models
from c2c_mlx.fusion.fuser import Fuser
from c2c_mlx.models.load import LanguageModel
from c2c_mlx.text.alignment import TokenAlignment, align_chat

Messages = list[dict[str, str]]


def link(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> C2C:
    """A sharer's way into the receiver.

    Raises:
        C2CError: if the fuser was not made for these models.
    """
    config = fuser.config
    check_models(config, _shape(receiver, config.receiver), _shape(sharer, config.sharer))
    return C2C(receiver.model, sharer.model, fuser)


def align_to_each(
    messages: Messages,
    receiver: LanguageModel,
    links: Sequence[C2C],
    sharers: Sequence[LanguageModel],
) -> list[TokenAlignment]:
    """The receiver's prompt, aligned to the one of each link's sharer; the same for all of them."""
    # Each sharer's text would pad the receiver's elsewhere.
    padding = len({link.reader_key for link in links}) == 1
    known: dict[tuple[int, str], TokenAlignment] = {}
    for link, lm in zip(links, sharers, strict=True):
        if link.reader_key not in known:
            known[link.reader_key] = align_chat(
                messages,
                receiver.tokenizer,
                lm.tokenizer,
                strategy=link.fuser.config.alignment,
                padding=padding,
            )
    return [known[link.reader_key] for link in links]


def fitting(lm: LanguageModel, ids: Sequence[int], sampling: SamplingConfig) -> SamplingConfig:
    """The sampling with a limit of tokens that still fits.

    Raises:
        C2CError: if the prompt fills the model's context, before anything is read.
    """
    room = lm.context_length - len(ids)
    if room < 1:
        raise C2CError(
            f"the conversation is {len(ids)} tokens long, but {lm.name} reads at most "
            f"{lm.context_length}: shorten the message, or start a new conversation"
        )
    return replace(sampling, max_tokens=min(sampling.max_tokens, room))


def _shape(lm: LanguageModel, wanted: ModelShape) -> ModelShape:
    """The shape; the vocabulary is only looked through if the fuser knows whose it wants."""
    return kv.model_shape(lm.model, lm.name, lm.fingerprint if wanted.tokenizer else "")
