"""quantize_linear: which linear layers are quantized, what stays and why, and how far the outputs move."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.program import Program
from camshaft.graph.quant_formats import quantize_weight
from camshaft.graph.weights import Weight, from_recipe
from camshaft.passes import quantize_fp8
from camshaft.passes.fuse_projections import FuseProjections
from camshaft.passes.match_linear import MatchLinear
from camshaft.passes.quantization.algorithm import LayerPlan, QuantizedLayer
from camshaft.passes.quantization.recipe import RECIPES, Recipe
from camshaft.passes.quantization.support import KernelSupport
from camshaft.passes.quantize_fp8 import QUANTIZE_ROWS, SCALED_LINEAR
from camshaft.passes.quantize_linear import QuantizeLinear
from graph_cases import check, rows
from torch import Tensor, fx, nn

FP8 = Recipe.named("fp8")
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
    program = check(QuantizeLinear(FP8), Pair(), rows(32), matches=2, tolerance=TOLERANCE)
    assert (len(_calls(program, QUANTIZE_ROWS)), len(_calls(program, SCALED_LINEAR))) == (1, 2)
    dtypes = {key: weight.dtype for key, weight in program.weights.items()}
    fp8, scale = torch.float8_e4m3fn, torch.float32
    assert dtypes == {
        "a.weight.fp8": fp8, "a.weight.fp8.scale": scale, "a.bias": scale, "b.weight.fp8": fp8, "b.weight.fp8.scale": scale,
    }  # fmt: skip
    assert program.info["notes"] == ("quantized: 2 linear layers in fp8/fp8; 0.0 MB of weights before, 0.0 MB now",)


def test_compute_dtype_is_kept() -> None:
    module = Pair().to(torch.bfloat16)
    program = check(QuantizeLinear(FP8), module, rows(32, dtype=torch.bfloat16), matches=2, tolerance=TOLERANCE)
    assert all(node.args[5] == torch.bfloat16 for node in _calls(program, SCALED_LINEAR))


def test_a_weight_with_other_users_stays_beside_its_fp8_form() -> None:
    program = check(QuantizeLinear(FP8), Twice(), rows(32), matches=2, tolerance=1.0)
    assert set(program.weights) == {"weight", "weight.fp8", "weight.fp8.scale"}


def test_transposed_and_joined_weights() -> None:
    program = check(QuantizeLinear(FP8), Conv1D(), rows(32), matches=1, before=[MatchLinear()], tolerance=0.3)
    assert [w.shape for key, w in program.weights.items() if key.endswith(".fp8")] == [(16, 32)]
    joined = check(QuantizeLinear(FP8), Biased(), rows(32), matches=1, before=[FuseProjections()], tolerance=TOLERANCE)
    values = next(weight for key, weight in joined.weights.items() if key.endswith(".fp8"))
    assert values.shape == (64, 32) and values.recipe is not None and values.recipe["part"] == "values"


def test_recipes_make_the_weights_again() -> None:
    module = Pair()
    program = check(QuantizeLinear(FP8), module, rows(32), matches=2, tolerance=TOLERANCE)
    sources = {name: Weight.from_tensor(p) for name, p in module.named_parameters()}
    for key in ("a.weight.fp8", "b.weight.fp8.scale"):
        weight = program.weights[key]
        assert weight.recipe is not None
        assert torch.equal(from_recipe(weight.recipe, sources).load().float(), weight.load().float())


@pytest.mark.parametrize(
    ("module", "matches", "note"),
    [
        (nn.Linear(24, 16), 0, "not quantized: weight: a size is no multiple of 16"),
        (nn.Linear(32, 8), 0, "not quantized: weight: a size is no multiple of 16"),
        (Routed(), 1, "not quantized: router.weight: it feeds a choice (a router or gate)"),
    ],
)
def test_what_stays(module: nn.Module, matches: int, note: str) -> None:
    width = 24 if isinstance(module, nn.Linear) and module.in_features == 24 else 32
    program = check(QuantizeLinear(FP8), module, rows(width), matches=matches, tolerance=TOLERANCE)
    assert note in program.info["notes"]


def test_small_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_fp8, "MIN_WEIGHTS", 1000)
    program = check(QuantizeLinear(FP8), Pair(), rows(32), matches=1, tolerance=TOLERANCE)
    assert "not quantized: a.weight: it has fewer than 1,000 weights" in program.info["notes"]


def test_nothing_to_quantize() -> None:
    program = check(QuantizeLinear(FP8), nn.LayerNorm(32), rows(32), matches=0)
    assert "notes" not in program.info


# ------------------------------------------------------------------------------------------------------- other formats
NONE = KernelSupport(where="a test", missing=lambda format, shape: "no kernels at all", required=False)
UNCALIBRATED = [name for name, recipe in RECIPES.items() if not recipe.calibrated]
ERRORS = {
    "int4": 0.5, "w4a8": 0.5, "nvfp4": 0.6, "nvfp4_search": 0.6, "nvfp4_weight_only": 0.4, "mxfp4": 0.8, "mxfp4_weight_only": 0.5,
}  # fmt: skip
"""Largest difference of outputs around 1; others are within 0.2."""


class Wide(nn.Module):
    """Two layers, wide enough for groups of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 256), nn.Linear(256, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("name", UNCALIBRATED)
def test_every_format(name: str) -> None:
    recipe = Recipe.named(name)
    program = check(QuantizeLinear(recipe), Wide(), rows(128), matches=2, tolerance=ERRORS.get(name, 0.2))
    note = program.info["notes"][0]
    assert note.startswith(f"quantized: 2 linear layers in {recipe.format};")
    if str(recipe.format) != "fp8/fp8":
        calls = _calls(program, torch.ops.camshaft.quantized_linear.default)
        assert [node.args[7] for node in calls] == [str(recipe.format)] * 2
    stored = {key: weight for key, weight in program.weights.items() if key != "a.bias"}
    assert all(weight.recipe is not None for weight in stored.values())
    sources = {name: Weight.from_tensor(p) for name, p in Wide().named_parameters()}
    for key, weight in stored.items():
        assert weight.recipe is not None
        again = from_recipe(weight.recipe, sources)
        assert (again.shape, again.dtype) == (weight.shape, weight.dtype), key
        assert (again.load().shape, again.load().dtype) == (weight.shape, weight.dtype), key


def test_groups_that_do_not_divide_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"a\.weight is 16 x 32, and groups of 128 .* do not divide its 32 columns"):
        check(QuantizeLinear(Recipe.named("int4")), Pair(), rows(32), matches=2)


def test_overrides_and_skips_by_name() -> None:
    int8, other = Recipe.named("int8_weight_only"), Recipe.named("int4", group=32)
    recipe = dataclasses.replace(int8, overrides=(("a.*", other), ("b.*", None)))
    program = check(QuantizeLinear(recipe), Pair(), rows(32), matches=1, tolerance=0.5)
    assert set(program.weights) == {"a.weight.int4", "a.weight.int4.scale", "a.bias", "b.weight"}
    assert "not quantized: b.weight: the recipe leaves it as it is" in program.info["notes"]
    skipping = dataclasses.replace(int8, skip=("a.*",))
    assert "a.weight" in check(QuantizeLinear(skipping), Pair(), rows(32), matches=1, tolerance=0.1).weights


def test_a_joined_weight_goes_by_the_names_that_it_is_made_from() -> None:
    recipe = dataclasses.replace(Recipe.named("int8"), skip=("b.weight",))
    check(QuantizeLinear(recipe), Biased(), rows(32), matches=0, before=[FuseProjections()], tolerance=1e-5)


def test_dense_weights_are_rounded_and_stay_linear() -> None:
    recipe = dataclasses.replace(Recipe.named("int8_weight_only"), dequantize=True)
    program = check(QuantizeLinear(recipe, kernels=NONE), Pair(), rows(32), matches=2, tolerance=0.02)
    assert {key: weight.dtype for key, weight in program.weights.items() if "int8" in key} == {
        "a.weight.int8": torch.float32,
        "b.weight.int8": torch.float32,
    }
    weight = program.weights["a.weight.int8"]
    assert weight.recipe is not None and set(weight.recipe) == {"round", "format", "candidates"}


def test_without_a_kernel() -> None:
    recipe = Recipe.named("int8_weight_only")
    program = check(QuantizeLinear(recipe, kernels=NONE), Pair(), rows(32), matches=2, tolerance=0.02)
    assert "in int8/none (run by the operator's definition: no kernels at all);" in program.info["notes"][0]
    strict = dataclasses.replace(NONE, required=True)
    with pytest.raises(ValueError, match=r"a\.weight in int8/none: a test has no kernel for it \(no kernels at all\)"):
        check(QuantizeLinear(recipe, kernels=strict), Pair(), rows(32), matches=2)


class Doubling:
    """A quantizer that scales channels by two, turns their order round and gives a static scale."""

    def digest(self) -> str:
        return "doubling"

    def assign(
        self, program: Program, plan: Mapping[fx.Node, LayerPlan], recipe: Recipe
    ) -> Mapping[fx.Node, LayerPlan]:
        return dict(list(plan.items())[:1])

    def quantize(self, program: Program, plan: Mapping[fx.Node, LayerPlan]) -> Mapping[fx.Node, QuantizedLayer]:
        factor, order = torch.full((32,), 2.0), torch.arange(31, -1, -1)
        found = {}
        for node, layer in plan.items():
            matrix = (program.weights[layer.weight].load() / factor)[:, order]
            found[node] = QuantizedLayer(
                format=layer.format,
                weight=quantize_weight(matrix, layer.format),
                channel_factor=factor,
                order=order,
                x_scale=torch.tensor(0.1) if layer.format.activations == "int8_static" else None,
            )
        return found


@pytest.mark.parametrize("dense", [False, True])
def test_what_a_quantizer_gives(dense: bool) -> None:
    format = LinearFormat.parse("int8/none" if dense else "int8/int8_static")
    recipe = Recipe(format=format, algorithm="smoothquant", dequantize=dense)
    program = check(
        QuantizeLinear(recipe, Doubling(), NONE if dense else None), Pair(), rows(32), matches=2, tolerance=0.2
    )
    for target in (torch.ops.aten.mul.Tensor, torch.ops.aten.index_select.default):  # layers with one x share them
        assert len(_calls(program, target)) == (0 if dense else 1)


def test_a_budget_leaves_layers_out() -> None:
    recipe = dataclasses.replace(Recipe.named("int8"), max_bits=12.0)
    program = check(_Once(recipe, Doubling()), Pair(), rows(32), matches=1, tolerance=0.2)
    assert "not quantized: b.weight: the budget leaves it as it is" in program.info["notes"]


class _Once(QuantizeLinear):
    """A second run finds nothing: the budget is spent."""

    def run(self, program: Program) -> int:
        return 0 if "notes" in program.info else super().run(program)


def test_calibration_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"needs calibration data \(awq\): give calibration=texts"):
        check(QuantizeLinear(Recipe.named("int4_awq", group=32)), Pair(), rows(32), matches=0)


def test_layers_shared_by_two_inputs_are_stored_once() -> None:
    program = check(QuantizeLinear(Recipe.named("int8")), Twice(), rows(32), matches=2, tolerance=1.0)
    assert set(program.weights) == {"weight", "weight.int8", "weight.int8.scale"}
