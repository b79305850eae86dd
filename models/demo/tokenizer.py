"""Trains the demo model's tokenizer (byte-level BPE) and packs the corpus into token streams.

::

    python -m camshaft.models.demo.tokenizer --documents .corpus/documents.jsonl.xz --chat .corpus/chat.jsonl.xz \
        --packed .corpus/packed --data models/demo/data

``--packed`` receives ``train.bin.xz``, ``chat.bin.xz``, ``heldout.bin.xz`` (little-endian uint16 token ids, documents
closed by ``<|endoftext|>``), ``heldout.jsonl`` and ``meta.json`` (token and byte counts).
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
WORDNET_SHARE = 0.25
"""Share of WordNet's entries in the plain stream; the chat examples hold the definitions of frequent words."""
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + ns.system + message['content'] + '<|end|>' -}}{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}{{- raise_exception('roles are system, user and assistant; got ' + message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Any:
    """A byte-level BPE ``tokenizers.Tokenizer`` (Sennrich et al. 2016, over bytes as in Radford et al. 2019).

    All 256 bytes are in the vocabulary, so every string round-trips; digits are single tokens; runs of spaces merge.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` (with the chat template) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def render_chat(messages: list[dict[str, str]]) -> str:
    """The text the chat template makes of user and assistant messages (no generation prompt)."""
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an xz-compressed JSON-lines file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _encode(tokenizer: Any, texts: list[str]) -> Any:
    import numpy as np

    end = tokenizer.token_to_id("<|endoftext|>")
    parts = []
    for start in range(0, len(texts), 2000):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 2000], add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype="<u2"))
    return np.concatenate(parts)


def pack(tokenizer: Any, documents: Path, chat: Path, folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Tokenises every document and chat example into ``folder``; returns the counts that go into meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    train: list[str] = []
    heldout: list[dict[str, Any]] = []
    for row in read_jsonl(documents):
        if row["split"] == "heldout":
            heldout.append(row)
        elif row["kind"] != "wordnet" or rng.random() < WORDNET_SHARE:
            train.extend([row["text"]] * row["repeat"])
    rng.shuffle(train)
    chats = [render_chat(row["messages"]) for row in read_jsonl(chat)]
    rng.shuffle(chats)
    meta: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    for name, texts in (("train", train), ("chat", chats), ("heldout", [row["text"] for row in heldout])):
        tokens = _encode(tokenizer, texts)
        meta[name] = {
            "documents": len(texts),
            "tokens": int(tokens.size),
            "bytes": sum(len(text.encode()) for text in texts),
        }
        with lzma.open(folder / f"{name}.bin.xz", "wb", preset=2) as file:
            file.write(tokens.tobytes())
        logger.info("%s: %s", name, meta[name])
    with (folder / "heldout.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in heldout)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, default=Path(".corpus/documents.jsonl.xz"))
    parser.add_argument("--chat", type=Path, default=Path(".corpus/chat.jsonl.xz"))
    parser.add_argument("--packed", type=Path, default=Path(".corpus/packed"))
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument(
        "--sample-mb", type=float, default=30.0, help="text the merges are learned from, 10^6 characters"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rng = random.Random(0)
    rows = [
        (row["text"], row["repeat"])
        for row in read_jsonl(args.documents)
        if row["split"] == "train" and row["kind"] != "wordnet"
    ]
    rng.shuffle(rows)
    sample, taken = [], 0
    for text, repeat in rows:
        if taken > args.sample_mb * 1e6:
            break
        sample.extend([text[:40_000]] * repeat)
        taken += min(len(text), 40_000) * repeat
    tokenizer = train_tokenizer(sample)
    for name in ("camshaft-demo", "camshaft-demo-draft"):
        save_tokenizer(tokenizer, args.data / name)
    pack(tokenizer, args.documents, args.chat, args.packed)


if __name__ == "__main__":
    main()
