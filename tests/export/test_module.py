"""camshaft.compile(module, example_inputs): any module, its own arguments and structure, sizes that vary."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from camshaft.export.module import CompiledModule
from camshaft.graph.capture import CaptureError
from torch import Tensor, nn
from torch.export import Dim

import camshaft

BATCH, TOKENS = Dim("B", min=1, max=64), Dim("T", min=1, max=64)
TARGETS = ["eager", "onnxruntime"]


class Mixed(nn.Module):
    """Norm, gated MLP, causal attention, and an operator that ONNX Runtime does not have."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.norm, self.gate, self.up, self.down = (
            nn.LayerNorm(size),
            nn.Linear(size, 12),
            nn.Linear(size, 12),
            nn.Linear(12, size),
        )
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(size), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x) + self.shift
        h = self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))
        h = torch.special.bessel_j0(h) + y.sum()
        q = h.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return out.transpose(1, 2).reshape(x.shape), torch.arange(x.shape[1]) + h.mean(0)[:, 0]


class Structure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair: dict[str, Tensor], *, scale: int = 2, bias: Tensor | None = None) -> dict[str, Any]:
        y = self.linear(pair["a"]) * scale + pair["b"]
        return {
            "y": y if bias is None else y + bias,
            "input": pair["a"],
            "weight": self.linear.weight,
            "constants": [3, None, "text"],
            "size": pair["a"].shape[0] * 2,
            "copies": (pair["a"].clone(), pair["a"].clone()),
            "twice": (y, y),
        }


def _example() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, 8), torch.randn(5)


SHAPES = ({0: BATCH, 1: TOKENS}, {0: Dim("Y", min=1)})


@pytest.mark.parametrize("target", [*TARGETS, "auto"])
def test_several_sizes_vary(target: str) -> None:
    module = Mixed()
    compiled = camshaft.compile(module, _example(), target=target, dynamic_shapes=SHAPES, device="cpu")
    assert module.training and module.dropout.training
    module.eval()
    for batch, tokens, rest in ((3, 6, 5), (2, 9, 4), (1, 7, 1), (5, 1, 2), (1, 1, 1)):
        inputs = torch.randn(batch, tokens, 8), torch.randn(rest)
        for actual, expected in zip(compiled(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)  # fp32, another order of sums
            assert not actual.requires_grad
    strided = torch.randn(8, 2, 6).permute(1, 2, 0)
    torch.testing.assert_close(
        compiled(strided, inputs[1])[0], module(strided, inputs[1])[0].detach(), rtol=1e-4, atol=1e-5
    )
    matches = {entry["name"]: entry["matches"] for entry in compiled.passes}
    assert (matches["fuse_projections"], matches["fuse_glu"], matches["match_attention"]) == (1, 1, 1)
    assert (compiled.target in ("eager", "onnxruntime")) and compiled.seconds > 0
    if target == "onnxruntime":
        assert "aten.special_bessel_j0 runs in PyTorch (no lowering)" in compiled.report
    if target == "auto":
        assert compiled.report[-1].startswith(f"auto: {compiled.target} (whole module")


@pytest.mark.slow
def test_inductor() -> None:
    module = Mixed().eval()
    compiled = camshaft.compile(module, _example(), target="inductor", dynamic_shapes=SHAPES, device="cpu")
    for batch, tokens in ((3, 6), (2, 9), (1, 1)):
        inputs = torch.randn(tokens, batch, 8).transpose(0, 1), torch.randn(3)
        for actual, expected in zip(compiled(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)  # fp32, another order of sums


@functools.cache
def _structured(target: str = "eager") -> tuple[Structure, CompiledModule, dict[str, Any]]:
    module = Structure()
    example = {"pair": {"a": torch.randn(3, 4), "b": torch.randn(4)}, "scale": 3, "bias": torch.randn(4)}
    shapes = {"pair": {"a": {0: BATCH}, "b": None}, "scale": None, "bias": None}
    return module, camshaft.compile(module, example, target=target, dynamic_shapes=shapes, device="cpu"), example


@pytest.mark.parametrize("target", TARGETS)
def test_structure(target: str) -> None:
    module, compiled, example = _structured(target)
    a = torch.randn(6, 4)
    call = {**example, "pair": {"a": a, "b": example["pair"]["b"]}}
    for actual in (compiled(**call), compiled(call["pair"], bias=call["bias"], scale=3)):
        expected = module(**call)
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual["y"], expected["y"].detach())
        assert actual["constants"] == expected["constants"] and actual["size"] == 12
        assert actual["input"] is a
        assert actual["weight"].data_ptr() == module.linear.weight.data_ptr()
        assert actual["twice"][0] is actual["twice"][1]


@pytest.mark.parametrize("target", TARGETS)
def test_copies_share_no_memory(target: str) -> None:
    _, compiled, example = _structured(target)
    result = compiled(**example)
    pointers = {t.data_ptr() for t in (*result["copies"], example["pair"]["a"])}
    assert len(pointers) == 3
    assert all(torch.equal(t, example["pair"]["a"]) for t in result["copies"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bias": torch.ones(4).double()}, r"argument bias has dtype torch\.float64; torch\.float32 was compiled"),
        ({"bias": torch.ones(5)}, r"argument bias has shape \[5\]; \[4\] was compiled"),
        ({"bias": torch.ones(1, 4)}, r"argument bias has shape \[1, 4\]"),
        ({"bias": 3.0}, "argument bias is a float; a tensor is needed"),
        ({"scale": 4}, "argument scale is 4; it was 3 in the example"),
        ({"bias": torch.ones(4, device="meta")}, "argument bias is on meta; the module was compiled for cpu"),
        ({"pair": {"a": torch.ones(70, 4), "b": torch.ones(4)}}, "has size 70 in dimension 0; allowed: 1 to 64"),
        ({"pair": {"a": torch.ones(3, 4)}}, "the arguments form the tree"),
        ({"other": 1}, "unexpected keyword argument 'other'"),
        ({"bias": torch.ones(4, requires_grad=True)}, "compiled modules are for inference"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], text: str) -> None:
    _, compiled, example = _structured()
    with pytest.raises(ValueError, match=text):
        compiled(**{**example, **change})


def test_missing_argument() -> None:
    _, compiled, example = _structured()
    with pytest.raises(ValueError, match=r"the example gave \['bias', 'pair', 'scale'\]"):
        compiled(example["pair"])


def test_equal_sizes_must_be_equal() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    compiled = camshaft.compile(
        Sum(), (torch.ones(4), torch.ones(4)), dynamic_shapes=({0: BATCH}, {0: BATCH}), target="eager", device="cpu"
    )
    assert torch.equal(compiled(torch.ones(7), torch.ones(7)), torch.full((7,), 2.0))
    with pytest.raises(ValueError, match="argument y has shape"):
        compiled(torch.ones(7), torch.ones(6))


def test_refusals() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    x = torch.ones(3)
    with pytest.raises(CaptureError, match="calls in place"):
        camshaft.compile(Counts(), (x,), device="cpu")
    with pytest.raises(ValueError, match="unknown target 'tpu'"):
        camshaft.compile(nn.ReLU(), (x,), target="tpu", device="cpu")
    with pytest.raises(ValueError, match="give a tuple of positional arguments"):
        camshaft.compile(nn.ReLU(), x, device="cpu")
    with pytest.raises(ValueError, match=r"onnxruntime's CPU kernels do not take torch\.bfloat16"):
        camshaft.compile(nn.ReLU(), (x.bfloat16(),), target="onnxruntime", device="cpu")


def test_numbers_of_values_are_refused_as_outputs() -> None:
    class Item(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, x.sum().to(torch.int64).item()

    with pytest.raises(ValueError, match="output 1 is a number computed from values"):
        camshaft.compile(Item(), (torch.ones(3),), target="eager", device="cpu")


def test_sizes_that_depend_on_values() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sinc(x[x > 0]) * 2

    compiled = camshaft.compile(Chosen(), (torch.randn(6),), target="auto", device="cpu")
    x = torch.tensor([1.0, -1.0, 2.5, 3.5, -2.0, 0.5])
    torch.testing.assert_close(compiled(x), Chosen()(x))


def test_nothing_to_compute_and_bf16() -> None:
    identity = camshaft.compile(nn.Identity(), (torch.ones(3),), device="cpu")
    x = torch.randn(3)
    assert identity(x) is x and identity.target == "eager"
    linear = nn.Linear(4, 4).bfloat16()
    compiled = camshaft.compile(linear, (torch.ones(2, 4).bfloat16(),), device="cpu")
    assert compiled.target == "eager" and compiled(torch.ones(2, 4).bfloat16()).dtype == torch.bfloat16
