"""Exported graphs made functional: by their values where that is enough, else by a second trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from camshaft.graph.functional import make_functional
from torch import Tensor, nn

_aten = torch.ops.aten


class _Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def functional(function: Callable[[Tensor], Any]) -> tuple[torch.export.ExportedProgram, bool]:
    """The exported function, rows of x varying, made functional; and whether it was traced a second time."""
    x = torch.randn(6, 4, 8)
    exported = torch.export.export(
        _Calls(function).eval(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}}, strict=False
    )
    result = make_functional(exported)
    for rows in (2, 5):
        given = torch.randn(rows, 4, 8)
        torch.testing.assert_close(result.module()(given), function(given), rtol=0, atol=0)
    return result, result is not exported


def operators(exported: torch.export.ExportedProgram) -> list[Any]:
    checks = (_aten._assert_tensor_metadata.default,)
    return [node.target for node in exported.graph.nodes if node.op == "call_function" and node.target not in checks]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.to(torch.float32) * 2, [_aten.mul.Tensor]),
        (lambda x: x.to("cpu") * 2, [_aten.mul.Tensor]),
        (lambda x: x.to(torch.float64) * 2, [_aten._to_copy.default, _aten.mul.Tensor]),
        (lambda x: x.reshape(x.shape[0], -1) * 2, [_aten.sym_size.int, _aten.view.default, _aten.mul.Tensor]),
        (lambda x: x.contiguous() * 2, [_aten.mul.Tensor]),
        (lambda x: x.transpose(1, 2).contiguous() * 2, [_aten.transpose.int, _aten.clone.default, _aten.mul.Tensor]),
        (lambda x: nn.functional.dropout(x, 0.5, training=False) * 2, [_aten.mul.Tensor]),
    ],
)
def test_values_tell(function: Callable[[Tensor], Any], expected: list[Any]) -> None:
    exported, again = functional(function)
    assert not again and operators(exported) == expected


def test_chunks_are_split() -> None:
    exported, again = functional(lambda x: x.chunk(3, dim=2)[2] * 2)
    assert not again and _aten.split.Tensor in operators(exported) and _aten.chunk.default not in operators(exported)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).add_(1),
        lambda x: x.transpose(1, 2).reshape(-1, 4) * 2,
        lambda x: x.reshape(-1, 8) * 2,
        lambda x: x.flatten(1) * 2,
        lambda x: x.to(torch.float32, copy=True) * 2,
    ],
    ids=["in place", "reshape that copies", "size that varies", "another kind", "copy"],
)
def test_traced_again(function: Callable[[Tensor], Any]) -> None:
    exported, again = functional(function)
    assert again and not any(
        operator._schema.is_mutable for operator in operators(exported) if hasattr(operator, "_schema")
    )


def test_what_nobody_reads_is_dropped() -> None:
    def function(x: Tensor) -> Tensor:
        x.cumsum(0).add_(1)
        return x * 2

    exported, _ = functional(function)
    assert operators(exported) == [_aten.mul.Tensor]
