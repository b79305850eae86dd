"""A tiny random model with a tokenizer, and its log-likelihoods by Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..small_tokenizers import CHATML, byte_level, save

LIMITS: dict[str, Any] = {
    "target": "eager", "device": "cpu", "max_seq_len": 64, "max_batch_tokens": 48, "max_sequences": 4, "block_size": 4,
}  # fmt: skip


def make_model(path: Path) -> Any:
    """Saves a random two-layer Llama with a byte-level tokenizer, and returns it."""
    config = transformers.LlamaConfig(
        vocab_size=340, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    made.save_pretrained(path)
    save(byte_level(), path, chat_template=CHATML)
    return made


def log_likelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Of a continuation, and whether it is the greedy one."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0].double()
    rows = logits[len(context) - 1 : -1].log_softmax(-1)
    targets = torch.tensor(list(continuation))
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())
