"""fuse_add_norm: a residual sum and its norm; a sum that broadcasts, or with a factor, stays."""

from __future__ import annotations

import pytest
import torch
from camshaft.passes.fuse_add_norm import ADD_RMS_NORM, FuseAddNorm
from camshaft.passes.match_rms_norm import MatchRmsNorm
from graph_cases import LlamaNorm, check
from torch import Tensor, nn


def _two(dtype: torch.dtype):
    return lambda size: (torch.randn(1, size, 8).to(dtype), torch.randn(1, size, 8).to(dtype))


class Residual(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = LlamaNorm(8, dtype)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return self.norm(total), total * 2


class Factor(Residual):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.add(residual, x, alpha=2)
        return self.norm(total), total


class Broadcast(Residual):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(x + residual[:, :1])


class Mixed(Residual):
    """Summands of two dtypes."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(x.double().float().bfloat16() + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fuses(dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    program = check(
        FuseAddNorm(), Residual(dtype), _two(dtype), matches=1, before=[MatchRmsNorm()], tolerance=tolerance
    )
    assert program.count(ADD_RMS_NORM) == 1
    assert program.count(torch.ops.aten.add.Tensor) == 0


@pytest.mark.parametrize("form", [Factor, Broadcast, Mixed])
def test_near_misses(form: type[nn.Module]) -> None:
    check(FuseAddNorm(), form(), _two(torch.float32), matches=0, before=[MatchRmsNorm()], tolerance=1e-6)
