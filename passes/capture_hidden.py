"""capture_hidden: hidden states after chosen decoder layers become further outputs.

    before                                          after
    h1 = layer 0(h0); h2 = layer 1(h1) ...          the same
    return (logits,)                                return (logits, h2, h4, normed)         hidden_layers=(2, 4, -1)

Hidden state i is what i decoder layers have made of the embeddings: the input of layer i, [1, T, H] in the dtype of the residual
stream; i is 0 (the embeddings) to n, the number of layers (the last layer's output, before the final norm). -1 is what the
language-model head reads: behind the final norm. EAGLE-3 (Li et al. 2025, section 3.1) reads 2, n // 2 and n - 3; Medusa's heads
(Cai et al. 2024, section 2.1) read -1. All T rows of a step are given, not only those that are sampled.

Layers are found by the modules that nodes were traced in: the outermost list of modules that most of them belong to
(`model.layers`, `transformer.h`). So the pass runs first, before nodes are rewritten; later passes keep an output as they keep any
other user of a node. Numerics: exact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import value
from .select_rows import head_of

HEAD_INPUT = -1
"""The hidden state that the language-model head reads."""
_LAYER = re.compile(r"(.*?)\.(\d+)")


@dataclass
class CaptureHidden(GraphPass):
    """Adds hidden states to the outputs, in the order of `layers`."""

    layers: tuple[int, ...]

    name = "capture_hidden"
    stage = Stage.CANONICALIZE

    def run(self, program: Program) -> int:
        """Raises ValueError for a layer that is out of range, named twice or not found."""
        check_layers(self.layers, None, program.name)
        if not self.layers:
            return 0
        decoder = find_layers(program)
        check_layers(self.layers, decoder.num_layers, program.name)
        states = [decoder.hidden(layer) for layer in self.layers]
        widths = [int(value(state).shape[-1]) for state in states]
        if len(set(widths)) > 1:
            raise ValueError(
                f"hidden_layers {self.layers} of {program.name} are {widths} wide; allowed: layers of one width"
            )
        output = next(node for node in program.graph.nodes if node.op == "output")
        output.args = ((*output.args[0], *states),)
        return len(states)


def check_layers(layers: tuple[int, ...], num_layers: int | None, name: str) -> None:
    """Raises ValueError for hidden layers that a model of `num_layers` layers (None: of any) has not, or that stand twice."""
    if len(set(layers)) != len(layers):
        raise ValueError(f"hidden_layers is {layers}; allowed: each layer once")
    limit = "the number of layers" if num_layers is None else str(num_layers)
    for layer in layers:
        whole = isinstance(layer, int) and not isinstance(layer, bool)
        if not whole or layer < HEAD_INPUT or (num_layers is not None and layer > num_layers):
            raise ValueError(
                f"hidden_layers holds {layer!r} for {name}; allowed: 0 (the embeddings) to {limit} (the last layer's output), and "
                f"{HEAD_INPUT} (what the head reads, behind the final norm)"
            )


@dataclass(frozen=True)
class DecoderLayers:
    """The layers of a traced decoder.

    path: name of their list. outputs: [n] what each layer returns, [1, T, H].
    """

    program: Program
    path: str
    outputs: tuple[fx.Node, ...]

    @property
    def num_layers(self) -> int:
        """n"""
        return len(self.outputs)

    def hidden(self, layer: int) -> fx.Node:
        """The node of hidden state `layer`, 0 to n or HEAD_INPUT. Raises ValueError where it is not to be found."""
        if layer > 0:
            return self.outputs[layer - 1]
        return self._embeddings() if layer == 0 else self._head_input()

    def _embeddings(self) -> fx.Node:
        like = self.outputs[0].meta["val"]
        found = {
            operand: None
            for node in self.program.graph.nodes
            if _layer_of(node, self.path) == 0
            for operand in node.all_input_nodes
            if operand.op == "call_function" and _layer_of(operand, self.path) is None and _same_type(operand, like)
        }
        if len(found) != 1:
            raise ValueError(
                f"hidden state 0 of {self.program.name} is not clear: {self.path}.0 reads {[node.name for node in found]} from "
                "outside; leave 0 out of hidden_layers"
            )
        return next(iter(found))

    def _head_input(self) -> fx.Node:
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        head = head_of(output.args[0][0])
        if head is None:
            raise ValueError(
                f"no linear layer makes the logits of {self.program.name}, so it has no hidden state {HEAD_INPUT}; use "
                f"{self.num_layers}, the last layer's output"
            )
        found = head.args[0]
        assert isinstance(found, fx.Node)
        return found


def find_layers(program: Program) -> DecoderLayers:
    """The decoder layers of a traced program. Raises ValueError where there are none, or one has not one output."""
    lists: dict[str, Counter[int]] = {}
    for node in program.graph.nodes:
        for path, index in _owners(node):
            lists.setdefault(path, Counter())[index] += 1
            break
    if not lists:
        raise ValueError(
            f"no decoder layers are found in {program.name}: no part of it was traced in a list of modules; leave out hidden_layers"
        )
    path = max(lists, key=lambda name: (sum(lists[name].values()), name))
    num_layers = max(lists[path]) + 1
    outputs = tuple(_output_of(program, path, index) for index in range(num_layers))
    return DecoderLayers(program, path, outputs)


def _output_of(program: Program, path: str, index: int) -> fx.Node:
    """What a layer returns: the one of its values [1, T, H] that is read outside."""
    found = [
        node
        for node in program.graph.nodes
        if _layer_of(node, path) == index
        and any(_layer_of(user, path) != index for user in node.users)
        and _is_hidden(node.meta.get("val"))
    ]
    if len(found) != 1:
        raise ValueError(
            f"the output of {path}.{index} of {program.name} is not clear: {[node.name for node in found]} are read outside; "
            "its hidden states cannot be captured"
        )
    return found[0]


def _is_hidden(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.dim() == 3 and example.dtype.is_floating_point


def _same_type(node: fx.Node, like: torch.Tensor) -> bool:
    found = node.meta.get("val")
    return _is_hidden(found) and found.shape[2] == like.shape[2] and found.dtype == like.dtype


def _layer_of(node: fx.Node, path: str) -> int | None:
    """The layer that a node was traced in, None outside of them."""
    return next((index for name, index in _owners(node) if name == path), None)


def _owners(node: fx.Node) -> Iterator[tuple[str, int]]:
    """(name of the list, index) for every listed module that a node was traced in, outermost first."""
    if node.op != "call_function":
        return
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if found := _LAYER.fullmatch(path):
            yield found[1], int(found[2])
