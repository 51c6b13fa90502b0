"""Layer maps and per-token counterparts, against the reference implementation.

The Qwen3, Llama 3 and SmolLM2 tokenizers in `data/tokenizers` are cut down to what these texts
touch, ids unchanged (`reduce_tokenizer.py` says how and why that is exact). The embedded pair's
tokenizers are tested whole where they lie in the cache folder.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from c2c_mlx.fusion.layers import k_nearest, last_aligned
from c2c_mlx.text.alignment import align_chat
from c2c_mlx.text.rendering import render
from c2c_mlx.text.tokens import align_ids

DATA = Path(__file__).parent / "data"
PAIR = Path.home() / ".cache" / "c2c-mlx" / "models"
FOLDERS = {
    "qwen3": DATA / "tokenizers" / "qwen3",
    "llama3": DATA / "tokenizers" / "llama3",
    "smollm2": PAIR / "smollm2-135m",
    "gemma3": PAIR / "gemma3-270m",
}
needs_pair = [
    pytest.mark.pair,
    pytest.mark.skipif(
        not (FOLDERS["smollm2"].is_dir() and FOLDERS["gemma3"].is_dir()),
        reason="the embedded pair is not in the cache folder",
    ),
]
pairs = pytest.mark.parametrize(
    "names", ["qwen3__llama3", "llama3__qwen3", pytest.param("smollm2__gemma3", marks=needs_pair)]
)


def golden(names):
    return json.loads((DATA / "aligner" / f"{names}.json").read_text("utf-8"))


@cache
def tokenizer(name, chat_template):
    loaded = AutoTokenizer.from_pretrained(FOLDERS[name])
    loaded.chat_template = chat_template
    return loaded


def both(expected):
    sides = expected["slm"], expected["llm"]
    return [tokenizer(side["name"], side["chat_template"]) for side in sides]


@pytest.mark.parametrize("case", json.loads((DATA / "mapping.json").read_text("utf-8")), ids=str)
def test_layer_maps(case):
    sizes = case["n_target"], case["n_source"], case["k"]
    for layer_map, name in (
        (last_aligned, "last_aligned_sources"),
        (k_nearest, "k_nearest_sources"),
    ):
        expected = [(int(t), source) for t, sources in case[name].items() for source in sources]
        assert layer_map(*sizes) == expected


@pairs
@pytest.mark.parametrize("strategy", ["first", "longest"])
def test_counterparts(names, strategy):
    expected = golden(names)
    receiver, sharer = both(expected)
    for item in expected["texts"]:
        ids = receiver(item["text"], add_special_tokens=False)["input_ids"]
        assert ids == item["slm_ids"]
        assert align_ids(ids, receiver, sharer, strategy) == item[f"llm_ids_{strategy}"]


@pairs
@pytest.mark.parametrize("strategy", ["first", "longest"])
def test_sections_of_chats(names, strategy):
    """Template beside template, padded; messages token by token. Padding is below zero here.

    The reference searches the rendering for a message's text: it finds the role's name when that is
    the text, and takes white space for text that templates strip. Ours does neither.
    """
    expected = golden(names)
    receiver, sharer = both(expected)
    seen = 0
    for chat in expected["chats"]:
        if strategy not in chat or chat["remove_last_surfix"]:
            continue  # the reference fails on it; or it is cut as no chat of ours is
        texts = [message["content"] for message in chat["messages"]]
        if any(text != text.strip() or text in ("user", "assistant") for text in texts):
            continue
        options = {"add_generation_prompt": chat["add_generation_prompt"], "strategy": strategy}
        aligned = align_chat(chat["messages"], receiver, sharer, **options)
        length = len(aligned.receiver_ids)
        for ids, side, name in (
            (aligned.receiver_ids, "slm", "slm_ids_padded"),
            (aligned.sharer_ids, "llm", "llm_ids_padded"),
        ):
            assert [max(i, ~i) for i in ids] == chat[strategy][name][: len(ids)]
            assert [int(i < 0) for i in ids] == chat[f"{side}_padding_mask"][: len(ids)]
        assert len(aligned.sharer_ids) == len(chat["message_mask"])
        assert all(chat["slm_padding_mask"][length:])  # nothing comes after it
        assert (aligned.message >= 0).astype(int).tolist() == chat["message_mask"][:length]
        fused = aligned.message >= 0
        assert np.array_equal(aligned.index[fused], np.flatnonzero(fused))
        seen += 1
    assert seen >= 3


@pairs
def test_span_alignment_of_the_reference_chats(names):
    """Also of those chats that the reference's section aligner fails on."""
    expected = golden(names)
    receiver, sharer = both(expected)
    for chat in expected["chats"]:
        messages = chat["messages"]
        options = {"add_generation_prompt": chat["add_generation_prompt"]}
        aligned = align_chat(messages, receiver, sharer, **options)
        assert sorted(set(aligned.message.tolist()) - {-1}) == list(range(len(messages)))
        assert np.all(np.diff(aligned.index) >= 0)
        if "slm_text" in chat and not chat["remove_last_surfix"]:
            for text, side, ids in (
                (chat["slm_text"], receiver, aligned.receiver_ids),
                (chat["llm_text"], sharer, aligned.sharer_ids),
            ):
                assert ids == side(text, add_special_tokens=False)["input_ids"]
        # The plain template has no place for a system message.
        seen = render(messages, sharer, **options)
        read = [i for i, message in enumerate(messages) if message["content"].strip() in seen]
        pieces = receiver.batch_decode([[token] for token in aligned.receiver_ids])
        fed_by = sharer.batch_decode([[aligned.sharer_ids[i]] for i in aligned.index])
        for piece, other, number in zip(pieces, fed_by, aligned.message, strict=True):
            if number in read and "\ufffd" not in piece + other:
                assert piece.rstrip()[-1:] in other
