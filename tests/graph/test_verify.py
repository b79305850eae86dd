"""verify: each kind of illegal graph is found and named; verify_packed finds what mixes tokens."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph.program import Program
from camshaft.graph.verify import VerificationError, verify, verify_packed
from camshaft.graph.weights import Weight, WeightMap
from graph_cases import captured, rows
from torch import Tensor, nn


@pytest.fixture(scope="module")
def linear() -> Program:
    return captured(nn.Linear(4, 4), rows(4))


@pytest.fixture
def program(linear: Program) -> Program:
    return linear.clone()


def test_legal(program: Program) -> None:
    verify(program, after="capture")


def test_inputs_differ(program: Program) -> None:
    program.inputs.pop()
    with pytest.raises(VerificationError, match=r"after p: inputs and placeholders differ: \['input'\]"):
        verify(program, after="p")


def test_missing_weight(program: Program) -> None:
    program.weights = WeightMap({})
    with pytest.raises(VerificationError, match="names weight 'weight', which the map does not hold"):
        verify(program, after="p")


def test_weight_of_another_shape(program: Program) -> None:
    program.weights = WeightMap({**program.weights, "weight": Weight.from_tensor(torch.zeros(4, 5))})
    with pytest.raises(VerificationError, match=r"weight 'weight' is \[4, 5\], its placeholder \[4, 4\]"):
        verify(program, after="p")


def test_missing_example_value(program: Program) -> None:
    next(node for node in program.graph.nodes if node.op == "call_function").meta.clear()
    with pytest.raises(VerificationError, match="linear carries no example value"):
        verify(program, after="p")


def test_other_nodes_than_calls(program: Program) -> None:
    output = next(node for node in program.graph.nodes if node.op == "output")
    with program.graph.inserting_before(output):
        program.graph.call_method("neg", (output.args[0][0],))
    with pytest.raises(VerificationError, match="is a call_method; only calls are legal"):
        verify(program, after="p")


class Mixes(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cumsum":
            return x.cumsum(1)
        if self.how == "scores":
            return x @ x.transpose(1, 2)
        if self.how == "softmax":
            return x.softmax(1)
        return x.softmax(-1)


@pytest.mark.parametrize("how", ["cumsum", "scores", "softmax"])
def test_packed_rows_must_not_mix(how: str) -> None:
    with pytest.raises(ValueError, match="mixes the tokens"):
        verify_packed(captured(Mixes(how), rows(4)))


def test_packed_rows_that_do_not_mix() -> None:
    verify_packed(captured(Mixes("channels"), rows(4)))
