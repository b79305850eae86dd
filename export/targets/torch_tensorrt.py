"""torch_tensorrt: a module's segments through Torch-TensorRT's converters, for models that are no decoders.

Camshaft's passes run first; Torch-TensorRT then takes each segment with its weights baked in, compiles what it has converters for,
and leaves the rest to PyTorch. Compiling happens when the weights are bound, on the GPU; nothing is stored.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...graph import ops
from ..segment import Segment
from ..trace import InliningInterpreter
from .base import Bound, Built, LoweringError, LowerRequest, Workers

logger = logging.getLogger(__name__)

PACKAGES = ("torch-tensorrt", "torch-tensorrt-rtx")
"""Distributions that bring the module `torch_tensorrt`."""

SETTINGS: dict[str, Any] = {
    "min_block_size": 1,
    "use_explicit_typing": True,  # the graph's own dtypes; enabled_precisions must stay as it is then
    "disable_tf32": True,  # fp32 is fp32, as in eager
    "truncate_double": True,
    "attn_bias_is_causal": False,  # the default takes every mask of an attention for a causal one, an encoder's too
}
"""What Torch-TensorRT's compiler is told; releases that do not know a name ignore it."""


class TorchTensorRtTarget:
    """Torch-TensorRT's dynamo frontend, on CUDA."""

    name = "torch_tensorrt"
    extension = ""
    fixed_sizes = True

    def fewest_tokens(self, device: torch.device) -> int:
        return 1

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "Torch-TensorRT runs on CUDA; give device='cuda'"
        if importlib.util.find_spec("torch_tensorrt") is None:
            return f"torch_tensorrt is not installed; install {' or '.join(PACKAGES)} for torch {torch.__version__}"
        if not torch.cuda.is_available():
            return "Torch-TensorRT compiles on a GPU, and torch sees no CUDA device"
        return None

    def versions(self) -> dict[str, str]:
        for package in PACKAGES:
            try:
                return {package: importlib.metadata.version(package)}
            except importlib.metadata.PackageNotFoundError:
                continue
        return {}

    def supports(self, node: fx.Node) -> bool:
        return True  # it leaves to PyTorch what it cannot convert

    def workers(self, device: torch.device) -> Workers | None:
        return None

    def lower(self, segment: Segment, request: LowerRequest) -> Built:
        return Built(b"")

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> _TorchTensorRtSegment:
        return _TorchTensorRtSegment(segment, device)


class _WithWeights(nn.Module):
    """A segment's graph over its activations, with the weights as buffers."""

    def __init__(self, graph_module: fx.GraphModule, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self._interpreter = InliningInterpreter(graph_module, ops.inline)
        for index, weight in enumerate(weights):
            self.register_buffer(f"w{index}", weight)
        self._names = [f"w{index}" for index in range(len(weights))]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._interpreter.run(*inputs, *(getattr(self, name) for name in self._names)))


class _TorchTensorRtSegment:
    def __init__(self, segment: Segment, device: torch.device) -> None:
        self._segment, self._device = segment, _indexed(device)

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        """Compiles the segment with these weights. Raises LoweringError with Torch-TensorRT's message."""
        segment = self._segment
        examples = []
        for entry in segment.placeholders[: segment.num_inputs]:
            dtype = getattr(torch, entry["dtype"])
            shape = [int(size) for size in entry["shape"]]
            make = torch.randn if dtype.is_floating_point else torch.zeros
            examples.append(make(shape, device=self._device).to(dtype))
        module = _WithWeights(segment.graph_module(self._device), weights).eval()
        compiled: Any
        try:
            compiled = self._compile(module, examples)
        except _ERRORS as error:  # some engines with fused attention build, and then do not open
            logger.warning("segment %s: %s; attention is taken apart", segment.id, _first_line(error))
            try:
                compiled = self._compile(module, examples, decompose_attention=True)
            except _ERRORS as second:
                raise LoweringError(
                    f"Torch-TensorRT could not compile segment {segment.id}: {_first_line(second)}; "
                    "use target='inductor' or 'eager'"
                ) from second

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            results = compiled(*inputs)
            return [results] if isinstance(results, Tensor) else list(results)

        return call

    def _compile(self, module: nn.Module, examples: Sequence[Tensor], **more: Any) -> Any:
        import torch_tensorrt

        with torch.no_grad():
            exported = torch.export.export(module, tuple(examples), strict=False)
            return torch_tensorrt.dynamo.compile(
                exported, arg_inputs=list(examples), device=self._device, **SETTINGS, **more
            )


_ERRORS = (ImportError, OSError, RuntimeError, TypeError, ValueError, AssertionError)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _indexed(device: torch.device) -> torch.device:
    """The device with its number, which Torch-TensorRT writes into its engines."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
