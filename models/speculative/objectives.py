"""What is minimised for each method, and which of its drafts hit.

    tokens  t0 t1 t2 t3 ...      the target's distribution p_i says what follows t_i
    heads   from the last hidden state at i: head k against p_(i+1+k)
    eagle   unrolled (Li et al. 2025, section 3.2, training-time test): step j reads what step j - 1 left at a row, against p_(i+j)
    exit    from the hidden state behind layer n: against p_i

All losses are cross-entropy to the target's distribution, later tokens weighted by DECAY each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .eagle import EagleDraft, write_eagle
from .exit import ExitHead, write_exit
from .heads import MedusaHeads, write_heads

DECAY = 0.8
"""Weight of a draft's loss by that of the draft before it (Cai et al. 2024, section 2.2.1)."""


@dataclass(frozen=True, slots=True)
class Features:
    """What the target makes of a batch."""

    tokens: Tensor
    """[B, T] int64"""
    captured: Tensor
    """[B, T, layers H] hidden states of the captured layers."""
    last: Tensor
    """[B, T, H] behind the final norm."""
    probabilities: Tensor
    """[B, T, V] of the next token."""


class Target:
    """The frozen Transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.num_layers = int(model.config.num_hidden_layers)

    @torch.no_grad()
    def features(self, tokens: Tensor, layers: tuple[int, ...]) -> Features:
        """layers: after how many layers hidden states are captured, below the number of layers."""
        out = self.model.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        last = out.last_hidden_state
        captured = torch.cat([out.hidden_states[n] for n in layers], -1)
        return Features(tokens, captured, last, torch.softmax(self.model.lm_head(last).float(), -1))


class Objective(Protocol):
    """One method's training."""

    layers: tuple[int, ...]
    """Hidden states that it needs."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, features: Features) -> Tensor:
        """Mean loss in nats."""
        ...

    def hits(self, features: Features, num_drafts: int) -> Tensor:
        """[B, T, K] bool: after token i, whether greedy draft k is token i + 1 + k, those before it being right."""
        ...

    def save(self, directory: Path) -> None:
        """Writes the checkpoint."""
        ...


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over rows of -sum(p log q), in nats; `wanted` may be part of a distribution."""
    return -(wanted * functional.log_softmax(logits.float(), -1)).sum(-1).mean()


def _followed(tokens: Tensor, distance: int) -> Tensor:
    """[B, T] the token `distance` further on; -1 behind the end."""
    return functional.pad(tokens[:, distance:], (0, distance), value=-1)


class HeadsObjective:
    """Medusa's heads."""

    def __init__(self, heads: MedusaHeads) -> None:
        self.module = heads
        self.layers: tuple[int, ...] = (1,)

    def loss(self, features: Features) -> Tensor:
        """Weighted mean over the heads."""
        total = features.last.new_zeros(())
        for k, head in enumerate(self.module):
            logits = head(features.last[:, : -1 - k])
            total = total + DECAY**k * cross_entropy(logits, features.probabilities[:, 1 + k :])
        return total / sum(DECAY**k for k in range(len(self.module)))

    def hits(self, features: Features, num_drafts: int) -> Tensor:
        """Head k reads the hidden state in front of token i."""
        found = []
        for k, head in enumerate(list(self.module)[:num_drafts]):
            guessed = head(features.last).argmax(-1)
            found.append(functional.pad(guessed[:, :-1], (1, 0), value=-2) == _followed(features.tokens, 1 + k))
        return torch.stack(found, -1)

    def save(self, directory: Path) -> None:
        """medusa_lm_head.safetensors and config.json."""
        write_heads(self.module, directory)


class UnrolledAttention:
    """Attention of step j of an unrolled draft: row i sees the first step's rows up to i and row i of every later step."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, heads, T, D], k and v [B, kv_heads, T, D] -> [B, T, heads, D]"""
        groups, num_rows = q.shape[1] // k.shape[1], q.shape[2]
        self._keys.append(k.repeat_interleave(groups, 1))
        self._values.append(v.repeat_interleave(groups, 1))
        keys, values = torch.cat(self._keys, 2), torch.cat(self._values, 2)
        first = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).tril()
        later = torch.eye(num_rows, dtype=torch.bool, device=q.device)
        mask = torch.cat([first, *[later] * (len(self._keys) - 1)], 1)
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)


class EagleObjective:
    """EAGLE-3's layer.

    num_steps: drafts that training unrolls. unknown: share of the rows of a batch whose first hidden states are blanked out, as
    they are missing where a prompt's prefix comes out of the cache.
    """

    def __init__(
        self, draft: EagleDraft, layers: tuple[int, ...], *, num_steps: int = 5, unknown: float = 0.05
    ) -> None:
        self.module, self.layers = draft, layers
        self.num_steps, self.unknown = num_steps, unknown

    def unroll(self, features: Features, num_steps: int, *, blank: bool = False) -> list[Tensor]:
        """Logits [B, T, draft_vocab_size] of each step; row i of step j has seen tokens 0 .. i + j."""
        draft, tokens = self.module, features.tokens
        hidden = functional.pad(draft.fc(features.captured)[:, :-1], (0, 0, 1, 0))
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None].expand_as(tokens)
        if blank:
            lost = torch.rand(tokens.shape[0], 1, device=tokens.device)
            until = torch.where(lost < self.unknown, lost / max(self.unknown, 1e-9) * tokens.shape[1], -1)
            hidden = hidden * (positions >= until)[..., None]
        attend, logits = UnrolledAttention(), []
        for step in range(num_steps):
            guessed, hidden = draft(_followed(tokens, step).clamp(min=0), positions + step, hidden, attend)
            logits.append(guessed)
        return logits

    def loss(self, features: Features) -> Tensor:
        """Weighted mean over the steps, each to the target's distribution over the draft's vocabulary."""
        wanted = features.probabilities[..., self.module.draft_tokens]
        total = features.last.new_zeros(())
        for step, logits in enumerate(self.unroll(features, self.num_steps, blank=True)):
            rows = logits.shape[1] - step
            total = total + DECAY**step * cross_entropy(logits[:, :rows], wanted[:, step:])
        return total / sum(DECAY**step for step in range(self.num_steps))

    def hits(self, features: Features, num_drafts: int) -> Tensor:
        """Teacher forcing: later drafts read the tokens in front of them, and the draft's own hidden states."""
        found = []
        for step, logits in enumerate(self.unroll(features, num_drafts)):
            guessed = self.module.draft_tokens[logits.argmax(-1)]
            found.append(guessed == _followed(features.tokens, 1 + step))
        return torch.stack(found, -1)

    def save(self, directory: Path) -> None:
        """model.safetensors and config.json."""
        write_eagle(self.module, directory)


class ExitObjective:
    """Early exit: the target's own head behind a trained norm and adapter."""

    def __init__(self, head: ExitHead, lm_head: nn.Module) -> None:
        self.module = head
        self.layers: tuple[int, ...] = (head.layer,)
        self._lm_head = lm_head

    def _logits(self, features: Features) -> Tensor:
        return self._lm_head(self.module(features.captured))

    def loss(self, features: Features) -> Tensor:
        """To the target's distribution at the same row."""
        return cross_entropy(self._logits(features), features.probabilities)

    def hits(self, features: Features, num_drafts: int) -> Tensor:
        """The layers below are the target's own, so draft k is what the exit says k rows on."""
        hit = self._logits(features).argmax(-1) == _followed(features.tokens, 1)
        return torch.stack([functional.pad(hit[:, k:], (0, k)) for k in range(num_drafts)], -1)

    def save(self, directory: Path) -> None:
        """exit.safetensors and config.json."""
        write_exit(self.module, directory)
