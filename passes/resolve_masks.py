"""resolve_masks: the mask that was only named while tracing becomes attributes of attention.

    before:  m = camshaft.mask(like, "sliding", 16);  o = camshaft.attention(q, k, v, slice(m), ..., window=0)
    after:   o = camshaft.attention(q, k, v, None, ..., window=16)

A window given as an attribute and one given as a mask must agree; the smaller one rules. Numerics: exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.capture import CaptureError
from ..graph.program import Program
from .base import GraphPass, Stage
from .match import CASTS, COPIES, VIEWS, aten, is_call

MASK = torch.ops.camshaft.mask.default
ATTENTION = torch.ops.camshaft.attention.default
_PASSES_ON = (
    *CASTS,
    *COPIES,
    *VIEWS,
    aten.slice.Tensor,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.logical_not.default,
)


def mask_of(node: Any) -> fx.Node | None:
    """The camshaft::mask that a value was sliced, cast or expanded from, or None."""
    while is_call(node, *_PASSES_ON):
        node = node.args[0]
    return node if is_call(node, MASK) else None


class ResolveMasks(GraphPass):
    """Moves causal and sliding-window masks into attributes. Raises CaptureError for a mask that is neither."""

    name = "resolve_masks"
    stage = Stage.CANONICALIZE

    def run(self, program: Program) -> int:
        matches = 0
        for node in program.graph.nodes:
            if not is_call(node, ATTENTION) or node.args[3] is None:
                continue
            mask = mask_of(node.args[3])
            if mask is None:
                raise CaptureError(
                    f"{program.name}: the mask of {node.name} comes from {node.args[3]}; supported: causal, sliding window"
                )
            kind, size = mask.args[1], mask.args[2]
            windows = [w for w in (node.args[7], size if kind == "sliding" else 0) if w]
            node.args = (*node.args[:3], None, *node.args[4:7], min(windows, default=0), node.args[8])
            matches += 1
        return matches
