"""Small tokenizers of the three kinds that checkpoints use, made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "Grüße aus München, naïve café, señor; цена 100 ₽, 你好，世界。 こんにちは 🙂🚀 done",
    "def f(x):\n    return x + 1\n\nprint(f(41))",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """Byte-level BPE as in Llama 3 and Qwen: every token is a string of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("né", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback(*, strip: bool = True) -> Tokenizer:
    """SentencePiece BPE as in Llama 2 and Mistral (`strip`) or Gemma: a marker for spaces, bytes for the unknown."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("".join(TEXT[:1]) + "abcdefghijklmnopqrstuvwxyz.,!?0123456789") - {" "})
    words = ["▁", *letters, "th", "he", "▁t", "▁th", "▁the", "qu", "ui", "▁f", "ox", "é", "你", "▁▁"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *words])}
    merges = [("t", "h"), ("h", "e"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("q", "u"), ("u", "i"), ("▁", "f"),
              ("o", "x"), ("▁", "▁")]  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=None))
    prepend = [normalizers.Prepend("▁")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def word_piece() -> Tokenizer:
    """WordPiece, whose decoder joins words: a kind for which only the general way of detokenising serves."""
    words = ["[UNK]", *SPECIAL, "the", "fox", "##es", "##ing", "jump", "a", "b", "##c", ".", ",", "!", "'", "s"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strip=False),
    "word_piece": word_piece,
}

CHATML = (
    "{%- for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{%- endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(tokenizer: Tokenizer, path: Path, **config: object) -> Path:
    """Writes the files of a checkpoint's tokenizer into `path`."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return path
