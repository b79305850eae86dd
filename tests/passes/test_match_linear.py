"""match_linear: GPT-2's Conv1D, Falcon's matmul with a transposed weight, and linear as AOTAutograd writes it."""

from __future__ import annotations

import pytest
import torch
from camshaft.passes.match_linear import MatchLinear
from graph_cases import check, rows
from torch import Tensor, nn

aten = torch.ops.aten
TOLERANCE = 1e-5  # fp32, another order of sums


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(1, -1, 12)


class Shared(Conv1D):
    """The matrix has another user, so it keeps its form."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.sum()


class Scaled(Conv1D):
    """addmm with a factor is no linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x[0], self.weight, alpha=0.5)


class Falcon(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Flat(Falcon):
    """linear as AOTAutograd writes it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 8)
        y = torch.addmm(self.bias, flat, self.weight.t()) if self.bias is not None else torch.mm(flat, self.weight.t())
        return y.view(1, x.shape[1], 12)


class Activations(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2)


@pytest.mark.parametrize(
    "module", [Conv1D(), Falcon(True), Falcon(False), Flat(True), Flat(False)], ids=lambda m: type(m).__name__
)
def test_becomes_linear(module: nn.Module) -> None:
    program = check(MatchLinear(), module, rows(8), matches=1, tolerance=TOLERANCE)
    (node,) = [n for n in program.graph.nodes if n.target == aten.linear.default]
    assert list(node.args[1].meta["val"].shape) == [12, 8]
    assert len(node.args) == 2 or node.args[2] is None or list(node.args[2].meta["val"].shape) == [12]


def test_flattened_rows_are_kept() -> None:
    program = check(MatchLinear(), Flat(True), rows(8), matches=1, tolerance=TOLERANCE)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [aten.linear.default]


def test_conv1d_weight_is_transposed_in_the_map() -> None:
    module = Conv1D()
    program = check(MatchLinear(), module, rows(8), matches=1, tolerance=TOLERANCE)
    assert torch.equal(program.weights["weight.T"].load(), module.weight.detach().t())
    assert program.weights["weight.T"].recipe == {"transpose": {"source": "weight"}}


@pytest.mark.parametrize(
    "module", [Shared(), Scaled(), Activations(), nn.Linear(8, 12)], ids=lambda m: type(m).__name__
)
def test_near_misses(module: nn.Module) -> None:
    check(MatchLinear(), module, rows(8), matches=0)
