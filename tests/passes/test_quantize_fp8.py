"""quantize_fp8: which linear layers become fp8, what stays and why, and how far the outputs move."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.program import Program
from camshaft.graph.weights import Weight, from_recipe
from camshaft.passes import quantize_fp8
from camshaft.passes.fuse_projections import FuseProjections
from camshaft.passes.match_linear import MatchLinear
from camshaft.passes.quantize_fp8 import QUANTIZE_ROWS, SCALED_LINEAR, QuantizeFp8
from graph_cases import check, rows
from torch import Tensor, nn

TOLERANCE = 0.15  # each operand is off by up to 1/16, of values around 1


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 0)
    torch.manual_seed(0)


class Pair(nn.Module):
    """Two layers that read one x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 48, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Twice(nn.Module):
    """One weight, read by two layers and as a table."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.linear(x, self.weight))
        return nn.functional.linear(hidden, self.weight) + self.weight[0]


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight as [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 16) / 4), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 32), self.weight).view(1, -1, 16)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], dim=-1)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.router(x), dim=-1) * self.layer(x)


def _calls(program: Program, target: object) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def test_layers_that_read_the_same_rows_share_their_quantization() -> None:
    program = check(QuantizeFp8(), Pair(), rows(32), matches=2, tolerance=TOLERANCE)
    assert (len(_calls(program, QUANTIZE_ROWS)), len(_calls(program, SCALED_LINEAR))) == (1, 2)
    dtypes = {key: weight.dtype for key, weight in program.weights.items()}
    fp8, scale = torch.float8_e4m3fn, torch.float32
    assert dtypes == {
        "a.weight.fp8": fp8, "a.weight.scale": scale, "a.bias": scale, "b.weight.fp8": fp8, "b.weight.scale": scale,
    }  # fmt: skip
    assert program.info["notes"] == ("fp8: 2 linear layers, 0.0 MB of weights before",)


def test_compute_dtype_is_kept() -> None:
    module = Pair().to(torch.bfloat16)
    program = check(QuantizeFp8(), module, rows(32, dtype=torch.bfloat16), matches=2, tolerance=TOLERANCE)
    assert all(node.args[5] == torch.bfloat16 for node in _calls(program, SCALED_LINEAR))


def test_a_weight_with_other_users_stays_beside_its_fp8_form() -> None:
    program = check(QuantizeFp8(), Twice(), rows(32), matches=2, tolerance=1.0)
    assert set(program.weights) == {"weight", "weight.fp8", "weight.scale"}


def test_transposed_and_joined_weights() -> None:
    program = check(QuantizeFp8(), Conv1D(), rows(32), matches=1, before=[MatchLinear()], tolerance=0.3)
    assert [w.shape for key, w in program.weights.items() if key.endswith(".fp8")] == [(16, 32)]
    joined = check(QuantizeFp8(), Biased(), rows(32), matches=1, before=[FuseProjections()], tolerance=TOLERANCE)
    values = next(weight for key, weight in joined.weights.items() if key.endswith(".fp8"))
    assert values.shape == (64, 32) and values.recipe is not None and set(values.recipe) == {"quantize_rows", "part"}


def test_recipes_make_the_weights_again() -> None:
    module = Pair()
    program = check(QuantizeFp8(), module, rows(32), matches=2, tolerance=TOLERANCE)
    sources = {name: Weight.from_tensor(p) for name, p in module.named_parameters()}
    for key in ("a.weight.fp8", "b.weight.scale"):
        weight = program.weights[key]
        assert weight.recipe is not None
        assert torch.equal(from_recipe(weight.recipe, sources).load().float(), weight.load().float())


@pytest.mark.parametrize(
    ("module", "matches", "note"),
    [
        (nn.Linear(24, 16), 0, "fp8: weight not quantized: a size is no multiple of 16"),
        (nn.Linear(32, 8), 0, "fp8: weight not quantized: a size is no multiple of 16"),
        (Routed(), 1, "fp8: router.weight not quantized: it feeds a choice (a router or gate)"),
    ],
)
def test_what_stays(module: nn.Module, matches: int, note: str) -> None:
    width = 24 if isinstance(module, nn.Linear) and module.in_features == 24 else 32
    program = check(QuantizeFp8(), module, rows(width), matches=matches, tolerance=TOLERANCE)
    assert note in program.info["notes"]


def test_small_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 1000)
    program = check(QuantizeFp8(), Pair(), rows(32), matches=1, tolerance=TOLERANCE)
    assert "fp8: a.weight not quantized: it has fewer than 1,000 weights" in program.info["notes"]


def test_nothing_to_quantize() -> None:
    program = check(QuantizeFp8(), nn.LayerNorm(32), rows(32), matches=0)
    assert "notes" not in program.info
