"""What a text's tokens say one by one, and the words that they are parts of."""

from __future__ import annotations

import re
from collections.abc import Sequence

from c2c_mlx.text.rendering import Tokenizer, fast_tokenizer

_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Each token's part of the text; together they are the text.

    A token that is a piece of a character says nothing; the one that completes it says it all.
    """
    fast = fast_tokenizer(tokenizer)

    def decode(part: Sequence[int]) -> str:
        return str(fast.decode(list(part), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    # Some decoders treat the beginning of a text differently, so a token is decoded behind the
    # one before it: from `context` on, of which everything before `told` has been said already.
    context = told = 0
    for stop in range(1, len(ids) + 1):
        before, now = decode(ids[context:told]), decode(ids[context:stop])
        if now.endswith("\ufffd") and stop < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        context, told = told, stop
    return texts


def spans(tokens: Sequence[tuple[str, float]]) -> list[tuple[int, int, float]]:
    """Sums a figure of each token over the words and marks of punctuation of the text.

    Args:
        tokens: (text, figure) of consecutive tokens.

    Returns:
        (start, end, figure) of each word in the joined text. A token counts for the word that it
        begins in; one that says nothing that can be seen counts for none.
    """
    text = "".join(said for said, _ in tokens)
    found = [m.span() for m in _WORD.finditer(text)]
    sums = [0.0] * len(found)
    at = word = 0
    for said, figure in tokens:
        begins = at + len(said) - len(said.lstrip())
        at += len(said)
        while word < len(found) and found[word][1] <= begins:
            word += 1
        if begins < at and word < len(found):
            sums[word] += figure
    return [(*span, total) for span, total in zip(found, sums, strict=True)]


def words(tokens: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """The words themselves with their figures, as `spans` finds them."""
    text = "".join(said for said, _ in tokens)
    return [(text[start:end], figure) for start, end, figure in spans(tokens)]
