"""The interface of a target, and the table of those that exist.

A target lowers a segment once (`lower`, at build time: bytes to store), opens it (`load`) and binds it to each layer's weights
(`Lowered.bind`, one callable per place in the model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx

from ..segment import Segment

Workers = Literal["processes", "threads"]

Bound = Callable[..., Sequence[Tensor]]
"""A segment with its weights: activations in, outputs out."""


class LoweringError(RuntimeError):
    """A segment that a target could not lower, or an engine that it cannot open; the message names the cause and the fix.

    operators: the names of those that could not be lowered, as in `Segment.operators`, where they are known.
    """

    def __init__(self, message: str, operators: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.operators = operators


@dataclass(frozen=True)
class Built:
    """A lowered segment. data: the engine file's content. details: what is known of it, for the manifest."""

    data: bytes
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LowerRequest:
    """What a segment is lowered for.

    device: where it will run. max_tokens: the most rows that it gets. sizes: fixed values of the sizes that vary, or None if they
    stay open. capabilities: compute capabilities to build for; (): any. batch_invariant: see `BuildConfig`.
    """

    device: torch.device
    max_tokens: int
    sizes: Mapping[str, int] | None = None
    capabilities: tuple[str, ...] = ()
    batch_invariant: bool = False


class Lowered(Protocol):
    """A lowered segment, ready to be bound."""

    def bind(self, weights: Sequence[Tensor]) -> Bound:
        """The segment with these weights (on the engine's device, in the order of the segment's weight inputs)."""
        ...


class Target(Protocol):
    """A way to run segments.

    name: what stands in the manifest. extension: of the engine files, "" where a segment needs none. fixed_sizes: whether each
    engine takes one size only, so that one is built for every bucket.
    """

    name: str
    extension: str
    fixed_sizes: bool

    def fewest_tokens(self, device: torch.device) -> int:
        """The fewest rows that a lowered segment takes; steps are padded to it."""
        ...

    def unavailable(self, device: torch.device) -> str | None:
        """Why this target cannot run here (what is missing and how to get it), or None if it can."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the packages that an engine of this target depends on."""
        ...

    def supports(self, node: fx.Node) -> bool:
        """Whether a node can be lowered; others run in PyTorch beside it."""
        ...

    def workers(self, device: torch.device) -> Workers | None:
        """What lowers several segments at once: threads for a compiler that leaves Python alone; None: one after the other."""
        ...

    def lower(self, segment: Segment, request: LowerRequest) -> Built:
        """The engine of a segment. Raises LoweringError."""
        ...

    def load(self, segment: Segment, engine: Path | None, device: torch.device) -> Lowered:
        """Opens a stored engine. Raises LoweringError."""
        ...


def node_signature(node: fx.Node) -> str:
    """What decides whether a node can be lowered: its operator, its arguments, and what its operands are."""

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype}{[size if isinstance(size, int) else '?' for size in value.shape]}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(text, value))}]"
        return repr(value) if isinstance(value, bool | int | float | None) else "?"

    return f"{node.target} {fx.node.map_arg((node.args, node.kwargs), lambda item: text(item.meta.get('val')))}"


def _table() -> dict[str, Any]:
    from .eager import EagerTarget
    from .inductor import InductorTarget
    from .onnxruntime import OnnxRuntimeTarget
    from .tensorrt import TensorRtTarget
    from .torch_tensorrt import TorchTensorRtTarget

    known = (EagerTarget, InductorTarget, OnnxRuntimeTarget, TensorRtTarget, TorchTensorRtTarget)
    return {target.name: target for target in known}


def get_target(name: str) -> Target:
    """The target of a name. Raises ValueError for one that does not exist."""
    table = _table()
    if name not in table:
        raise ValueError(f"unknown target {name!r}; known: {', '.join(['auto', *table])}")
    return table[name]()


def available_targets(device: torch.device) -> dict[str, str | None]:
    """Each target with the reason why it cannot run on `device`, or None if it can."""
    return {name: target().unavailable(device) for name, target in _table().items()}
