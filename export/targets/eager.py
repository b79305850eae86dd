"""eager: runs a segment's graph operator by operator in PyTorch. The oracle of all other targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from ...graph import ops
from ..segment import Segment
from .base import Bound, Built, LowerRequest, Workers


class _EagerSegment:
    def __init__(self, segment: Segment, device: torch.device) -> None:
        self._module = segment.graph_module(device)
        for node in self._module.graph.nodes:  # called directly, an operator's definition costs no dispatch
            node.target = ops.DEFINITIONS.get(node.target, node.target) if node.op == "call_function" else node.target
        self._module.recompile()

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        forward = self._module.forward
        bound = tuple(weights)
        return lambda *inputs: forward(*inputs, *bound)


class EagerTarget:
    """Plain PyTorch on any device."""

    name = "eager"
    extension = ""
    fixed_sizes = False

    def fewest_tokens(self, device: torch.device) -> int:
        return 1

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__)}

    def supports(self, node: fx.Node) -> bool:
        return True

    def workers(self, device: torch.device) -> Workers | None:
        return None

    def lower(self, segment: Segment, request: LowerRequest) -> Built:
        return Built(b"")

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> _EagerSegment:
        return _EagerSegment(segment, device)
