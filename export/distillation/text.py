"""What a student learns from: rows of a text, rows that the teacher wrote itself, and the end of the text for validation.

    text            [r0 r1 r2 ... rn | v0 v1 ...]       rows of `context` tokens; the last share is never learnt from
    the teacher's   [s0 s1 s2 ... sm | w0 w1 ...]       pieces of r's, continued (Liu et al. 2023, LLM-QAT, section 3.1)

Without a text the teacher writes everything, from a random token on, as LLM-QAT has it, the rows for validation among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.speculative.text import continuations
from .settings import DistillationSettings

_ROWS_AT_ONCE = {"cpu": 128, "cuda": 4096}
"""Rows that the teacher writes together, at most."""
_CACHE_BYTES = 8 << 30
"""Of keys and values that the rows which it writes together may take."""

Tell = Callable[[int, int], None]
"""(done, total)."""


@dataclass(frozen=True)
class Rows:
    """Rows of token ids on the CPU, int64. train: [R, context]. validation: [V, context]."""

    train: Tensor
    validation: Tensor

    def batches(self, batch_rows: int, steps: int, seed: int) -> Iterator[Tensor]:
        """[batch_rows, context] for each step: all rows in a random order, then in another one, and so on."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while order.numel() < batch_rows:
                order = torch.cat([order, torch.randperm(self.train.shape[0], generator=generator)])
            yield self.train[order[:batch_rows]]
            order = order[batch_rows:]

    def joined(self, written: Tensor, settings: DistillationSettings) -> Rows:
        """With rows that the teacher wrote [G, context]: their last share is for validation, as far as there is room."""
        held = round(settings.validation * written.shape[0])
        cut = written.shape[0] - held
        most = max(1, settings.validation_tokens // settings.context)
        return Rows(torch.cat([self.train, written[:cut]]), torch.cat([self.validation, written[cut:]])[:most])


def cut_rows(sequences: Sequence[Sequence[int]], context: int) -> Tensor:
    """[R, context] int64: the sequences one after the other, cut; what is left over at the end is dropped."""
    joined = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return joined[: joined.numel() // context * context].view(-1, context)


def split_rows(rows: Tensor, settings: DistillationSettings) -> Rows:
    """The last share of the rows for validation. Raises ValueError for too little text."""
    held = max(1, round(settings.validation * rows.shape[0]))
    if rows.shape[0] < 4:
        raise ValueError(
            f"distillation has {rows.numel()} tokens in rows of {settings.context} and needs at least {4 * settings.context}; give "
            "more text, of the kind that the model will see, or none: then the model writes what it learns from itself"
        )
    most = max(1, settings.validation_tokens // settings.context)
    return Rows(rows[:-held], rows[-held:][:most])


def write_rows(
    model: Any, prompts: Tensor | None, count: int, settings: DistillationSettings, tell: Tell | None = None
) -> Tensor:
    """[count, context] int64 rows that a Transformers model writes.

    prompts: [R, at least prompt_tokens] int64 rows whose beginnings are continued, a random one each; None: a random token is.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed + 1)
    if prompts is None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        begun = torch.randint(vocabulary, (count, 1), generator=generator)
    else:
        begun = _pieces(prompts, count, settings.prompt_tokens, generator)
    step = _rows_at_once(model, settings.context)
    written = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed + 2)
        for begin in range(0, count, step):
            if tell is not None:
                tell(begin, count)
            piece = begun[begin : begin + step].to(device)
            heat = torch.full((piece.shape[0],), settings.temperature, device=device)
            written.append(continuations(model, piece, settings.context - piece.shape[1], heat).cpu())
    return torch.cat(written) if written else torch.empty((0, settings.context), dtype=torch.int64)


def _rows_at_once(model: Any, context: int) -> int:
    """As many as their keys and values have room for; a number that the model and the kind of device decide alone."""
    config, parameter = model.config.get_text_config(), next(model.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads * heads * config.num_hidden_layers
    room = _CACHE_BYTES // (2 * parameter.element_size() * width * context)
    return max(1, min(_ROWS_AT_ONCE[parameter.device.type], room))


def _pieces(rows: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length] random pieces of rows."""
    which = torch.randint(rows.shape[0], (count,), generator=generator)
    start = torch.randint(rows.shape[1] - length + 1, (count,), generator=generator)
    return rows[which[:, None], start[:, None] + torch.arange(length)]
