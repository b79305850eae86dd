"""fuse_projections: linear layers of the same rows are joined; routers, shared weights and mixed biases are not."""

from __future__ import annotations

import pytest
import torch
from camshaft.passes.fuse_projections import FuseProjections
from graph_cases import check, rows
from torch import Tensor, nn

TOLERANCE = 1e-5  # fp32, another order of sums


class Qkv(nn.Module):
    def __init__(self, bias: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n, bias=b) for n, b in zip((8, 4, 4), bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x).float().softmax(-1), self.up(x)


class Tied(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x) + self.gate.weight.sum() + self.up.weight.sum()


class Apart(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x + 1)


@pytest.mark.parametrize("bias", [True, False])
def test_joins(bias: bool) -> None:
    module = Qkv((bias,) * 3)
    program = check(FuseProjections(), module, rows(8), matches=1, tolerance=TOLERANCE)
    assert program.count(torch.ops.aten.linear.default) == 1
    joined = program.weights[
        "q.weight+k.weight+v.weight" if "q.weight+k.weight+v.weight" in program.weights else "q.weight+k+v"
    ]
    assert torch.equal(joined.load(), torch.cat([module.q.weight, module.k.weight, module.v.weight]).detach())
    assert joined.recipe == {"concatenate": [{"source": f"{n}.weight"} for n in "qkv"], "dim": 0}
    assert len(program.weights) == 1 + bias


def test_mixed_biases_join_apart() -> None:
    program = check(FuseProjections(), Qkv((True, False, True)), rows(8), matches=1, tolerance=TOLERANCE)
    assert program.count(torch.ops.aten.linear.default) == 2


@pytest.mark.parametrize("form", [Router, Tied, Apart])
def test_near_misses(form: type[nn.Module]) -> None:
    check(FuseProjections(), form(), rows(8), matches=0)
