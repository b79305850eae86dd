"""resolve_masks: named masks become windows of attention."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph import ops as _ops  # noqa: F401
from camshaft.graph.capture import CaptureError
from camshaft.graph.ops import dense_attention
from camshaft.passes.resolve_masks import ATTENTION, ResolveMasks
from graph_cases import captured, check, heads, rows
from torch import Tensor, nn


class Masked(nn.Module):
    def __init__(self, kind: str, size: int, window: int) -> None:
        super().__init__()
        self.kind, self.size, self.window = kind, size, window

    def forward(self, x: Tensor) -> Tensor:
        q = heads(x, 2)
        mask = torch.ops.camshaft.mask(x, self.kind, self.size)[:, :, :, : x.shape[1]]
        return torch.ops.camshaft.attention(q, q, q, mask, None, None, 0.5, self.window, 0.0)


@pytest.mark.parametrize(
    ("kind", "size", "given", "window"),
    [("causal", 0, 0, 0), ("sliding", 5, 0, 5), ("sliding", 5, 3, 3), ("causal", 0, 4, 4)],
)
def test_mask_becomes_window(kind: str, size: int, given: int, window: int) -> None:
    program = captured(Masked(kind, size, given), rows(8))
    result = ResolveMasks()(program)
    assert result.num_matches == 1
    (node,) = [n for n in result.program.graph.nodes if n.target == ATTENTION]
    assert (node.args[3], node.args[7]) == (None, window)
    assert result.program.count(torch.ops.camshaft.mask.default) == 0


def test_output_and_idempotence() -> None:
    class Reference(Masked):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                return super().forward(x)
            q = heads(x, 2)
            return dense_attention(q, q, q, None, None, 0.5, 5, 0.0)

    check(ResolveMasks(), Reference("sliding", 5, 0), rows(8), matches=1, tolerance=1e-6)  # fp32, another order of sums


def test_other_masks_are_refused() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = heads(x, 2)
            return torch.ops.camshaft.attention(q, q, q, mask, None, None, 0.5, 0, 0.0)

    program = captured(Other(), lambda size: (torch.randn(1, size, 8), torch.zeros(1, 1, size, size)))
    with pytest.raises(CaptureError, match="supported: causal, sliding window"):
        ResolveMasks()(program)


def test_no_attention_no_match() -> None:
    check(ResolveMasks(), nn.Linear(4, 4), lambda size: (torch.randn(size, 4),), matches=0)
