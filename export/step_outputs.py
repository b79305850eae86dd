"""What a step of an engine returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepOutputs(NamedTuple):
    """Results of a step of T tokens and R rows of logits, on the engine's device."""

    logits: Tensor
    """[R, V] in the dtype in which the model computes them, [R, 0] of a graph without a head; those of a captured step are
    overwritten by the next one."""
    hidden: Tensor | None = None
    """[T, L, H] hidden states of all rows, in the order of the build's `hidden_layers`; None where it has none. The caller's own:
    later steps do not write to it."""


class GraphPool:
    """The memory that CUDA graphs share which run one after another; made with the first of them."""

    def __init__(self) -> None:
        self._handle: Any = None

    def handle(self) -> Any:
        """What `torch.cuda.graph` takes as a pool."""
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        return self._handle

    def clear(self) -> None:
        """The graphs are gone, and their pool with them: the next one begins another."""
        self._handle = None


def stack_hidden(states: Sequence[Tensor], num_tokens: int) -> Tensor | None:
    """[num_tokens, L, H] of L hidden states [1, T, H], T >= num_tokens; None for none."""
    return torch.stack([state[0, :num_tokens] for state in states], dim=1) if states else None
