"""fuse_glu: gates on joined projections, and on the chunks of one (Phi-3)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from camshaft.passes.fuse_glu import GLU, FuseGlu
from camshaft.passes.fuse_projections import FuseProjections
from graph_cases import check, rows
from torch import Tensor, nn

TOLERANCE = 1e-5  # fp32, another order of sums

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Separate(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.activation = nn.Linear(8, 6), nn.Linear(8, 6), ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.gate(x)) * self.up(x)


class Chunked(nn.Module):
    """Phi-3: up * silu(gate) of the chunks of one projection."""

    def __init__(self, swap: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.gate_up, self.swap, self.axis = nn.Linear(8, 12), swap, axis

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=self.axis)
        gate, up = (up, gate) if self.swap else (gate, up)
        return up * F.silu(gate)


class Thirds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b, _ = x.chunk(3, dim=-1)
        return F.silu(a) * b


class Uneven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split([1, 11], dim=-1)
        return F.silu(a) * b


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_separate(activation: str) -> None:
    program = check(
        FuseGlu(), Separate(activation), rows(8), matches=1, before=[FuseProjections()], tolerance=TOLERANCE
    )
    (node,) = [n for n in program.graph.nodes if n.target == GLU]
    assert node.args[1] == activation


def test_chunked() -> None:
    check(FuseGlu(), Chunked(), rows(8), matches=1)


def test_separate_projections_are_left() -> None:
    check(FuseGlu(), Separate("silu"), rows(8), matches=0)


def test_second_half_as_gate_is_left() -> None:
    check(FuseGlu(), Chunked(swap=True), rows(8), matches=0)


@pytest.mark.parametrize("form", [Thirds, Uneven])
def test_near_misses(form: type[nn.Module]) -> None:
    check(FuseGlu(), form(), rows(12), matches=0)


def test_chunks_of_rows_are_left() -> None:
    check(FuseGlu(), Chunked(axis=0), lambda size: (torch.randn(2, size, 8),), matches=0)
