"""fuse_norm_quantize: norms that only quantized layers read, with and without a residual sum, and those that stay."""

from __future__ import annotations

import pytest
import torch
from camshaft.passes import quantize_fp8
from camshaft.passes.fuse_add_norm import ADD_RMS_NORM, FuseAddNorm
from camshaft.passes.fuse_norm_quantize import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE, FuseNormQuantize
from camshaft.passes.match_rms_norm import RMS_NORM, MatchRmsNorm
from camshaft.passes.normalize import Normalize
from camshaft.passes.quantization.recipe import Recipe
from camshaft.passes.quantize_fp8 import QUANTIZE_ROWS
from camshaft.passes.quantize_linear import QuantizeLinear
from graph_cases import LlamaNorm, captured, check, rows, run
from torch import Tensor, nn

BEFORE = [MatchRmsNorm(), FuseAddNorm(), QuantizeLinear(Recipe.named("fp8"))]
TOLERANCE = 0.3  # of fp8 products; the fusion itself is exact


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
    torch.manual_seed(0)


class Layer(nn.Module):
    """A norm in front of two layers; residual: of a sum, which is returned too; leaks: the norm is returned too."""

    def __init__(self, *, residual: bool = False, leaks: bool = False) -> None:
        super().__init__()
        self.norm, self.a, self.b = LlamaNorm(32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.residual, self.leaks = residual, leaks

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x + x.abs() if self.residual else x
        normed = self.norm(total)
        extra = ([total] if self.residual else []) + ([normed] if self.leaks else [])
        return self.a(normed), self.b(normed), *extra


@pytest.mark.parametrize("residual", [False, True])
def test_joined(residual: bool) -> None:
    module = Layer(residual=residual)
    program = check(FuseNormQuantize(), module, rows(32), matches=1, before=BEFORE, tolerance=TOLERANCE)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(ADD_RMS_NORM_QUANTIZE if residual else RMS_NORM_QUANTIZE) == 1
    assert not {QUANTIZE_ROWS, RMS_NORM, ADD_RMS_NORM} & set(targets)


def test_exactly_what_it_was() -> None:
    program = captured(Layer(residual=True), rows(32))
    for step in (Normalize(), *BEFORE):
        program = step(program).program
    after = FuseNormQuantize()(program).program
    inputs = (torch.randn(1, 9, 32),)
    for a, b in zip(run(program, inputs), run(after, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_that_is_read_elsewhere_stays(residual: bool) -> None:
    module = Layer(residual=residual, leaks=True)
    check(FuseNormQuantize(), module, rows(32), matches=0, before=BEFORE, tolerance=TOLERANCE)


def test_no_norm() -> None:
    check(
        FuseNormQuantize(),
        nn.Linear(32, 16),
        rows(32),
        matches=0,
        before=[QuantizeLinear(Recipe.named("fp8"))],
        tolerance=TOLERANCE,
    )
