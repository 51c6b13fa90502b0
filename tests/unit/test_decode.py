"""Decoding from a prefilled cache."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from pathlib import Path

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx
import pytest
from chat_sessions import thinker
from chat_tokenizers import reasoner, user
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from prompts import (
    assert_same,
)

from c2c_mlx import LanguageModel
from c2c_mlx.config import SamplingConfig
from c2c_mlx.fusion import kv
from c2c_mlx.fusion.reader import Reader
from c2c_mlx.talk.decode import Piece, decode
from c2c_mlx.text.rendering import render
from c2c_mlx.text.thoughts import begins_thinking, has_thought
from c2c_mlx.text.tokens import response_ids, text_ids, tokenize


def pieces_of(
    lm: LanguageModel, stop_strings: Sequence[str], n: int
) -> Generator[Piece, None, str]:
    reader = Reader(lm.model)
    reader.extend([10, 11, 12])
    sampling = SamplingConfig(max_tokens=n, temp=1.5, seed=4)
    return decode(lm.model, lm.tokenizer, reader.cache, [13], sampling, stop_strings)


def written(lm: LanguageModel, stop_strings: Sequence[str] = ()) -> list[str]:
    return [piece.text for piece in pieces_of(lm, stop_strings, 24)]


def ended(
    lm: LanguageModel, stop_strings: Sequence[str] = (), n: int = 24
) -> tuple[list[int], str]:
    """All ids, and the reason why there are no more."""
    tokens, pieces = [], pieces_of(lm, stop_strings, n)
    while True:
        try:
            tokens.append(next(pieces).token)
        except StopIteration as end:
            return tokens, end.value


def test_decoding_is_repeatable_and_whole(receiver: LanguageModel) -> None:
    once = written(receiver)
    assert once == written(receiver)
    assert len("".join(once)) > 10


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [3, 8])
def test_no_part_of_a_stop_string_is_ever_shown(
    receiver: LanguageModel, start: int, length: int
) -> None:
    text = "".join(written(receiver))
    stop = text[start : start + length]
    pieces = written(receiver, ["never written", stop])
    assert "".join(pieces) == text[: text.index(stop)]
    assert len(pieces) < 24


def test_why_an_answer_ended(receiver: LanguageModel) -> None:
    text = "".join(written(receiver))

    def reason(n: int, stop_strings: Sequence[str] = ()) -> str:
        return ended(receiver, stop_strings, n)[1]

    assert reason(24) == "length"
    assert reason(24, [text]) == "stop"  # complete with the last token that is allowed
    eos, tokens = receiver.tokenizer.eos_token_ids, ended(receiver)[0]
    end = tokens[9]
    receiver.tokenizer.eos_token_ids = {end}
    try:
        at = tokens.index(end) + 1
        assert (reason(at - 1), reason(at), reason(24)) == ("length", "stop", "stop")
    finally:
        receiver.tokenizer.eos_token_ids = eos


def test_the_beginning_of_a_stop_string_comes_out_at_the_end(receiver: LanguageModel) -> None:
    text = "".join(written(receiver))
    pieces = written(receiver, [text[-2:] + "and what never comes"])
    assert "".join(pieces) == text
    assert pieces[-1].endswith(text[-2:])


def test_settle_keeps_what_was_written_for_the_next_turn(receiver: LanguageModel) -> None:
    reader, ids = Reader(receiver.model), [10, 11, 12, 13]
    reader.extend(ids[:-1])
    sampling = SamplingConfig(max_tokens=9)
    tokens = []
    for token, *_ in decode(receiver.model, receiver.tokenizer, reader.cache, ids[-1:], sampling):
        tokens.append(token)
        if len(tokens) == 4:
            break
    reader.settle([*ids, *tokens])
    assert reader.ids == [*ids, *tokens][: len(reader.ids)]
    assert kv.length(reader.cache) == len(reader.ids) >= len(ids) + 3
    longer = [*ids, *tokens, 44, 45]
    again = Reader(receiver.model)
    again.extend(longer)
    reader.extend(longer)
    assert_same(reader.cache, again.cache, 1e-5)


def test_thoughts_are_no_part_of_an_answer_nor_of_its_budget(receiver: LanguageModel) -> None:
    """As of a model whose template begins them, asked to or not."""
    whole = list(pieces_of(receiver, [], 24))
    text = "".join(piece.text for piece in whole)
    end = text[9:12]
    cut = text.index(end) + len(end)
    tokenizer = thinker(receiver, "<never>", end)
    reader = Reader(receiver.model)
    reader.extend([10, 11, 12])
    sampling = SamplingConfig(max_tokens=4, temp=1.5, seed=4)
    model, cache = receiver.model, reader.cache
    pieces = list(decode(model, tokenizer, cache, [13], sampling, thinking=True))
    thoughts = [piece for piece in pieces if piece.is_thought]
    assert len(thoughts) >= 3 and len(pieces) - len(thoughts) == 4
    answer = "".join(piece.text for piece in pieces)
    assert answer and text[cut:].startswith(answer)
    assert [p.token for p in pieces] == [p.token for p in whole][: len(pieces)]


def test_a_prompt_that_ends_within_thoughts(receiver: LanguageModel) -> None:
    ids = receiver.tokenizer.encode("ab cd ef\n", add_special_tokens=False)
    assert begins_thinking(thinker(receiver, "ef", "xx"), ids)
    assert not begins_thinking(thinker(receiver, "cd", "xx"), ids)  # what a user may write
    assert not begins_thinking(thinker(receiver, "cd", "ef"), ids)
    assert not begins_thinking(thinker(receiver, "xx", "yy"), ids)
    assert not begins_thinking(receiver.tokenizer, ids)
    padded = [i for token in ids for i in (token, *[~0] * 16)]
    assert begins_thinking(thinker(receiver, "ef", "xx"), padded)
    assert has_thought(thinker(receiver, "cd", "ef"), ids)
    assert not has_thought(thinker(receiver, "ef", "xx"), ids)
    assert not has_thought(receiver.tokenizer, ids)


def test_thoughts_that_a_model_opens_by_itself(receiver: LanguageModel) -> None:
    text = "".join(written(receiver))
    start, end = text[2:5], text[9:12]
    tokenizer, reader = thinker(receiver, start, end), Reader(receiver.model)
    reader.extend([10, 11, 12])
    sampling = SamplingConfig(max_tokens=6, temp=1.5, seed=4)
    pieces = list(decode(receiver.model, tokenizer, reader.cache, [13], sampling))
    answer = "".join(piece.text for piece in pieces)
    before, _, rest = text.partition(start)
    thoughts, _, after = rest.partition(end)
    assert thoughts and len(answer) > len(before) and (before + after).startswith(answer)
    assert sum(not piece.is_thought for piece in pieces) == 6


def test_the_channels_of_gpt_oss(receiver: LanguageModel, tmp_path: Path) -> None:
    inner = copy.deepcopy(receiver.tokenizer._tokenizer)
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
    inner.add_special_tokens({"additional_special_tokens": marks})
    inner.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompt = tokenizer.encode("ab<|end|><|start|>assistant", add_special_tokens=False)
    assert begins_thinking(tokenizer, prompt)
    said = tokenizer.encode(
        "<|channel|>analysis<|message|>cd<|end|><|start|>assistant<|channel|>final<|message|>ef",
        add_special_tokens=False,
    )
    assert read_out(said, tokenizer, prompt) == "ef"


def test_what_is_taught_behind_open_thoughts_is_an_answer() -> None:
    tokenizer = reasoner()
    chat = [user("the dog"), {"role": "assistant", "content": "a fox"}]
    prompt = tokenize(render(chat[:1], tokenizer), tokenizer)
    assert begins_thinking(tokenizer, prompt)
    ids = response_ids(chat, tokenizer)
    assert tokenizer.decode(ids) == "\n</think>\n\na fox<|im_end|>"
    assert text_ids(chat, tokenizer) == ids[:-1]
    assert read_out(ids, tokenizer, prompt).strip() == "a fox"


def read_out(said: Sequence[int], tokenizer: TokenizerWrapper, prompt: Sequence[int]) -> str:
    """The answer of a model that says just that behind a prompt that ends within thoughts."""
    upcoming, end = iter(said), tokenizer.eos_token_id

    def model(ids: mx.array, cache: kv.Cache) -> mx.array:
        return 100.0 * (mx.arange(len(tokenizer)) == next(upcoming, end))[None, None]

    sampling = SamplingConfig(max_tokens=len(said))
    pieces = decode(model, tokenizer, [], prompt[-1:], sampling, thinking=True)
    return "".join(piece.text for piece in pieces)
