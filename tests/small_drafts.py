"""A tiny target with heads, an EAGLE layer and an early exit of random weights, as checkpoints on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from camshaft.models.speculative.eagle import EagleDraft, write_eagle
from camshaft.models.speculative.heads import HeadsConfig, MedusaHeads, write_heads
from families import random_model, tiny_config

CAPTURE = (1, 2)
"""After how many of the tiny target's three layers the tiny EAGLE layer reads hidden states."""


def tiny_target(vocab_size: int, seed: int = 0) -> Any:
    """A Llama of three layers, 64 wide."""
    config = tiny_config("llama")
    config.vocab_size, config.num_hidden_layers, config.layer_types = vocab_size, 3, None
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    return random_model(config, seed)


def randomize(module: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    """Every float parameter gets a random value around what it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5


def tiny_heads(target: Any, num_heads: int = 3, num_layers: int = 2, *, shared: bool = False) -> MedusaHeads:
    """Heads for a target."""
    config = HeadsConfig(
        num_heads=num_heads, num_layers=num_layers, hidden_size=target.config.hidden_size,
        vocab_size=target.config.vocab_size, shared_head=shared,
    )  # fmt: skip
    heads = MedusaHeads(config)
    randomize(heads, 5)
    return heads


def tiny_eagle(target: Any, draft_vocab: int, capture: tuple[int, ...] = CAPTURE) -> EagleDraft:
    """An EAGLE layer for a target that drafts every token but the first `vocab - draft_vocab`."""
    from transformers import LlamaConfig

    size = target.config.hidden_size
    make: Any = LlamaConfig
    config = make(
        hidden_size=size, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=1, vocab_size=target.config.vocab_size, draft_vocab_size=draft_vocab, rms_norm_eps=1e-5,
        max_position_embeddings=256, eagle_config={"eagle_aux_hidden_state_layer_ids": list(capture)},
    )  # fmt: skip
    torch.manual_seed(1)
    draft = EagleDraft(config, len(capture) * size)
    randomize(draft, 6)
    skipped = config.vocab_size - draft_vocab
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    draft.d2t.fill_(skipped)
    draft.t2d[skipped:] = True
    return draft.requires_grad_(False).eval()


def write_drafts(target: Any, directory: Path, draft_vocab: int) -> tuple[Path, Path]:
    """(directory of the heads, directory of the EAGLE layer)"""
    write_heads(tiny_heads(target), directory / "heads")
    write_eagle(tiny_eagle(target, draft_vocab), directory / "eagle")
    return directory / "heads", directory / "eagle"
