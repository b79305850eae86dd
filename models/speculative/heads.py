"""Medusa's heads (Cai et al. 2024, section 2.1): tokens further ahead, guessed from the last hidden state alone.

    h   [N, H]  last hidden state behind the final norm; the model's own head reads token t + 1 off it
    h_k = (h + silu(linear h)), once per layer           head k = 0, 1 ...
    logits of token t + 2 + k = lm_head_k h_k            [N, V]

Checkpoints are those of the Medusa project: `medusa_lm_head.safetensors` (or .pt) with `{k}.{layer}.linear.weight`, `.bias` and
`{k}.{layers}.weight`, and medusa_num_heads and medusa_num_layers in config.json. With "original_lm_head": true all heads
share one lm_head, that of head 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import check_tensors, read_config, read_tensors, write_checkpoint

FILE = "medusa_lm_head.safetensors"
_PREFIXES = ("medusa_head.", "medusa_heads.")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Sizes of a set of heads."""

    num_heads: int
    """Tokens that are guessed."""
    num_layers: int
    """Residual blocks of each head."""
    hidden_size: int
    vocab_size: int
    shared_head: bool = False
    """Whether all heads share the lm_head of head 0."""


class ResidualBlock(nn.Module):
    """x + silu(linear x); the identity when it is made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        return x + nn.functional.silu(self.linear(x))


class MedusaHeads(nn.ModuleList):
    """All heads; its state dict has the names of published checkpoints."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        shared: nn.Linear | None = None
        for _ in range(config.num_heads):
            last = shared or nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            shared = last if config.shared_head else None
            self.append(nn.Sequential(*(ResidualBlock(config.hidden_size) for _ in range(config.num_layers)), last))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] -> logits [N, heads, V]."""
        if self.config.shared_head:
            blocks = torch.stack([head[:-1](hidden) for head in self], dim=1)  # type: ignore[index]
            return self[0][-1](blocks)  # type: ignore[index]
        return torch.stack([head(hidden) for head in self], dim=1)


def read_heads(directory: Path) -> MedusaHeads:
    """The heads of a checkpoint, on the CPU in the dtype in which they are stored.

    Raises ValueError for a config without medusa_num_heads and medusa_num_layers, and for tensors that do not go with it.
    """
    facts = read_config(directory)
    tensors = {_bare(name): value for name, value in read_tensors(directory).items()}
    counts = {}
    for field in ("medusa_num_heads", "medusa_num_layers"):
        value = facts.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{directory}/config.json: {field} is {value!r}; allowed: integers >= 1, as Medusa writes it"
            )
        counts[field] = value
    num_heads, num_layers = counts.values()
    shared = bool(facts.get("original_lm_head", False))
    last = f"0.{num_layers}.weight"
    if last not in tensors or tensors[last].dim() != 2:
        raise ValueError(
            f"{directory} lacks {last!r}, the lm_head of head 0 behind medusa_num_layers={num_layers} residual blocks; give a "
            "checkpoint that goes with its config.json"
        )
    vocab_size, hidden_size = tensors[last].shape
    config = HeadsConfig(
        num_heads=num_heads, num_layers=num_layers, hidden_size=hidden_size, vocab_size=vocab_size, shared_head=shared
    )
    with torch.device("meta"):
        heads = MedusaHeads(config)
    if shared:
        tensors |= {f"{k}.{num_layers}.weight": tensors[last] for k in range(num_heads)}
    expected = {name: tuple(value.shape) for name, value in heads.state_dict().items()}
    check_tensors(directory, tensors, expected)
    heads.load_state_dict({name: tensors[name] for name in expected}, assign=True)
    return heads.requires_grad_(False).eval()


def _bare(name: str) -> str:
    """A tensor's name within the list of heads: some checkpoints name the list, too."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def write_heads(heads: MedusaHeads, directory: Path, **facts: Any) -> None:
    """Writes a checkpoint that `read_heads` and other servers read. facts: further fields of config.json."""
    config = heads.config
    tensors = dict(heads.state_dict())
    if config.shared_head:
        for k in range(1, config.num_heads):
            del tensors[f"{k}.{config.num_layers}.weight"]
    fields = {
        "model_type": "medusa",
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "original_lm_head": config.shared_head,
    }
    write_checkpoint(directory, FILE, {**fields, **facts}, tensors)
