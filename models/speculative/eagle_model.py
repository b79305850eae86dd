"""EAGLE's draft layer as a model to compile: its checkpoint, with the target's embeddings where it has none of its own.

    EagleModel.read(directory, ...)  ->  camshaft.compile(..., hidden_layers=(1,))  ->  Engine

The engine takes hidden states [T, H] beside token ids, gives logits over the draft's vocabulary and, as hidden state 1, what the
next row takes in its turn. `fc` stays outside: it runs on captured hidden states of the target alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...graph.weights import Weight
from .. import attention
from .eagle import EagleDraft, read_eagle

if TYPE_CHECKING:
    from ..huggingface import ModelSource


@dataclass(frozen=True)
class EagleModel:
    """A draft layer to compile. draft: its network. embeddings: the target's, where the draft has none. name: for documents."""

    draft: EagleDraft
    embeddings: Weight | None
    name: str

    @classmethod
    def read(cls, directory: Path, embeddings: Weight, target: str) -> EagleModel:
        """From a checkpoint; `embeddings` [V, H] are those of `target`. Raises ValueError where the two do not go together."""
        draft = read_eagle(directory)
        vocab_size, hidden_size = embeddings.shape
        config = draft.config
        if config.vocab_size != vocab_size:
            raise ValueError(
                f"the EAGLE checkpoint {directory} is for a vocabulary of {config.vocab_size} tokens, and {target} has "
                f"{vocab_size}; give one that was trained for this target"
            )
        own = not draft.embed_tokens.weight.is_meta
        if not own and config.hidden_size != hidden_size:
            raise ValueError(
                f"the EAGLE checkpoint {directory} has a hidden size of {config.hidden_size} and no embed_tokens, and {target} has "
                f"embeddings of {hidden_size}; give one that was trained for this target"
            )
        return cls(draft, None if own else embeddings, directory.name)

    def open(self, dtype: torch.dtype) -> ModelSource:
        """The layer on the meta device, and its weights in `dtype`."""
        from ..huggingface import ModelSource

        config: Any = self.draft.config
        weights = {
            name: Weight.from_tensor(value).cast(dtype)
            for name, value in self.draft.state_dict().items()
            if value.is_floating_point() and not value.is_meta
        }
        if self.embeddings is not None:
            weights["embed_tokens.weight"] = self.embeddings.cast(dtype)
        weights = {_in_list(name): weight for name, weight in weights.items() if name != "fc.weight"}
        rows = _DraftRows(self.draft, dtype)
        info = {
            "architecture": type(self.draft).__name__,
            "model_type": "eagle3",
            "vocab_size": config.draft_vocab_size,
            "config": config.to_diff_dict(),
        }
        return ModelSource(
            name=f"{self.name} (EAGLE-3)", model=rows, weights={n: w.named(n) for n, w in weights.items()}, config=config,
            eos_token_ids=(), max_positions=None, tokenizer_dir=None, info=info, hidden_input=config.hidden_size,
        )  # fmt: skip


def _in_list(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


class _DraftRows(nn.Module):
    """The layer on one packed row, on the meta device: tokens and positions [1, T], hidden [1, T, H] -> logits [1, T, V'].

    The layer stands in a list, as those of other decoders do, for passes that look for layers.
    """

    def __init__(self, draft: EagleDraft, dtype: torch.dtype) -> None:
        super().__init__()
        config = draft.config
        with torch.device("meta"):
            fresh = EagleDraft(config, config.hidden_size).to(dtype)
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = attention.NAME
        self.embed_tokens, self.norm, self.lm_head = fresh.embed_tokens, fresh.norm, fresh.lm_head
        self.layers = nn.ModuleList([fresh.midlayer])
        self.rotary_emb = type(draft.rotary_emb)(config)
        self.requires_grad_(False).eval()

    def forward(self, token_ids: Tensor, position_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits of every row."""
        embedded = self.embed_tokens(token_ids)
        rotary = self.rotary_emb(hidden, position_ids)
        logits: Tensor = self.lm_head(self.norm(self.layers[0](embedded, hidden, rotary, _attend)))
        return logits


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[1, heads, T, D] -> [1, T, heads, D], causal."""
    out: Tensor = torch.ops.camshaft.attention(q, k, v, None, None, None, q.shape[-1] ** -0.5, 0, 0.0)
    return out
