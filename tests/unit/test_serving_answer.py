"""One answer from tokens: where it ends, what of it is certain, and how likely its tokens were."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from chat_sessions import thinker
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from c2c_mlx import LanguageModel
from c2c_mlx.config import SamplingConfig
from c2c_mlx.serving.answer import Answer, sampler, token_bytes, weigh

FLAT = mx.zeros(512)
TEXT = "It was the sea, naïve and 海 wide; and the sea it was."


def write(answer: Answer, ids: list[int], finish: str = "length") -> list[str]:
    pieces = []
    for at, token in enumerate(ids, 1):
        piece = answer.add(token, FLAT, finish if at == len(ids) else None)
        pieces.append(piece.text)
        if answer.reason:
            break
    return pieces


@given(st.lists(st.text(st.sampled_from("a es,;IwtT"), min_size=1, max_size=4), max_size=3))
def test_a_stop_string_and_all_behind_it_are_never_told(receiver: LanguageModel, stops) -> None:
    ids = receiver.tokenizer.encode(TEXT, add_special_tokens=False)
    answer = Answer(receiver, stop=stops)
    pieces = write(answer, ids)
    # Of two that begin at once the shorter one is there first; of others, the one that ends first.
    ends = [TEXT.index(s) + len(s) for s in stops if s in TEXT]
    if ends:
        ended = min(ends)
        starts = [TEXT.index(s) for s in stops if s in TEXT and TEXT.index(s) + len(s) == ended]
        assert answer.text == TEXT[: min(starts)] and answer.reason == "stop"
    else:
        assert answer.text == TEXT and answer.reason == "length"
    assert "".join(pieces) == answer.text


def test_the_end_of_a_turn_is_no_text(receiver: LanguageModel) -> None:
    ids = receiver.tokenizer.encode("the sea,", add_special_tokens=False)
    answer = Answer(receiver, stop=("sea, w",))
    write(answer, [*ids, *receiver.tokenizer.eos_token_ids], "stop")
    assert (answer.text, answer.reason) == ("the sea,", "stop")
    assert len(answer.ids) == len(ids) + 1


def test_tokens_are_told_with_their_text(receiver: LanguageModel) -> None:
    ids = receiver.tokenizer.encode(TEXT, add_special_tokens=False)
    answer = Answer(receiver, stop=("wide",), top_logprobs=2)
    told = []
    for token in ids:
        piece = answer.add(token, FLAT, None)
        told += piece.tokens
        data = bytes(byte for token in told for byte in token.bytes)
        assert data.startswith(answer.text.encode())
        if answer.reason:
            break
    assert answer.text == "It was the sea, naïve and 海 "
    assert data.decode().rstrip("w") == answer.text  # the last token may have begun before the stop


def test_thoughts_are_no_text_no_tokens_and_no_part_of_the_limit(receiver: LanguageModel) -> None:
    ids = receiver.tokenizer.encode(TEXT, add_special_tokens=False)
    lm = replace(receiver, tokenizer=thinker(receiver, "<never>", "naïve"))
    answer = Answer(lm, stop=("the",), top_logprobs=0, limit=5, is_thinking=True)
    pieces = [answer.add(token, FLAT, None) for token in ids[: len(ids) // 2]]
    while answer.reason is None:
        pieces.append(answer.add(ids[len(answer.ids)], FLAT, None))
    assert answer.reason == "length" and not answer.is_thinking
    assert answer.text and TEXT.partition("naïve")[2].startswith(answer.text)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert sum(len(piece.tokens) for piece in pieces) == 5


def test_thoughts_that_a_model_opens_by_itself_are_no_text(receiver: LanguageModel) -> None:
    ids = receiver.tokenizer.encode("ab<think>cd</think>ef", add_special_tokens=False)
    lm = replace(receiver, tokenizer=thinker(receiver, "<think>", "</think>"))
    answer = Answer(lm, top_logprobs=0)
    pieces = [answer.add(token, FLAT, None) for token in ids]
    pieces.append(answer.add(receiver.tokenizer.eos_token_id, FLAT, "stop"))
    assert answer.text == "".join(piece.text for piece in pieces) == "abef"
    told = b"".join(bytes(token.bytes) for piece in pieces for token in piece.tokens)
    assert told == b"abef"
    answer = Answer(lm, limit=6)  # "ab", four pieces of a mark that its last one makes it, "ef"
    write(answer, [*ids, receiver.tokenizer.eos_token_id], "stop")
    assert (answer.text, answer.reason) == ("abef", "length")


def test_the_likeliest_come_first(receiver: LanguageModel) -> None:
    logprobs = mx.full((512,), -20.0)
    logprobs[mx.array([300, 301, 302])] = mx.array([-1.0, -0.5, -3.0])
    logprobs[7] = -float("inf")
    token = weigh(receiver.tokenizer, 7, logprobs, 3)
    assert token.logprob == -9999.0
    assert [t.logprob for t in token.top] == [-0.5, -1.0, -3.0]
    assert not any(t.top for t in token.top)
    assert weigh(receiver.tokenizer, 300, logprobs, 0).top == ()


def test_bytes_of_tokens_are_those_of_the_text(receiver: LanguageModel) -> None:
    ids = receiver.tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(token_bytes(receiver.tokenizer, token) for token in ids) == TEXT.encode()
    (end,) = receiver.tokenizer.eos_token_ids
    assert token_bytes(receiver.tokenizer, end).decode() == receiver.tokenizer.eos_token
    assert token_bytes(receiver.tokenizer, 10**6) == b""


@pytest.mark.pair
def test_bytes_of_a_sentencepiece_tokenizer() -> None:
    from c2c_mlx.models import registry
    from c2c_mlx.models.embedded import install
    from c2c_mlx.models.load import find_folder

    _, sharer = registry.default_pair()
    if not install.is_installed(sharer):
        pytest.skip("the embedded pair is not in the cache; `c2c-chat` puts it there")
    tokenizer = load_tokenizer(find_folder(sharer))
    text = TEXT + "\U00013080 <b>\n\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()


def test_a_sampler_draws_from_the_nucleus_by_its_own_numbers() -> None:
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    config = SamplingConfig(temp=1.0, top_p=0.7, seed=1)
    draw, again, other = sampler(config), sampler(config), sampler(config, 1)
    assert draw and again and other
    drawn = [draw(logprobs).item() for _ in range(200)]
    assert {*drawn} == {0, 1} and 0.5 < np.mean(np.array(drawn) == 0) < 0.75
    mx.random.seed(9)  # others may draw meanwhile
    assert [again(logprobs).item() for _ in range(200)] == drawn
    assert [other(logprobs).item() for _ in range(200)] != drawn
    assert sampler(SamplingConfig(temp=0.0)) is None and sampler(SamplingConfig(temp=1e-9)) is None
