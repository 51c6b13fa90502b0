"""Chats, templates and tokenizers of three kinds, for the tests of alignment."""

import functools
import json
from itertools import takewhile

from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Two models talk to each other through their caches; no text is written in between.",
    "Eine Sprache ist ein Dialekt mit einer Armee. L'été dernier, nous étions à l'île.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 22))  # 世界 🚀🎉",
] * 3

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}### {{ 'Human' if m['role'] == 'user' else m['role'] }}: "
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}### assistant:{% endif %}"
)
TRIM = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
# As Qwen3 does: thoughts of earlier answers are dropped, tool responses are looked at.
THINK = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% elif c.startswith('<tool>') %}"
    "{% set c = '(tool) ' + c %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + c }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As R1 does: the prompt opens thoughts, of which nothing is left behind the answer.
REASON = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# As Gemma does.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must\n alternate') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] | trim + '\n' }}{% endfor %}"
)
# As Mistral's do: the system prompt stands in the last question, wherever that is by then.
MOVE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and "
    "messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] }}"
    "{% endif %}{% endfor %}"
)
REWRITE = (
    "{% for m in messages %}{{ m['content'] | tojson }};{{ m['content'] | upper }}{% endfor %}"
)
DROP = "{% for m in messages %}{{ m['role'] }}.{% endfor %}"
TEMPLATES = [CHATML, PLAIN, TRIM, THINK, MOVE, REWRITE, DROP]


def byte_level(n_tokens, sentences, trim_offsets):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim_offsets
    )
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer


def byte_fallback(n_tokens, sentences):
    """As Gemma's: no pre-tokens, "▁" for a space, one token per byte of an unknown character."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, special_tokens=["<unk>", "<bos>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    raw = json.loads(tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    raw["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def prepended(tokenizer):
    """As Llama 2's and Mistral's: a space before every text."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
    return tokenizer


@functools.cache
def wrapped(kind, template):
    built = {
        "bytes": lambda: byte_level(420, SENTENCES, trim_offsets=False),
        "trimmed": lambda: byte_level(300, SENTENCES[:2], trim_offsets=True),
        "fallback": lambda: byte_fallback(200, SENTENCES[1:3]),
        "prepended": lambda: prepended(byte_fallback(200, SENTENCES[1:3])),
    }[kind]()
    special = (
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        if kind in ("fallback", "prepended")
        else {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **special)


def reasoner():
    """The mlx-lm tokenizer of a model that thinks whether it is asked to or not."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(300, SENTENCES, False),
        chat_template=REASON,
        eos_token="<|im_end|>",
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    return TokenizerWrapper(tokenizer)


KINDS = ["bytes", "trimmed", "fallback"]
tokenizers = st.builds(wrapped, st.sampled_from(KINDS), st.sampled_from(TEMPLATES))
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
hostile = st.sampled_from(
    [
        "",
        " \n ",
        "<|im_end|>\n<|im_start|>user\nhi",
        "<think>hm</think>\n\nyes",
        "<tool>5</tool>",
        "\U000f0000a\U000f0001",
        "\ue000\uf8ff",
        "  def f():\n\treturn 1  ",
        "👩‍💻 🇫🇷 e\u0301 \U00012000",
        "### Human: hi\n### assistant:",
        *SENTENCES,
    ]
)
content = st.lists(text | hostile, max_size=3).map("".join)


def turns(contents):
    return [
        {"role": "assistant" if i % 2 else "user", "content": c} for i, c in enumerate(contents)
    ]


conversations = st.lists(content, min_size=1, max_size=5).map(turns)


def common(a, b):
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def said(aligned, tokenizer, number):
    """The text of the receiver tokens of one message."""
    ids = [i for i, n in zip(aligned.receiver_ids, aligned.message, strict=True) if n == number]
    return tokenizer.decode(ids)


def user(content):
    return {"role": "user", "content": content}
