"""match_rms_norm: Llama, Gemma, OLMo 2 and functional forms match with the order of their casts; LayerNorms stay whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from camshaft.passes.match_rms_norm import RMS_NORM, MatchRmsNorm
from graph_cases import LlamaNorm, check, rows
from torch import Tensor, nn

DTYPES = [torch.float32, torch.bfloat16]


class GemmaNorm(LlamaNorm):
    """One is added to the weight, and the product is cast."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


class OlmoNorm(LlamaNorm):
    """OLMo 2, gpt-oss: the weight is applied before the cast."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.weight * x).to(dtype)


class Bare(nn.Module):
    """Llama 4's norm of queries and keys: no weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


class Functional(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), self.weight, 1e-6)


class CohereNorm(LlamaNorm):
    """Cohere's LayerNorm takes the mean away first."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + 1e-6)
        return (self.weight.to(torch.float32) * x).to(dtype)


class Mixed(LlamaNorm):
    """The variance of one tensor scales another."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y.exp() * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class OverTokens(LlamaNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)).to(x.dtype)


class Kept(LlamaNorm):
    """The inverse root is an output too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.float()
        r = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (y * r).to(x.dtype), r


FORMS = [(LlamaNorm, 0.0, True), (GemmaNorm, 1.0, False), (OlmoNorm, 0.0, False)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "offset", "cast_first"), FORMS)
def test_forms(form: type[LlamaNorm], offset: float, cast_first: bool, dtype: torch.dtype) -> None:
    program = check(
        MatchRmsNorm(),
        form(8, dtype),
        rows(8, dtype=dtype),
        matches=1,
        tolerance=1e-6 if dtype == torch.float32 else 0.0,
    )
    (node,) = [n for n in program.graph.nodes if n.target == RMS_NORM]
    assert node.args[2:4] == (1e-6, offset)
    assert node.args[4] is cast_first or dtype == torch.float32
    assert node.meta["val"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bare(dtype: torch.dtype) -> None:
    program = check(MatchRmsNorm(), Bare(), rows(8, dtype=dtype), matches=1)
    (node,) = [n for n in program.graph.nodes if n.target == RMS_NORM]
    assert node.args[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functional(dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3  # bf16: one rounding of 8 bits
    check(MatchRmsNorm(), Functional(8, dtype), rows(8, dtype=dtype), matches=1, tolerance=tolerance)


def test_two_norms_in_a_row() -> None:
    check(MatchRmsNorm(), nn.Sequential(LlamaNorm(8), GemmaNorm(8)), rows(8), matches=2, tolerance=1e-6)


@pytest.mark.parametrize("form", [Mixed, OverTokens, Kept])
def test_near_misses(form: type[LlamaNorm]) -> None:
    check(MatchRmsNorm(), form(8, torch.bfloat16), rows(8, dtype=torch.bfloat16), matches=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cohere_keeps_its_mean(dtype: torch.dtype) -> None:
    program = check(MatchRmsNorm(), CohereNorm(8, dtype), rows(8, dtype=dtype), matches=1, tolerance=1e-6)
    (node,) = [n for n in program.graph.nodes if n.target == RMS_NORM]
    assert node.args[0].target == torch.ops.aten.sub.Tensor  # RMSNorm of x - mean is this LayerNorm
    assert node.meta["val"].dtype == torch.float32


def test_layer_norm_is_not_touched() -> None:
    check(MatchRmsNorm(), nn.LayerNorm(8), rows(8), matches=0)
