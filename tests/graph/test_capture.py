"""Capture: inputs, weights, constants, what is refused, and what the message says."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.capture import CaptureError, capture
from camshaft.graph.weights import WeightMap
from graph_cases import captured, rows, run, weights_of
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, scale: float = 2.0, extra: Tensor | None = None) -> Tensor:
        y = self.linear(x) * scale + self.shift + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return y if extra is None else y + extra


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x


def test_inputs_and_weights() -> None:
    module = Small().eval()
    program = captured(module, rows(4))
    kinds = {spec.key: spec.kind for spec in program.inputs}
    assert kinds == {
        "linear.weight": "weight",
        "linear.bias": "weight",
        "shift": "weight",
        "constant.c_lifted_tensor_0": "weight",
        "x": "user",
    }
    assert set(program.weights) == {key for key, kind in kinds.items() if kind == "weight"}
    assert program.weights["linear.weight"].load().data_ptr() == module.linear.weight.data_ptr()
    x = torch.randn(1, 9, 4)
    assert torch.equal(run(program, (x,))[0], module(x).detach())


def test_arguments_that_are_no_tensors() -> None:
    module = Small().eval()
    program = capture(
        module,
        (torch.ones(2, 4),),
        kwargs={"scale": 3.0, "extra": torch.ones(4)},
        weights=weights_of(module),
        kind="module",
        name="m",
    )
    assert program.arguments == ("x", "scale", "extra")
    assert [spec.name for spec in program.inputs if spec.kind == "user"] == ["x", "extra"]


def test_ranges_of_sizes() -> None:
    program = captured(Small(), rows(4))
    (size,) = [s for s in program.inputs[-1].shape if isinstance(s, str)]
    assert program.info["ranges"][size] == (5, 100)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Counts(), "calls in place"),
        (Writes(), "x in place"),
        (Branches(), r"Branches cannot be traced in Branches.forward"),
    ],
)
def test_refused(module: nn.Module, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        captured(module, rows(4))


def test_size_that_is_fixed_by_the_module() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(1, 8, 4)

    with pytest.raises(CaptureError, match="Fixed cannot be traced"):
        captured(Fixed(), rows(4))


def test_missing_weight_is_named() -> None:
    module = Small().eval()
    with pytest.raises(CaptureError, match=r"needs weight 'linear\.weight'"):
        capture(module, (torch.ones(2, 4),), weights=WeightMap({}), kind="module", name="m")


def test_copy_keeps_names_of_builtins() -> None:
    class Input(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input + 1

    program = captured(Input(), rows(4)).clone().clone()
    assert [node.name for node in program.graph.nodes] == ["input", "add", "output"] or program.graph.find_nodes(
        op="placeholder"
    )[0].name == "input"
    program.graph_module.recompile()
    assert torch.equal(run(program, (torch.zeros(1, 3, 4),))[0], torch.ones(1, 3, 4))
