"""What a chat template makes of a conversation, and where in it each message's text went.

Where a message ended up is never searched for: the template is rendered a second time with
private-use marks inside the messages, and the marks say where their text went, whatever the
template stripped, dropped or wrote around it.
"""

from __future__ import annotations

import itertools
import os.path
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from c2c_mlx.errors import C2CError

Message: TypeAlias = Mapping[str, Any]
Tokenizer: TypeAlias = Any  # mlx-lm's TokenizerWrapper, or the transformers tokenizer inside one
Ints: TypeAlias = npt.NDArray[np.int64]

_Render: TypeAlias = Callable[[Sequence[Message]], str]
_Anchors: TypeAlias = dict[int, list[tuple[int, int]]]

_PRIVATE_USE = ((0xF0000, 0xFFFFE), (0x100000, 0x10FFFE), (0xE000, 0xF900))


class Refused(C2CError):
    """A chat template does not take a conversation as it is."""


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
) -> str:
    """The prompt text that a model's chat template makes of the messages, thinking off.

    A template that refuses the system role gets the system text at the head of the first user
    message instead.

    Raises:
        Refused: The template refuses the messages all the same.
    """
    return _renderer(messages, tokenizer, add_generation_prompt)[0]


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    All messages' cores (their contents without outer white space), one after the other, form one
    line of *coordinates*, the same for every model.

    Attributes:
        text: What the model reads.
        coordinates: `[len(text), at least 1]`, each character's coordinate, -1 for template text.
    """

    text: str
    coordinates: Ints


def locate(messages: Sequence[Message], tokenizer: Tokenizer, generation: bool) -> Rendering:
    """Renders as `render` does, and finds every message's text in the rendering."""
    text, again = _renderer(messages, tokenizer, generation)
    coordinates = np.full(max(len(text), 1), -1, dtype=np.int64)
    starts = bases(messages)
    for number, anchors in _anchors(messages, text, again).items():
        core = _core(messages[number])
        for offset, position in anchors:
            before = _common_suffix(core[:offset], text[:position])
            after = _common_prefix(core[offset:], text[position : position + len(core) - offset])
            where = coordinates[position - before : position + after]
            start = starts[number] + offset
            where[:] = np.where(where < 0, np.arange(start - before, start + after), where)
    return Rendering(text, coordinates)


def bases(messages: Sequence[Message]) -> list[int]:
    """Coordinate at which each message's core begins, and the end of the last one."""
    return [0, *itertools.accumulate(len(_core(m)) for m in messages)]


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer, out of mlx-lm's wrapper or not."""
    inner = getattr(tokenizer, "_tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def name_of(tokenizer: Tokenizer) -> str:
    """What to call the tokenizer's model in a message."""
    return str(getattr(fast_tokenizer(tokenizer), "name_or_path", "") or "this model")


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
    raise Refused(
        f"the chat template of {name_of(tokenizer)} refuses this conversation ({roles}): "
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


def _common_prefix(a: str, b: str) -> int:
    return len(a) if a == b else len(os.path.commonprefix([a, b]))


def _common_suffix(a: str, b: str) -> int:
    return len(a) if b.endswith(a) else _common_prefix(a[::-1], b[-len(a) :][::-1])
