"""Two tokenizers, one text: which sharer token feeds which receiver token.

Both models render the same messages with their own chat templates; `rendering` says where in each
of the two the messages' text went.

Tokenizers are passed in (mlx-lm's `TokenizerWrapper` or a fast transformers tokenizer). Nothing
here imports a model library.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from c2c_mlx.errors import C2CError
from c2c_mlx.rendering import (
    Ints,
    Message,
    Tokenizer,
    bases,
    fast_tokenizer,
    locate,
    name_of,
)
from c2c_mlx.rendering import render as render

Strategy: TypeAlias = Literal["span", "first", "longest", "same"]

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eom_id|>")


@dataclass(frozen=True)
class TokenAlignment:
    """Two prompts and how the sharer's feeds the receiver's.

    Attributes:
        receiver_ids: The whole receiver prompt, template included.
        sharer_ids: The whole sharer prompt.
        index: int32 `[len(receiver_ids)]`, the position in `sharer_ids` that feeds each receiver
            position; never decreases.
        message: int32 `[len(receiver_ids)]`, the number of the message that the position's text
            belongs to, -1 for template text.
    """

    receiver_ids: list[int]
    sharer_ids: list[int]
    index: npt.NDArray[np.int32]
    message: npt.NDArray[np.int32]

    def with_sharer_of(self, other: TokenAlignment) -> Self:
        """The same chat fed by another chat's sharer: a control."""
        scale = (len(other.sharer_ids) - 1) / max(len(self.sharer_ids) - 1, 1)
        index = np.round(self.index * scale).astype(self.index.dtype)
        return replace(self, sharer_ids=other.sharer_ids, index=index)


def align_chat(
    messages: Sequence[Message],
    receiver_tokenizer: Tokenizer,
    sharer_tokenizer: Tokenizer,
    *,
    strategy: Strategy = "span",
    add_generation_prompt: bool = True,
    padding: bool = True,
) -> TokenAlignment:
    """Render one conversation for both models and align the two prompts.

    Strategies: *span*, each model reads its own tokenisation and a receiver token takes the sharer
    token that covers its last character (template tokens before the messages take the first
    sharer token, those after a message that message's last); *first* and *longest*, as the
    reference aligns chats: the sharer reads its own template, and the receiver's messages token by
    token (see `align_ids`); *same*, both read the same ids.

    Args:
        messages: The conversation.
        receiver_tokenizer: The answering model's.
        sharer_tokenizer: The reading model's.
        strategy: One of the four.
        add_generation_prompt: Whether the prompts ask for an answer.
        padding: Whether *first* and *longest* pad the shorter of two sections of template text, so
            that both models' positions are the same. An id below zero is padding: `~id` stands
            there, and no position attends to it.

    Raises:
        C2CError: A template refuses the messages, or a tokenizer gives no character offsets.
    """
    if strategy not in get_args(Strategy):
        names = ", ".join(get_args(Strategy))
        raise C2CError(f"unknown alignment strategy {strategy!r}; choose one of: {names}")
    receiver = _prompt(messages, receiver_tokenizer, add_generation_prompt)
    coordinates = receiver.coordinates[receiver.last]
    message = _message_of(messages, coordinates)
    if strategy == "same":
        identity = np.arange(len(receiver.ids), dtype=np.int32)
        return TokenAlignment(receiver.ids, list(receiver.ids), identity, message)

    sharer = _prompt(messages, sharer_tokenizer, add_generation_prompt)
    if strategy != "span":
        others = _message_of(messages, sharer.coordinates[sharer.last])
        sections = zip(
            _sections(receiver.ids, message, len(messages)),
            _sections(sharer.ids, others, len(messages)),
            strict=True,
        )
        tokenizers = (receiver_tokenizer, sharer_tokenizer)
        return _by_sections(list(sections), *tokenizers, strategy, padding)
    if not sharer.ids:  # an index needs something to point at
        filler = _role_id(fast_tokenizer(sharer_tokenizer), "bos") or 0
        zero = np.zeros(1, dtype=np.int64)
        sharer = _Prompt([filler], zero, zero, zero - 1)
    # A position of the template stands where the message text before it ended; before all
    # messages that is -1, which picks the appended 0.
    reached = np.maximum.accumulate(receiver.coordinates)[receiver.last]
    index = np.append(_sharer_positions(messages, sharer), 0)[reached]
    return TokenAlignment(
        receiver.ids, sharer.ids, np.maximum.accumulate(index).astype(np.int32), message
    )


_Section: TypeAlias = tuple[list[int], list[int]]  # template text, then a message; ids


def _sections(ids: list[int], message: npt.NDArray[np.int32], count: int) -> list[_Section]:
    """The prompt cut before and after each message; the last section has none."""
    sections, at = [], 0
    for number in range(count):
        own = np.flatnonzero(message == number)
        start, stop = (int(own[0]), int(own[-1]) + 1) if len(own) else (at, at)
        sections.append((ids[at:start], ids[start:stop]))
        at = stop
    return [*sections, (ids[at:], [])]


def _by_sections(
    sections: Sequence[tuple[_Section, _Section]],
    receiver: Tokenizer,
    sharer: Tokenizer,
    strategy: Literal["first", "longest"],
    padding: bool,
) -> TokenAlignment:
    """Template text beside template text, then each message token by token."""
    pads = [~(_role_id(fast_tokenizer(t), "pad") or 0) for t in (receiver, sharer)]
    ids: list[int] = []
    read: list[int] = []
    index: list[int] = []
    message: list[int] = []
    for number, ((own, text), (other, _)) in enumerate(sections):
        length = max(len(own), len(other)) if padding else 0
        is_last = number == len(sections) - 1
        template = own if is_last else own + pads[:1] * (length - len(own))
        start = len(read)
        read += other + pads[1:] * (length - len(other))
        ids += template
        index += np.clip(np.arange(start, start + len(template)), 0, max(len(read) - 1, 0)).tolist()
        message += [-1] * len(template)
        index += range(len(read), len(read) + len(text))
        read += align_ids(text, receiver, sharer, strategy)
        ids += text
        message += [number] * len(text)
    fed = np.maximum.accumulate(np.array(index, dtype=np.int32)) if index else np.zeros(0, np.int32)
    return TokenAlignment(ids, read or [~pads[1]], fed, np.array(message, dtype=np.int32))


class AnswerAlignment:
    """Aligns an answer, while it is being written, to how the sharer reads it.

    Both models go on from the ends of their prompts. Under *span* the sharer reads the text so far
    in its own tokens, so the tokens that feed the answer's end may still change.

    Args:
        messages: the conversation that is being answered.
        prompt: its alignment by `align_chat`.
        receiver_tokenizer: the answering model's.
        sharer_tokenizer: the reading model's.
        strategy: the one that `prompt` was made with.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        prompt: TokenAlignment,
        receiver_tokenizer: Tokenizer,
        sharer_tokenizer: Tokenizer,
        *,
        strategy: Strategy = "span",
    ) -> None:
        self.prompt, self.strategy = prompt, strategy
        self._receiver, self._sharer = receiver_tokenizer, sharer_tokenizer
        self._number = len(messages)
        self._end_of_turn = _end_ids(receiver_tokenizer)
        self._ids: list[int] = []
        self._stops: list[int] = []  # how long the text was with each token
        self._lead = _lead(messages, sharer_tokenizer) if strategy == "span" else ""

    def add(self, ids: Sequence[int]) -> TokenAlignment:
        """The alignment of the prompt and all of the answer, `ids` being what is new in it."""
        for token in ids:
            self._ids.append(token)
            self._stops.append(len(self._text()))
        tail, index = self._read()
        message = [-1 if token in self._end_of_turn else self._number for token in self._ids]
        return TokenAlignment(
            [*self.prompt.receiver_ids, *self._ids],
            [*self.prompt.sharer_ids, *tail],
            np.maximum.accumulate(np.append(self.prompt.index, index)).astype(np.int32),
            np.append(self.prompt.message, message).astype(np.int32),
        )

    def _read(self) -> tuple[list[int], Ints]:
        """The sharer's ids for the answer, and which position feeds each of the answer's tokens."""
        end = len(self.prompt.sharer_ids)
        if self.strategy != "span":
            tail = self._ids
            if self.strategy != "same":
                tail = align_ids(self._ids, self._receiver, self._sharer, self.strategy)
            return list(tail), np.arange(end, end + len(tail))
        text = self._text().rstrip("\ufffd")  # a character of which pieces are still to come
        tail, first, _ = _encode(self._lead + text, self._sharer)
        # A text with pieces of a character may be longer than it is with the whole character.
        stops = np.minimum.accumulate([*self._stops, len(text)][::-1])[::-1][:-1]
        last = stops + len(self._lead) - 1
        return tail, end + np.searchsorted(first, last, side="right") - 1

    def _text(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(fast_tokenizer(self._receiver).decode(self._ids, **options))


def _lead(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """What the template writes between the generation prompt and the answer's text."""
    prompt = render(messages, tokenizer)
    answered = [*messages, {"role": "assistant", "content": "x"}]
    rest = render(answered, tokenizer, add_generation_prompt=False).removeprefix(prompt)
    lead, found, _ = rest.partition("x")
    return lead if found and not lead.strip() else ""


def message_groups(message: npt.NDArray[np.int32], positions: str) -> npt.NDArray[np.int32]:
    """Which positions are fused, and with which message, `[len(message)]`.

    Args:
        message: `TokenAlignment.message`.
        positions: the fuser's field of that name.

    Returns:
        The message that a position is fused with, -1 where nothing is fused. Template text goes
        with the message before it.
    """
    if positions == "messages":
        return message
    filled = np.maximum.accumulate(message)
    return np.maximum(filled, 0) if positions == "all" else filled


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


def tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a rendered prompt; what the template wrote is all there is."""
    return _encode(text, tokenizer)[0]


def response_ids(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids that follow the prompt `messages[:-1]` when the model gives the last message.

    They run up to and including the first end-of-turn token, and end with one in any case. The
    remainder is encoded on its own, so that the prompt's ids stay what they are.
    """
    prompt = render(messages[:-1], tokenizer)
    full = render(messages, tokenizer, add_generation_prompt=False)
    ends = _end_ids(tokenizer)
    rewritten = not full.startswith(prompt)
    rest = str(messages[-1].get("content") or "") if rewritten else full[len(prompt) :]
    ids = _encode(rest, tokenizer)[0]
    stop = None if rewritten else next((i for i, token in enumerate(ids) if token in ends), None)
    return ids[: stop + 1] if stop is not None else [*ids, *ends[:1]]


# --- one model's prompt ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompt:
    """A rendered and tokenised conversation.

    Attributes:
        ids: The prompt's token ids.
        first: `[len(ids)]`, each token's first character; never decreases.
        last: `[len(ids)]`, each token's last character; never decreases.
        coordinates: Of `rendering.Rendering`.
    """

    ids: list[int]
    first: Ints
    last: Ints
    coordinates: Ints


def _prompt(messages: Sequence[Message], tokenizer: Tokenizer, generation: bool) -> _Prompt:
    rendering = locate(messages, tokenizer, generation)
    return _Prompt(*_encode(rendering.text, tokenizer), rendering.coordinates)


def _sharer_positions(messages: Sequence[Message], sharer: _Prompt) -> Ints:
    """For each coordinate the sharer token that covers it, `[all cores' characters]`.

    Text that the sharer's template dropped takes the token before it, or the first of all.
    """
    covered = np.flatnonzero(sharer.coordinates >= 0)
    tokens = np.zeros(bases(messages)[-1], dtype=np.int64)
    # Of several byte pieces of a character, this is the one that has read it all.
    tokens[sharer.coordinates[covered]] = np.searchsorted(sharer.first, covered, side="right") - 1
    return np.maximum.accumulate(tokens)


def _message_of(messages: Sequence[Message], coordinates: Ints) -> npt.NDArray[np.int32]:
    number = np.searchsorted(bases(messages), coordinates, side="right") - 1
    return np.where(coordinates < 0, -1, number).astype(np.int32)


def _encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], Ints, Ints]:
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


# --- tokens one by one ----------------------------------------------------------------------

# receiver tokenizer -> sharer tokenizer -> strategy -> receiver id -> sharer id
_COUNTERPARTS: weakref.WeakKeyDictionary[
    Any, weakref.WeakKeyDictionary[Any, dict[str, dict[int, int]]]
] = weakref.WeakKeyDictionary()


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
        ours, theirs = _role_id(receiver, role), _role_id(sharer, role)
        if ours is not None and theirs is not None:
            pairs[ours] = theirs
    return pairs


def _role_id(tokenizer: Any, role: str) -> int | None:
    token: int | None = getattr(tokenizer, f"{role}_token_id")
    return _role_id(tokenizer, "eos") if token is None and role == "pad" else token


def _end_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a turn, the tokenizer's own eos first."""
    fast = fast_tokenizer(tokenizer)
    named = fast.convert_tokens_to_ids(list(_END_OF_TURN))
    ids = [fast.eos_token_id, *(token for token in named if token != fast.unk_token_id)]
    if tokenizer is not fast:
        ids += sorted(tokenizer.eos_token_ids)
    return list(dict.fromkeys(int(token) for token in ids if token is not None))
