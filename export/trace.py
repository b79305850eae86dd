"""A segment as an ExportedProgram: what Inductor and the ONNX exporter take.

Semantic operators are replaced by their plain definitions where the target wants to see through them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .segment import Segment


class _Inlined(nn.Module):
    """Runs a segment's graph with some operators replaced by Python functions."""

    def __init__(self, graph_module: fx.GraphModule, inline: Callable[[Any], Callable[..., Any] | None]) -> None:
        super().__init__()
        self._interpreter = InliningInterpreter(graph_module, inline)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._interpreter.run(*inputs))


class InliningInterpreter(fx.Interpreter):
    """Runs a graph with the operators that `inline` knows replaced by the functions that it names."""

    def __init__(self, graph_module: fx.GraphModule, inline: Callable[[Any], Callable[..., Any] | None]) -> None:
        super().__init__(graph_module)
        self._inline = inline

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        function = self._inline(target)
        return function(*args, **kwargs) if function is not None else super().call_function(target, args, kwargs)


def example_inputs(
    segment: Segment, device: torch.device, num_tokens: int, fixed: Mapping[str, int] | None = None
) -> list[Tensor]:
    """Tensors that fit the segment's inputs; varying sizes are `num_tokens`, sampled rows `num_tokens - 1`.

    A module's segment has sizes of its own, those of the module's trace. fixed: values of some sizes instead.
    """
    sizes = {"R": max(num_tokens - 1, 2), **segment.sizes, **(fixed or {})}
    inputs = []
    for entry in segment.placeholders:
        shape = [sizes.get(s, num_tokens) if isinstance(s, str) else s for s in entry["shape"]]
        inputs.append(torch.zeros(shape, dtype=getattr(torch, entry["dtype"]), device=device))
    return inputs


def dynamic_shapes(segment: Segment, max_tokens: int, fixed: Mapping[str, int] | None = None) -> list[dict[int, Any]]:
    """Which sizes of the inputs vary, for torch.export: all but `fixed`. Those of a module are left to it, limits and all."""
    dims: dict[str, Any] = {}
    shapes = []
    for entry in segment.placeholders:
        varying = {}
        for axis, size in enumerate(entry["shape"]):
            if segment.sizes and isinstance(size, str):
                varying[axis] = torch.export.Dim.DYNAMIC
            elif isinstance(size, str) and size not in (fixed or {}):
                dims.setdefault(size, torch.export.Dim(size, min=2, max=max(max_tokens, 16)))
                varying[axis] = dims[size]
        shapes.append(varying)
    return shapes


def export_segment(
    segment: Segment,
    device: torch.device,
    max_tokens: int,
    inline: Callable[[Any], Callable[..., Any] | None],
    fixed: Mapping[str, int] | None = None,
) -> torch.export.ExportedProgram:
    """Exports a segment with its weights as inputs: one list argument, activations first. fixed: sizes that do not vary."""
    module = _Inlined(segment.graph_module(device), inline)
    examples: Sequence[Tensor] = example_inputs(segment, device, 8, fixed)
    shapes = {"inputs": dynamic_shapes(segment, max_tokens, fixed)}
    with torch.no_grad():
        return torch.export.export(module, (list(examples),), dynamic_shapes=shapes, strict=False)
