"""Two tokenizers, one text: which sharer token feeds which receiver token.

Both models render the same messages with their own chat templates. Where a message ended up in a
rendering is never searched for: the template is rendered a second time with private-use marks
inside the messages, and the marks say where their text went, whatever the template stripped,
dropped or wrote around it.

Tokenizers are passed in (mlx-lm's `TokenizerWrapper` or a fast transformers tokenizer). Nothing
here imports a model library.
"""

from __future__ import annotations

import itertools
import os.path
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from c2c_mlx.errors import C2CError

Strategy: TypeAlias = Literal["span", "first", "longest", "same"]
Message: TypeAlias = Mapping[str, Any]
Tokenizer: TypeAlias = Any  # mlx-lm's TokenizerWrapper, or the transformers tokenizer inside one
_Ints: TypeAlias = npt.NDArray[np.int64]

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eom_id|>")
_PRIVATE_USE = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE), (0xE000, 0xF900))


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


def align_chat(
    messages: Sequence[Message],
    receiver_tokenizer: Tokenizer,
    sharer_tokenizer: Tokenizer,
    *,
    strategy: Strategy = "span",
    add_generation_prompt: bool = True,
) -> TokenAlignment:
    """Render one conversation for both models and align the two prompts.

    Strategies: *span*, each model reads its own tokenisation and a receiver token takes the sharer
    token that covers its last character (template tokens before the messages take the first
    sharer token, those after a message that message's last); *first* and *longest*, the sharer
    reads the receiver's prompt token by token (see `align_ids`); *same*, both read the same ids.

    Raises:
        C2CError: A template refuses the messages, or a tokenizer gives no character offsets.
    """
    if strategy not in get_args(Strategy):
        names = ", ".join(get_args(Strategy))
        raise C2CError(f"unknown alignment strategy {strategy!r}; choose one of: {names}")
    receiver = _prompt(messages, receiver_tokenizer, add_generation_prompt)
    coordinates = receiver.coordinates[receiver.last]
    message = _message_of(messages, coordinates)
    if strategy != "span":
        sharer_ids = receiver.ids
        if strategy != "same":
            sharer_ids = align_ids(receiver.ids, receiver_tokenizer, sharer_tokenizer, strategy)
        identity = np.arange(len(receiver.ids), dtype=np.int32)
        return TokenAlignment(receiver.ids, list(sharer_ids), identity, message)

    sharer = _prompt(messages, sharer_tokenizer, add_generation_prompt)
    if not sharer.ids:  # an index needs something to point at
        filler = _role_id(_fast(sharer_tokenizer), "bos") or 0
        zero = np.zeros(1, dtype=np.int64)
        sharer = _Prompt([filler], zero, zero, zero - 1)
    # A position of the template stands where the message text before it ended; before all
    # messages that is -1, which picks the appended 0.
    reached = np.maximum.accumulate(receiver.coordinates)[receiver.last]
    index = np.append(_sharer_positions(messages, sharer), 0)[reached]
    return TokenAlignment(
        receiver.ids, sharer.ids, np.maximum.accumulate(index).astype(np.int32), message
    )


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
    receiver, sharer = _fast(receiver_tokenizer), _fast(sharer_tokenizer)
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


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
) -> str:
    """The prompt text that a model's chat template makes of the messages, thinking off.

    A template that refuses the system role gets the system text at the head of the first user
    message instead.

    Raises:
        C2CError: The template refuses the messages all the same.
    """
    return _renderer(messages, tokenizer, add_generation_prompt)[0]


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

    All messages' cores (their contents without outer white space), one after the other, form one
    line of *coordinates*, the same for both models.

    Attributes:
        ids: The prompt's token ids.
        first: `[len(ids)]`, each token's first character; never decreases.
        last: `[len(ids)]`, each token's last character; never decreases.
        coordinates: `[characters, at least 1]`, each character's coordinate, -1 for template text.
    """

    ids: list[int]
    first: _Ints
    last: _Ints
    coordinates: _Ints


def _prompt(messages: Sequence[Message], tokenizer: Tokenizer, generation: bool) -> _Prompt:
    text, again = _renderer(messages, tokenizer, generation)
    ids, first, last = _encode(text, tokenizer)
    coordinates = np.full(max(len(text), 1), -1, dtype=np.int64)
    bases = _bases(messages)
    for number, anchors in _anchors(messages, text, again).items():
        core = _core(messages[number])
        for offset, position in anchors:
            before = _common_suffix(core[:offset], text[:position])
            after = _common_prefix(core[offset:], text[position : position + len(core) - offset])
            where = coordinates[position - before : position + after]
            start = bases[number] + offset
            where[:] = np.where(where < 0, np.arange(start - before, start + after), where)
    return _Prompt(ids, first, last, coordinates)


def _sharer_positions(messages: Sequence[Message], sharer: _Prompt) -> _Ints:
    """For each coordinate the sharer token that covers it, `[all cores' characters]`.

    Text that the sharer's template dropped takes the token before it, or the first of all.
    """
    covered = np.flatnonzero(sharer.coordinates >= 0)
    tokens = np.zeros(_bases(messages)[-1], dtype=np.int64)
    # Of several byte pieces of a character, this is the one that has read it all.
    tokens[sharer.coordinates[covered]] = np.searchsorted(sharer.first, covered, side="right") - 1
    return np.maximum.accumulate(tokens)


def _message_of(messages: Sequence[Message], coordinates: _Ints) -> npt.NDArray[np.int32]:
    number = np.searchsorted(_bases(messages), coordinates, side="right") - 1
    return np.where(coordinates < 0, -1, number).astype(np.int32)


def _encode(text: str, tokenizer: Tokenizer) -> tuple[list[int], _Ints, _Ints]:
    """Token ids and each token's first and last character, both `[len(ids)]`."""
    fast = _fast(tokenizer)
    if not getattr(fast, "is_fast", False):
        raise C2CError(
            f"the tokenizer of {_name(fast)} gives no character offsets; "
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


# --- rendering and marks --------------------------------------------------------------------

_Render: TypeAlias = Callable[[Sequence[Message]], str]
_Anchors: TypeAlias = dict[int, list[tuple[int, int]]]


def _renderer(
    messages: Sequence[Message], tokenizer: Tokenizer, generation: bool
) -> tuple[str, _Render]:
    """The rendering, and a function that renders changed copies of the messages the same way."""

    def plain(messages: Sequence[Message]) -> str:
        # transformers looks at the first message to tell one conversation from several.
        conversation: list[Any] = [dict(m) for m in messages] or [[]]
        text = tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=generation,
            enable_thinking=False,
        )
        return str(text if messages or isinstance(text, str) else text[0])

    def folded(messages: Sequence[Message]) -> str:
        return plain(_fold_system(messages))

    # A template is a program from the model's folder: it may raise anything at all.
    try:
        return plain(messages), plain
    except Exception as error:
        refusal = error
    if messages and messages[0].get("role") == "system":
        try:
            return folded(messages), folded
        except Exception as error:
            refusal = error
    reason = " ".join(str(refusal).split())[:200] or type(refusal).__name__
    roles = ", ".join(str(m.get("role")) for m in messages) or "no messages"
    raise C2CError(
        f"the chat template of {_name(_fast(tokenizer))} refuses this conversation ({roles}): "
        f"{reason}; change the roles or take another model"
    )


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put the text of the leading system messages in front of the first user message."""
    head = list(itertools.takewhile(lambda m: m.get("role") == "system", messages))
    rest = list(messages[len(head) :])
    if rest and rest[0].get("role") == "user":
        head.append(rest.pop(0))
    text = "\n\n".join(str(m.get("content") or "") for m in head)
    return [{"role": "user", "content": text}, *rest]


def _anchors(messages: Sequence[Message], text: str, again: _Render) -> _Anchors:
    """Where the template put the messages: per message `(offset in its core, offset in text)`.

    A core that the template kept whole has its two ends here, one of which part was dropped has
    one, one that was dropped or rewritten has none.
    """
    numbers = [i for i, message in enumerate(messages) if _core(message)]
    free = _unused_marks(itertools.chain(text, *(_core(m) for m in messages)))
    marks = {i: pair for i, *pair in zip(numbers, free, free, strict=False)}

    def find(numbers: Sequence[int], places: Callable[[str], list[int]]) -> _Anchors:
        if not numbers:
            return {}
        cuts = {i: places(_core(messages[i])) for i in numbers}
        marked = [_marked(m, cuts.get(i, []), marks.get(i, [])) for i, m in enumerate(messages)]
        try:
            clean, found = _unmark(again(marked), [m for i in numbers for m in marks[i]])
        except Exception:
            clean, found = None, {}
        if clean == text:
            pairs = {i: zip(cuts[i], marks[i], strict=False) for i in numbers}
            return {i: [(c, found[m]) for c, m in pair if m in found] for i, pair in pairs.items()}
        if len(numbers) > 1:  # a template looks at some message's text: find out which
            half = len(numbers) // 2
            return find(numbers[:half], places) | find(numbers[half:], places)
        return find(numbers, _middle) if places is not _middle else {}

    return find(list(marks), _ends)


def _ends(core: str) -> list[int]:
    return [0, len(core)]


def _middle(core: str) -> list[int]:
    return [len(core) // 2]


def _marked(message: Message, cuts: Sequence[int], marks: Sequence[str]) -> Message:
    """The message with marks at offsets of its core, inside the outer white space."""
    if not cuts:
        return message
    content = message["content"]
    lead = len(content) - len(content.lstrip())
    edges = [0, *(lead + cut for cut in cuts), len(content)]
    pieces = [content[a:b] for a, b in itertools.pairwise(edges)]
    text = pieces[0] + "".join(m + p for m, p in zip(marks, pieces[1:], strict=False))
    return {**message, "content": text}


def _unmark(text: str, marks: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The text without the marks, and where in it each one stood first."""
    pieces = re.split(f"([{''.join(marks)}])", text) if marks else [text]
    ends = itertools.accumulate(len(piece) for piece in pieces[::2])
    found: dict[str, int] = {}
    for mark, end in zip(pieces[1::2], ends, strict=False):
        found.setdefault(mark, end)
    return "".join(pieces[::2]), found


def _unused_marks(characters: Iterable[str]) -> Iterable[str]:
    used = set(characters)
    codes = itertools.chain.from_iterable(range(*block) for block in _PRIVATE_USE)
    return (mark for mark in map(chr, codes) if mark not in used)


def _core(message: Message) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _bases(messages: Sequence[Message]) -> list[int]:
    """Coordinate at which each message's core begins, and the end of the last one."""
    return [0, *itertools.accumulate(len(_core(m)) for m in messages)]


def _common_prefix(a: str, b: str) -> int:
    return len(a) if a == b else len(os.path.commonprefix([a, b]))


def _common_suffix(a: str, b: str) -> int:
    return len(a) if b.endswith(a) else _common_prefix(a[::-1], b[-len(a) :][::-1])


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
    fast = _fast(tokenizer)
    named = fast.convert_tokens_to_ids(list(_END_OF_TURN))
    ids = [fast.eos_token_id, *(token for token in named if token != fast.unk_token_id)]
    if tokenizer is not fast:
        ids += sorted(tokenizer.eos_token_ids)
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def _fast(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer, out of mlx-lm's wrapper or not."""
    inner = getattr(tokenizer, "_tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def _name(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "name_or_path", "") or "this model")
