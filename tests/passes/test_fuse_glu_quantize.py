"""fuse_glu_quantize: a gate in front of a quantized layer, and one that is read elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from camshaft.passes import quantize_fp8
from camshaft.passes.fuse_glu import GLU, FuseGlu
from camshaft.passes.fuse_glu_quantize import GLU_QUANTIZE, FuseGluQuantize
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.quantize_fp8 import QUANTIZE_ROWS
from camshaft.passes.quantize_linear import QuantizeLinear
from graph_cases import check, rows
from torch import Tensor, nn

BEFORE = [FuseGlu(), QuantizeLinear(Recipe.named("fp8"))]
TOLERANCE = 0.15  # of fp8 products; the fusion itself is exact


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
    torch.manual_seed(0)


class Mlp(nn.Module):
    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.gate_up, self.down, self.leaks = nn.Linear(32, 64), nn.Linear(32, 16), leaks

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        return (self.down(hidden), hidden) if self.leaks else (self.down(hidden),)


def test_joined() -> None:
    program = check(FuseGluQuantize(), Mlp(), rows(32), matches=1, before=BEFORE, tolerance=TOLERANCE)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(GLU_QUANTIZE) == 1 and GLU not in targets and targets.count(QUANTIZE_ROWS) == 1


def test_a_gate_that_is_read_elsewhere_stays() -> None:
    check(FuseGluQuantize(), Mlp(leaks=True), rows(32), matches=0, before=BEFORE, tolerance=TOLERANCE)


def test_no_gate() -> None:
    check(
        FuseGluQuantize(),
        nn.Linear(32, 16),
        rows(32),
        matches=0,
        before=[QuantizeLinear(Recipe.named("fp8"))],
        tolerance=TOLERANCE,
    )
