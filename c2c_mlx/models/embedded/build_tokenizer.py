"""The embedded pair's tokenizers, built with `tokenizers` from what the GGUF files say.

Transformers' own GGUF reader needs PyTorch; this needs nothing that is not installed anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

Metadata = Callable[[str], Any]  # "tokens" -> the value of `tokenizer.ggml.tokens`

_CONTROL = 3  # token type of llama.cpp: never written by text


def smollm2_tokenizer(metadata: Metadata) -> Tokenizer:
    """Byte-level BPE in which every digit stands alone."""
    merges = [tuple(pair.split(" ")) for pair in metadata("merges")]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(metadata), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    tokenizer.add_special_tokens(_control_tokens(metadata))
    return tokenizer


def gemma3_tokenizer(metadata: Metadata) -> Tokenizer:
    """SentencePiece-like BPE with byte fallback and `<bos>` in front."""
    vocab = _vocabulary(metadata)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of(vocab),
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Finds no space any more after the normaliser; Gemma's own file has it too.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", vocab["<bos>"])],
    )
    tokenizer.add_special_tokens(_control_tokens(metadata))
    return tokenizer


def merges_of(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies: every split of a token into two tokens.

    A GGUF file of this kind lists none. Ids follow the order in which training found the tokens,
    so merges are ranked by the id of their result, then of its left and right part.
    """
    splits = [
        (result, vocab[left], vocab[right], left, right)
        for token, result in vocab.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab
    ]
    return [(left, right) for *_, left, right in sorted(splits)]


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    return {token: i for i, token in enumerate(metadata("tokens"))}


def _control_tokens(metadata: Metadata) -> list[AddedToken]:
    kinds = zip(metadata("tokens"), metadata("token_type"), strict=True)
    return [AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == _CONTROL]
