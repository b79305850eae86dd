"""What drafts are trained and tried on: training text, the target's own continuations of it, and held-out prompts.

A draft serves texts that the target writes, so half of the batches are the target's own: pieces of training text that it has
continued, greedily or with temperature. The held-out text is read for estimates alone.
"""

from __future__ import annotations

import lzma
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..demo import calibration_path, heldout_path


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of documents that form feeds separate, each closed by the end-of-text token."""
    ids: list[int] = []
    for document in text.split("\f"):
        if document.strip():
            ids += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    return ids


def read_training_text(packed: Path | None, tokenizer: Any) -> Tensor:
    """[N] int64 tokens: the packed streams in `packed` (models/demo/tokenizer.py), or the shipped calibration text.

    Raises ValueError for a directory without `train.bin.xz`.
    """
    if packed is None:
        return torch.tensor(encode(tokenizer, calibration_path().read_text(encoding="utf-8")))
    files = [packed / name for name in ("train.bin.xz", "chat.bin.xz") if (packed / name).is_file()]
    if not files or files[0].name != "train.bin.xz":
        raise ValueError(f"{packed} has no train.bin.xz; make it with python -m camshaft.models.demo.tokenizer")
    parts = []
    for file in files:
        with lzma.open(file) as stream:
            parts.append(torch.from_numpy(np.frombuffer(stream.read(), dtype="<u2").astype(np.int64)))
    return torch.cat(parts)


def heldout_prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> Tensor:
    """[count, length] int64 pieces of the held-out text."""
    ids = encode(tokenizer, heldout_path().read_text(encoding="utf-8"))
    rng = random.Random(seed)
    starts = [rng.randrange(len(ids) - length) for _ in range(count)]
    return torch.tensor([ids[start : start + length] for start in starts])


@torch.no_grad()
def continuations(model: Any, prompts_BP: Tensor, count: int, temperatures_B: Tensor) -> Tensor:
    """[B, P + count] prompts with what a Transformers model writes after them; temperature 0 is greedy.

    Nothing ends a text: training and speculation go on past the end-of-text token as the demo's corpus does.
    """
    tokens, current, cache = [prompts_BP], prompts_BP, None
    scale = temperatures_B.clamp(min=1e-3)[:, None]
    for _ in range(count):
        out = model(input_ids=current, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        drawn = torch.multinomial(torch.softmax(logits / scale, -1), 1)
        current = torch.where(temperatures_B[:, None] > 0, drawn, logits.argmax(-1, keepdim=True))
        tokens.append(current)
    return torch.cat(tokens, 1)


class TrainingText:
    """Batches of token rows on a device: pieces of the stream and continuations in turns.

    stream: [N] int64. written: [G, L] int64 continuations; batches of them have L columns.
    """

    def __init__(self, stream: Tensor, written: Tensor, device: torch.device, seed: int = 0) -> None:
        self.stream, self.written = stream.to(device, torch.int32), written.to(device, torch.int32)
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._turn = 0

    def batch(self, tokens: int, context: int) -> Tensor:
        """[B, T] int64 of about `tokens` tokens; T is `context` or the length of the continuations."""
        self._turn += 1
        if self._turn % 2:
            context = min(context, self.stream.numel())
            starts = self._random(self.stream.numel() - context + 1, max(1, tokens // context))
            rows = self.stream[starts[:, None] + torch.arange(context, device=self._device)]
        else:
            rows = self.written[self._random(self.written.shape[0], max(1, tokens // self.written.shape[1]))]
        return rows.long()

    def frequent(self, count: int, vocab_size: int) -> Tensor:
        """[count] int64 the most frequent tokens of both kinds of text, ascending."""
        counts = torch.zeros(vocab_size, dtype=torch.float64, device=self._device)
        for text in (self.stream, self.written):
            found = torch.bincount(text.flatten().long(), minlength=vocab_size).double()
            counts += found / found.sum()
        return counts.topk(count).indices.sort().values

    def _random(self, limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), generator=self._generator, device=self._device)
