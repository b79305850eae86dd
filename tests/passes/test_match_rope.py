"""match_rope: halves, interleaved, chunks and partial rotation, with the dtypes of the model."""

from __future__ import annotations

import pytest
import torch
from camshaft.passes.match_rope import ROPE, MatchRope
from graph_cases import SIZES, check, heads
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16]


def _inputs(rotated: int, dtype: torch.dtype):
    return lambda size: (
        torch.randn(1, size, 16).to(dtype),
        torch.randn(1, size, rotated).to(dtype),
        torch.randn(1, size, rotated).to(dtype),
    )


class Halves(nn.Module):
    def turn(self, x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-b, a), dim=-1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = heads(x, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return (x * cos) + (self.turn(x) * sin)


class Interleaved(Halves):
    def turn(self, x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


class Partial(Halves):
    """GLM, Phi, StableLM: the rest of the head passes by."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = heads(x, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned, rest = x[..., :4], x[..., 4:]
        return torch.cat([(turned * cos) + (self.turn(turned) * sin), rest], dim=-1)


class Chunks(nn.Module):
    """gpt-oss: angles are not repeated."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = torch.chunk(heads(x, 2), 2, dim=-1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class WrongSign(Halves):
    def turn(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., 4:], x[..., :4]), dim=-1)


class WrongHalves(Halves):
    def turn(self, x: Tensor) -> Tensor:
        return torch.cat((-x[..., :4], x[..., 4:]), dim=-1)


class OtherTensor(Halves):
    def turn(self, x: Tensor) -> Tensor:
        return super().turn(x * 2)


class CrossedChunks(Chunks):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = torch.chunk(heads(x, 2), 2, dim=-1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.cat((a * cos - b * sin, a * cos + b * sin), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("form", "rotated", "interleaved"),
    [(Halves, 8, False), (Interleaved, 8, True), (Partial, 4, False), (Chunks, 4, False)],
)
def test_forms(form: type[nn.Module], rotated: int, interleaved: bool, dtype: torch.dtype) -> None:
    program = check(
        MatchRope(), form(), _inputs(rotated, dtype), matches=1, tolerance=1e-6 if dtype == torch.float32 else 0.0
    )
    (node,) = [n for n in program.graph.nodes if n.target == ROPE]
    assert node.args[3] is interleaved
    assert node.meta["val"].dtype == dtype
    assert str(node.meta["val"].shape[1]) not in map(str, SIZES)  # [1, T, H, D]


@pytest.mark.parametrize("form", [WrongSign, WrongHalves, OtherTensor, CrossedChunks])
def test_near_misses(form: type[nn.Module]) -> None:
    check(MatchRope(), form(), _inputs(4 if form is CrossedChunks else 8, torch.float32), matches=0)
