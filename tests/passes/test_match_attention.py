"""match_attention: written-out causal attention, ALiBi, windows; what is not causal stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from camshaft.passes.match_attention import MatchAttention
from camshaft.passes.resolve_masks import ATTENTION
from graph_cases import check, heads, rows
from torch import Tensor, nn

TOLERANCE = 2e-6  # fp32 softmax in another order


class Written(nn.Module):
    """Two heads of size 4; a subclass says what is added to the scores."""

    def scores(self, scores: Tensor, x: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])[:, None]
        j = torch.arange(x.shape[1])[None, :]
        return scores.masked_fill(~self.visible(i, j), torch.finfo(scores.dtype).min)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def forward(self, x: Tensor) -> Tensor:
        q = heads(x, 2)
        scores = self.scores(torch.matmul(q, (q * 0.7).transpose(-1, -2)) / math.sqrt(4), x)
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), q + 1)


class Window(Written):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < self.window)


class Table(Written):
    """GPT-Neo: the mask is a slice of a boolean table."""

    def __init__(self, window: int, size: int) -> None:
        super().__init__()
        ones = torch.ones(size, size, dtype=torch.bool)
        self.register_buffer("bias", torch.tril(ones) & ~torch.tril(ones, -window) if window else torch.tril(ones))

    def scores(self, scores: Tensor, x: Tensor) -> Tensor:
        table = self.bias[: x.shape[1], : x.shape[1]][None, None]
        return torch.where(table, scores, torch.finfo(scores.dtype).min)


class Alibi(Written):
    """Bloom: baddbmm with slopes times positions, [B H, T, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.25, 0.0625]))

    def forward(self, x: Tensor) -> Tensor:
        q = heads(x, 2).reshape(2, x.shape[1], 4)
        alibi = (self.slopes[:, None] * torch.arange(x.shape[1]))[:, None, :]
        scores = alibi.baddbmm(q, q.transpose(1, 2), beta=1.0, alpha=0.5)
        scores = super().scores(scores.view(1, 2, x.shape[1], x.shape[1]), x)
        return torch.bmm(F.softmax(scores, dim=-1).view(2, x.shape[1], x.shape[1]), q)


class Both(Written):
    """Bidirectional: not causal, must not match."""

    def scores(self, scores: Tensor, x: Tensor) -> Tensor:
        return scores


class WrongAxis(Written):
    def forward(self, x: Tensor) -> Tensor:
        q = heads(x, 2)
        return torch.matmul(F.softmax(self.scores(torch.matmul(q, q.transpose(-1, -2)), x), dim=-2), q)


class Squared(Written):
    """The scores are not linear in the product."""

    def scores(self, scores: Tensor, x: Tensor) -> Tensor:
        return super().scores(scores * scores, x)


class Given(nn.Module):
    """SDPA with a mask that is an input: nothing is known of it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(x, 2), heads(x, 2), heads(x, 2), attn_mask=mask)


class Sdpa(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        q = heads(x, 2)
        if self.mode == "causal":
            return F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)
        if self.mode == "full":
            return F.scaled_dot_product_attention(q, q, q)
        if self.mode == "shorter":
            return F.scaled_dot_product_attention(q[:, :, :4], q, q, is_causal=True)
        i = torch.arange(x.shape[1])
        mask = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < 5)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask[None, None])


def _window(module: nn.Module) -> int:
    program = check(MatchAttention(), module, rows(8), matches=1, tolerance=TOLERANCE)
    (node,) = [n for n in program.graph.nodes if n.target == ATTENTION]
    return node.args[7]


@pytest.mark.parametrize("module", [Written(), Alibi(), Sdpa("causal"), Table(0, 128)], ids=lambda m: type(m).__name__)
def test_causal(module: nn.Module) -> None:
    assert _window(module) == 0


@pytest.mark.parametrize(
    ("module", "window"),
    [
        (Window(5), 5),
        (Window(200), 200),
        (Table(16, 128), 16),
        (Table(40, 128), 40),
        (Table(100, 128), 100),
        (Sdpa("window"), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_windows(module: nn.Module, window: int) -> None:
    assert _window(module) == window


def test_alibi_slopes() -> None:
    program = check(MatchAttention(), Alibi(), rows(8), matches=1, tolerance=TOLERANCE)
    assert program.weights["alibi_slopes"].load().tolist() == pytest.approx([0.25, 0.0625], rel=1e-5)


@pytest.mark.parametrize(
    "module",
    [Both(), WrongAxis(), Squared(), Sdpa("full"), Sdpa("shorter"), Window(9000)],
    ids=lambda m: f"{type(m).__name__}",
)
def test_near_misses(module: nn.Module) -> None:
    check(MatchAttention(), module, rows(8), matches=0)


def test_mask_of_the_caller() -> None:
    def inputs(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(1, size, 8), torch.zeros(1, 1, size, size)

    check(MatchAttention(), Given(), inputs, matches=0)


def test_batch_that_varies_and_fixed_rows() -> None:
    check(MatchAttention(), Written(), lambda size: (torch.randn(size, 6, 8),), matches=1, tolerance=TOLERANCE)


def test_fixed_batch() -> None:
    check(MatchAttention(), Written(), lambda size: (torch.randn(3, size, 8),), matches=1, tolerance=TOLERANCE)
