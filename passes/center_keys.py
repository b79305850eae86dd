"""center_keys: keys without the mean of their channels, so that an fp8 KV cache rounds what differs between keys alone.

    before                                          after
    k' = camshaft.rope(k, ...)                      k' = camshaft.rope(k, ...) - c
    o = camshaft.attention(q', k', v, ...)          o = camshaft.attention(q', k', v, ...)

k' [1, T, G, D], c [G, D] the mean of the turned keys on calibration tokens. Without c all scores of a query are less by q . c, the
same for every key, so softmax is as it was. Channels that turn slowly have a large mean, and float8_e4m3fn rounds a number by up to
1/16 of its size. Where equal shifts change the result, with a sink's logit or a cap on scores, keys stay as they are, and the
program's notes say so. Runs on a fused program that is not paged. Numerics: reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.program import Program
from ..graph.weights import Weight
from .base import GraphPass, Stage, only_user
from .match import aten, call, is_call, value
from .quantization.algorithm import Observer
from .resolve_masks import ATTENTION


@dataclass
class CenterKeys(GraphPass):
    """Subtracts from keys their mean on calibration tokens."""

    observer: Observer

    name = "center_keys"
    stage = Stage.CACHE
    numerics = "reordered"

    def options(self) -> dict[str, Any]:
        return {"calibration": self.observer.digest()}

    def run(self, program: Program) -> int:
        nodes = [node for node in program.graph.nodes if is_call(node, ATTENTION)]
        shifted = [node for node in nodes if can_shift(node)]
        if len(shifted) < len(nodes):
            count = len(nodes) - len(shifted)
            line = f"keys of {count} layers keep their mean in the cache: their attention has sinks or a softcap"
            program.info = {**program.info, "notes": (*program.info.get("notes", ()), line)}
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in shifted:
            keys = node.args[1]
            assert isinstance(keys, fx.Node)
            readers.setdefault(keys, []).append(node)
        for keys, pieces in self.observer.values_of(program, list(readers)) if readers else ():
            total, count = torch.zeros(()), 0
            for piece in pieces:
                total = total + piece.double().sum((0, 2)).cpu()
                count += piece.shape[0] * piece.shape[2]
            _subtract(program, keys, total / count, readers[keys])
        return len(shifted)


def can_shift(attention: fx.Node) -> bool:
    """Whether the same number added to all scores of a query leaves attention's result: no sinks, no softcap."""
    return attention.args[4] is None and not attention.args[8]


def _subtract(program: Program, keys: fx.Node, mean_GD: Tensor, readers: list[fx.Node]) -> None:
    """Lets `readers` read keys [1, G, T, D] less their mean; subtracted in front of a transposition of tokens and heads."""
    turned, mean = keys, mean_GD[:, None]
    if is_call(keys, aten.transpose.int) and {axis % 4 for axis in keys.args[1:]} == {1, 2} and only_user(keys.args[0]):
        assert isinstance(keys.args[0], fx.Node)
        turned, mean = keys.args[0], mean_GD
        readers = [keys]
    dtype = value(keys).dtype
    with value(keys).fake_mode:  # type: ignore[attr-defined]
        example = torch.empty(mean.shape, dtype=dtype)
    key = program.weights.add(f"{keys.name}.mean", Weight.from_tensor(mean.to(dtype).contiguous()))
    constant = program.add_input(f"{keys.name}_mean", kind="weight", key=key, example=example)
    with program.graph.inserting_after(turned):
        centered = call(program, aten.sub.Tensor, turned, constant)
    for reader in readers:
        reader.replace_input_with(turned, centered)
