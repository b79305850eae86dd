"""What a target does about a format that it has no kernel for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...graph.linear_format import LinearFormat


@dataclass(frozen=True, kw_only=True)
class KernelSupport:
    """Kernels of a target for quantized linear layers.

    where: the target and device, for messages. missing: (format, (N, K)) -> why there is no kernel, or None. required: whether a
    layer without one is an error, because its definition, in PyTorch, would be much slower than the unquantized layer.
    """

    where: str
    missing: Callable[[LinearFormat, tuple[int, ...]], str | None]
    required: bool
