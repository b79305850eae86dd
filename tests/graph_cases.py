"""Helpers of the pass tests: capture of hand-written modules, and one check that every pass test makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from camshaft.graph.capture import capture
from camshaft.graph.numerics import run_program
from camshaft.graph.program import Program
from camshaft.graph.verify import verify
from camshaft.graph.weights import Weight
from camshaft.passes.base import GraphPass
from camshaft.passes.normalize import Normalize
from torch import Tensor, nn

MakeInputs = Callable[[int], tuple[Tensor, ...]]
SIZES = (8, 13)
"""Two values of the size that varies."""


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """Every parameter and buffer, by reference."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: Weight.from_tensor(tensor).named(name) for name, tensor in named}


def captured(module: nn.Module, make_inputs: MakeInputs) -> Program:
    """The Program of a module; sizes that differ between make_inputs(8) and make_inputs(13) vary."""
    first, second = (make_inputs(size) for size in SIZES)
    dim = torch.export.Dim("T", min=5, max=100)
    shapes = [{i: dim for i in range(a.dim()) if a.shape[i] != b.shape[i]} for a, b in zip(first, second)]
    return capture(
        module.eval(), first, dynamic_shapes={"args": tuple(shapes)} if _variadic(module) else tuple(shapes),
        weights=weights_of(module), kind="module", name=type(module).__name__,
    )  # fmt: skip


def _variadic(module: nn.Module) -> bool:
    return bool(module.forward.__code__.co_flags & 4)


def run(program: Program, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Runs a module's Program on its arguments."""
    return run_program(program, dict(zip(program.arguments, inputs)))


def check(
    graph_pass: GraphPass,
    module: nn.Module,
    make_inputs: MakeInputs,
    *,
    matches: int,
    before: Sequence[GraphPass] = (),
    tolerance: float = 0.0,
) -> Program:
    """Runs a pass on a captured module and returns the result.

    Asserts the number of matches, the outputs against eager at two sizes, no matches in a second run, example values that
    tell the truth, weights in the WeightMap alone, and an untouched original.
    """
    program = captured(copy.deepcopy(module), make_inputs)
    for earlier in (Normalize(), *before):
        program = earlier(program).program
    nodes = [node.format_node() for node in program.graph.nodes]
    result = graph_pass(program)
    assert result.num_matches == matches
    assert [node.format_node() for node in program.graph.nodes] == nodes
    verify(result.program, after=graph_pass.name)
    assert graph_pass(result.program).num_matches == 0
    assert {spec.key for _, spec in result.program.placeholders("weight")} == set(result.program.weights)
    for size in SIZES:
        torch.manual_seed(size)
        inputs = make_inputs(size)
        with torch.no_grad():
            expected = module.eval()(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        output = next(node for node in result.program.graph.nodes if node.op == "output")
        for node, a, b in zip(output.args[0], run(result.program, inputs), expected, strict=True):
            assert node.meta["val"].dtype == a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return result.program


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> MakeInputs:
    """make_inputs of one random tensor [1, T, *shape]."""
    return lambda size: (torch.randn((1, size, *shape)).to(dtype),)


class LlamaNorm(nn.Module):
    """RMSNorm as Llama writes it: cast back, then the weight."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H D] -> [B, H, T, D]."""
    return x.view(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)
