"""Cut a BPE tokenizer down to what the alignment goldens touch (10 MB become 100 KB).

A merge can only ever apply inside a pre-token that contains its result. So every token and merge
whose text is no part of any pre-token of the golden texts can go, and the rest, ids unchanged,
encodes those texts exactly as the whole tokenizer does. Tokens are also decoded alone, and what
that gives is encoded again: those texts count as golden texts too.

    python tests/golden/reduce_tokenizer.py TARGET_FOLDER SOURCE_FOLDER...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

GOLDENS = sorted((Path(__file__).parent / "data" / "aligner").glob("*.json"))


def golden_texts() -> set[str]:
    texts = {"\ufffd"}  # what a lone piece of a character decodes to
    for golden in map(json.loads, (path.read_text("utf-8") for path in GOLDENS)):
        texts |= {item["text"] for item in golden["texts"]}
        for chat in golden["chats"]:
            texts |= {chat.get("slm_text", ""), chat.get("llm_text", "")}
            texts |= {message["content"] for message in chat["messages"]}
    return texts


def pieces(tokenizer: Tokenizer, texts: set[str], longest: int) -> set[str]:
    """Every part, up to a token's length, of every pre-token of the texts."""
    found = set()
    for text in texts:
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        split = [(text, None)]
        if tokenizer.pre_tokenizer is not None:
            split = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        for word, _ in split:
            for start in range(len(word)):
                found |= {word[start:end] for end in range(start + 1, start + 1 + longest)}
    return found


def alone(tokenizer: Tokenizer, texts: set[str]) -> set[str]:
    tokens = {i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids}
    return {tokenizer.decode([token], skip_special_tokens=False) for token in tokens}


def reduce(source: dict[str, Any], texts: set[str]) -> dict[str, Any]:
    model = source["model"]
    added = {token["content"]: token["id"] for token in source["added_tokens"]}
    kept = pieces(Tokenizer.from_str(json.dumps(source)), texts, max(map(len, model["vocab"])))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merges = [pair for pair in merges if "".join(pair) in kept]
    vocab = {
        token: number
        for token, number in model["vocab"].items()
        # single characters are the byte alphabet; <0xE2> and the like are the byte fallback
        if token in kept or (len(token) == 1 and number < 300) or token.startswith("<0x")
    }
    # An added token keeps its id only if the model knows it.
    return {**source, "model": {**model, "vocab": vocab | added, "merges": merges}}


def main(target: Path, sources: list[Path]) -> None:
    texts = golden_texts()
    for tokenizer in [Tokenizer.from_file(str(source / "tokenizer.json")) for source in sources]:
        texts |= alone(tokenizer, golden_texts())
    for source in sources:
        folder = target / source.name.split("-")[0]
        folder.mkdir(parents=True, exist_ok=True)
        small = reduce(json.loads((source / "tokenizer.json").read_text("utf-8")), texts)
        text = json.dumps(small, ensure_ascii=False, separators=(",", ":"))
        (folder / "tokenizer.json").write_text(text, "utf-8")
        config = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
        config.pop("added_tokens_decoder", None)  # tokenizer.json has them
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(source) for source in sys.argv[2:]])
