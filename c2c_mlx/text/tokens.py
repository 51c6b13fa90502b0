"""Token ids of a text, with where they stand; and one tokenizer's ids for another's, one by one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from c2c_mlx.errors import C2CError
from c2c_mlx.text import thoughts
from c2c_mlx.text.rendering import Ints, Message, Tokenizer, fast_tokenizer, name_of, render

Strategy: TypeAlias = Literal["span", "first", "longest", "same"]

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eom_id|>")

# receiver tokenizer -> sharer tokenizer -> strategy -> receiver id -> sharer id
_COUNTERPARTS: weakref.WeakKeyDictionary[
    Any, weakref.WeakKeyDictionary[Any, dict[str, dict[int, int]]]
] = weakref.WeakKeyDictionary()


def align_ids(
    receiver_ids: Sequence[int],
    receiver_tokenizer: Tokenizer,
    sharer_tokenizer: Tokenizer,
    strategy: Literal["first", "longest"] = "first",
) -> list[int]:
    """One sharer id for each receiver id, as the reference implementation chooses it.

    Each receiver token is decoded alone and encoded with the sharer's tokenizer; of several sharer
    tokens the *first* is taken, or the one that is *longest* when decoded (the earliest of equals).
    """
    if strategy not in ("first", "longest"):
        raise C2CError(f"unknown token strategy {strategy!r}; choose first or longest")
    receiver, sharer = fast_tokenizer(receiver_tokenizer), fast_tokenizer(sharer_tokenizer)
    known = (
        _COUNTERPARTS.setdefault(receiver, weakref.WeakKeyDictionary())
        .setdefault(sharer, {})
        .setdefault(strategy, {})
    )
    if not known:
        known.update(_special_counterparts(receiver, sharer))
    new = [token for token in dict.fromkeys(receiver_ids) if token not in known]
    known.update(zip(new, _counterparts(new, receiver, sharer, strategy), strict=True))
    return [known[token] for token in receiver_ids]


def along(
    receiver_ids: Sequence[int],
    receiver_tokenizer: Tokenizer,
    sharer_tokenizer: Tokenizer,
    strategy: Strategy,
) -> list[int]:
    """The ids that a sharer reads for those that the receiver writes, one for each.

    None of them depends on what is written after it. A sharer's own tokens for the text would, so
    under *span*, which gives a prompt those, an answer is read as under *longest*.
    """
    if strategy == "same":
        return list(receiver_ids)
    chosen: Literal["first", "longest"] = "longest" if strategy == "span" else strategy
    return align_ids(receiver_ids, receiver_tokenizer, sharer_tokenizer, chosen)


def tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a rendered prompt; what the template wrote is all there is."""
    return encode(text, tokenizer)[0]


def response_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids that follow the prompt `messages[:-1]` when the model gives the last message.

    They run up to and including the first end-of-turn token, and end with one in any case. The
    prompt's ids stay what they are.
    """
    prompt, rest, rewritten = _rest(messages, tokenizer)
    ends = end_ids(tokenizer)
    ids = _encode_behind(prompt, rest, tokenizer)[0]
    stop = None if rewritten else next((i for i, token in enumerate(ids) if token in ends), None)
    return ids[: stop + 1] if stop is not None else [*ids, *ends[:1]]


def text_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Those of `response_ids` that hold the last message's text, without what ends a turn.

    A last token that holds more than text is among them. There is always at least one id.
    """
    prompt, rest, _ = _rest(messages, tokenizer)
    text = str(messages[-1].get("content") or "").strip()
    ids, first = _encode_behind(prompt, rest, tokenizer)
    end = rest.find(text) + len(text) if text in rest else len(rest)
    return ids[: max(int((first < end).sum()), 1)] or end_ids(tokenizer)[:1]


def _rest(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, str, bool]:
    """The prompt `messages[:-1]` and what follows it; the text alone if the template rewrites that.

    Where the prompt ends within thoughts, their end comes first: an answer stands behind it.
    """
    prompt = render(messages[:-1], tokenizer)
    full = render(messages, tokenizer, add_generation_prompt=False)
    if full.startswith(prompt):
        return prompt, full[len(prompt) :], False
    text, marks = str(messages[-1].get("content") or ""), thoughts.marks(tokenizer)
    if marks and prompt.rstrip().endswith(marks[0]):
        text = f"\n{marks[1]}\n\n{text}"
    return prompt, text, True


def _encode_behind(prompt: str, rest: str, tokenizer: Tokenizer) -> tuple[list[int], Ints]:
    """Ids of what follows a prompt, and each one's first character in it.

    Where they stand: a tokenizer that writes a space before every text (SentencePiece) writes none
    here. Alone, if the prompt's last ids would become others.
    """
    before = encode(prompt, tokenizer)[0]
    ids, first, _ = encode(prompt + rest, tokenizer)
    if ids[: len(before)] == before:
        return ids[len(before) :], first[len(before) :] - len(prompt)
    ids, first, _ = encode(rest, tokenizer)
    return ids, first


def encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], Ints, Ints]:
    """Token ids and each token's first and last character, both `[len(ids)]`."""
    fast = fast_tokenizer(tokenizer)
    if not getattr(fast, "is_fast", False):
        raise C2CError(
            f"the tokenizer of {name_of(tokenizer)} gives no character offsets; "
            "use a model folder that has a tokenizer.json"
        )
    encoding = fast(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    start, end = offsets[:, 0], offsets[:, 1]
    reached = np.maximum.accumulate(np.append(0, end))[:-1]
    # An empty span is either white space that the tokenizer trimmed away (it stands after it, and
    # the token before ended earlier) or a piece of a character that it stands before.
    last = np.where((end > start) | (reached < end), end - 1, end)
    last = np.clip(np.maximum.accumulate(last), 0, max(len(text) - 1, 0))
    # Characters that no span covers (trimmed or removed ones) go to the token after them.
    first = np.maximum.accumulate(np.minimum(start, np.append(-1, last)[:-1] + 1))
    return list(encoding["input_ids"]), first, last


def _counterparts(ids: Sequence[int], receiver: Any, sharer: Any, strategy: str) -> list[int]:
    if not ids:
        return []
    texts = receiver.batch_decode([[token] for token in ids], skip_special_tokens=False)
    candidates = sharer(texts, add_special_tokens=False)["input_ids"]
    return [_choose(tokens, sharer, strategy) for tokens in candidates]


def _choose(candidates: Sequence[int], sharer: Any, strategy: str) -> int:
    if not candidates:
        return int(sharer.unk_token_id or 0)
    if strategy == "longest" and len(candidates) > 1:
        texts = sharer.batch_decode([[token] for token in candidates], skip_special_tokens=False)
        return int(candidates[max(range(len(texts)), key=lambda i: len(texts[i]))])
    return int(candidates[0])


def _special_counterparts(receiver: Any, sharer: Any) -> dict[int, int]:
    """Special receiver ids by their string, and over that by their role."""
    unknown = int(sharer.unk_token_id or 0)
    pairs = {}
    for token in receiver.all_special_ids:
        same = sharer.convert_tokens_to_ids(receiver.convert_ids_to_tokens(token))
        pairs[int(token)] = unknown if same is None else int(same)
    for role in ("pad", "eos", "bos", "unk"):  # a later role wins: pad is often eos
        ours, theirs = role_id(receiver, role), role_id(sharer, role)
        if ours is not None and theirs is not None:
            pairs[ours] = theirs
    return pairs


def role_id(tokenizer: Any, role: str) -> int | None:
    """The id of a special role (pad, eos, bos, unk); padding falls back to eos."""
    token: int | None = getattr(tokenizer, f"{role}_token_id")
    return role_id(tokenizer, "eos") if token is None and role == "pad" else token


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a turn, the tokenizer's own eos first."""
    fast = fast_tokenizer(tokenizer)
    named = fast.convert_tokens_to_ids(list(_END_OF_TURN))
    ids = [fast.eos_token_id, *(token for token in named if token != fast.unk_token_id)]
    if tokenizer is not fast:
        ids += sorted(tokenizer.eos_token_ids)
    return list(dict.fromkeys(int(token) for token in ids if token is not None))
