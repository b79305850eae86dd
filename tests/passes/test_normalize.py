"""normalize: no-ops go, views become reshapes, equal nodes merge; everything else stays."""

from __future__ import annotations

import torch
from camshaft.passes.normalize import Normalize
from graph_cases import captured, check, rows, run
from torch import Tensor, nn

aten = torch.ops.aten


class NoOps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous().clone().to(x.dtype)
        x = x.transpose(1, 2).transpose(1, 2) * 1
        x = x[:, :, 0:] + 0
        return x.view(1, x.shape[1], 2, -1).sum(-1)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).exp() + x.unsqueeze(1).exp()


class TypeAs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.float().exp().type_as(y) + y.type_as(x)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) * 2 + x[:, 1:].sum()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x) - torch.rand_like(x)


def test_removes_no_ops() -> None:
    program = Normalize()(captured(NoOps(), rows(6))).program
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        aten.reshape.default,
        aten.sum.dim_IntList,
    ]
    check(Normalize(), NoOps(), rows(6), matches=0)


def test_merges_equal_nodes() -> None:
    program = Normalize()(captured(Twice(), rows(6))).program
    assert program.count(aten.exp.default) == program.count(aten.unsqueeze.default) == 1
    check(Normalize(), Twice(), rows(6), matches=0)


def test_type_as_becomes_a_cast() -> None:
    def inputs(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, size, 6).bfloat16(), torch.randn(1, size, 6).bfloat16()

    program = check(Normalize(), TypeAs(), inputs, matches=0)
    assert program.count(aten.type_as.default) == 0
    assert program.count(aten._to_copy.default) == 2


def test_leaves_the_rest() -> None:
    assert Normalize()(captured(Nothing(), rows(6))).num_matches == 0


def test_random_numbers_are_not_merged() -> None:
    program = Normalize()(captured(Noise(), rows(6))).program
    assert run(program, (torch.zeros(1, 8, 6),))[0].abs().max() > 0
