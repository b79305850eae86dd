"""split_early_exit: one decoder becomes a graph that drafts and one that verifies (LayerSkip, Elhoushi et al. 2024, section 4).

    before    token_ids -> layers 0 .. k-1 -> h -> layers k .. n-1 -> f -> norm, head -> logits
    after     the same, and three parts over the same weights and caches:
      early   token_ids, positions -> layers 0 .. k-1 -> h [1, T, H]
      exit    h, sample_rows -> norm, head -> logits of the exit [1, R, V]
      late    h, positions, sample_rows -> layers k .. n-1 -> norm, head -> logits [1, R, V]

Drafting runs early and exit, a token at a time. Verification runs late on the hidden states that drafting has left, so no layer
computes a token twice: keys and values of layers 0 .. k-1 are in the cache already, which all graphs share, as they share weights.
The whole graph stays for steps without drafts. What is computed of positions alone (angles) is computed in either part.

Two passes: `mark_exit` runs while layers can still be told apart (see capture_hidden.py), and keeps h and f as outputs; this one,
behind all others, takes them back and cuts there. A sum and norm that are one operator at a cut are two in the parts. A trained
exit's adapter (models/speculative/exit.py) comes in front of the norm of the exit, whose weight it replaces:

    h + up silu(down h) -> norm, head

Numerics: exact.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph.capture import drop_unused_inputs
from ..graph.dump import target_text
from ..graph.program import InputSpec, Program
from ..graph.weights import Weight
from .base import GraphPass, Stage
from .capture_hidden import find_layers
from .fuse_add_norm import ADD_RMS_NORM
from .fuse_norm_quantize import ADD_RMS_NORM_QUANTIZE, RMS_NORM_QUANTIZE
from .fuse_rope_cache import PAGED_ROPE_ATTENTION
from .match import aten, call, is_call, value
from .match_rms_norm import RMS_NORM
from .page_attention import PAGED_ATTENTION
from .quantize_fp8 import SCALED_LINEAR, call_parts
from .select_rows import QUANTIZED_LINEAR

PARTS = ("early", "exit", "late")
"""The parts of a program with an early exit, in the order in which they run."""
_PAGED = (PAGED_ATTENTION, PAGED_ROPE_ATTENTION)
_LAYER_WORK = (*_PAGED, aten.linear.default, QUANTIZED_LINEAR, SCALED_LINEAR)
"""Operators that no two parts may share: what costs something, and what writes a cache."""


def check_exit(layer: object, num_layers: int | None, name: str) -> None:
    """Raises ValueError for an exit that a model of `num_layers` layers (None: of any) has not."""
    whole = isinstance(layer, int) and not isinstance(layer, bool)
    if not whole or layer < 1 or (num_layers is not None and layer >= num_layers):  # type: ignore[operator]
        limit = (
            "the number of layers - 1" if num_layers is None else f"{num_layers - 1}, since it has {num_layers} layers"
        )
        raise ValueError(f"early_exit is {layer!r} for {name}; allowed: 1 (behind the first layer) to {limit}")


@dataclass
class MarkExit(GraphPass):
    """Adds two outputs, which `SplitEarlyExit` takes back: the hidden states behind `layer` layers, and behind the last one."""

    layer: int

    name = "mark_exit"
    stage = Stage.CANONICALIZE

    def run(self, program: Program) -> int:
        """Raises ValueError for a layer that is out of range, and for a program without layers."""
        decoder = find_layers(program)
        check_exit(self.layer, decoder.num_layers, program.name)
        output = _output(program)
        output.args = ((*output.args[0], decoder.hidden(self.layer), decoder.hidden(decoder.num_layers)),)
        return 1


@dataclass(frozen=True)
class ExitWeights:
    """A trained exit: h [.., H] -> norm(h + up silu(down h)).

    norm [H], down [R, H], up [H, R] in the compute dtype; eps of the norm. digest: of their values.
    """

    norm: Weight
    down: Weight
    up: Weight
    eps: float
    digest: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return f"ExitWeights({self.down.shape[0]}, {self.digest})"  # of the pass's fingerprint


@dataclass
class SplitEarlyExit(GraphPass):
    """Makes the parts at the two outputs that `MarkExit` has added.

    trained: the exit's own norm and adapter; None: the model's norm.
    """

    trained: ExitWeights | None = None

    name = "split_early_exit"
    stage = Stage.SPLIT

    def run(self, program: Program) -> int:
        """Raises ValueError where the layers cannot be told apart: the message names the node that stands in the way."""
        output = _output(program)
        results = list(output.args[0])
        source = program.clone()
        cut, final = (_separate(source, node.name) for node in results[-2:])
        logits = _output(source).args[0][0]
        program.parts = {
            "early": _part(source, "early", [cut], None),
            "exit": _exit(_part(source, "exit", [logits], final), self.trained),
            "late": _part(source, "late", [logits], cut),
        }
        _check(program)
        output.args = (tuple(results[:-2]),)
        return len(program.parts)


def _output(program: Program) -> fx.Node:
    return next(node for node in program.graph.nodes if node.op == "output")


def _separate(program: Program, name: str) -> fx.Node:
    """The node of this name; where it is the sum of an add and norm in one, these become two operators."""
    node = next(node for node in program.graph.nodes if node.name == name)
    if not is_call(node, operator.getitem) or not is_call(node.args[0], ADD_RMS_NORM, ADD_RMS_NORM_QUANTIZE):
        return node
    both: Any = node.args[0]
    quantized = both.target is ADD_RMS_NORM_QUANTIZE
    with program.graph.inserting_before(both):
        total = call(program, aten.add.Tensor, *both.args[:2])
        if quantized:
            parts = call_parts(program, RMS_NORM_QUANTIZE, total, *both.args[2:])
        else:
            parts = (call(program, RMS_NORM, total, *both.args[2:]),)
    new = (*parts, total)
    for user in list(both.users):
        user.replace_all_uses_with(new[user.args[1]])
    return total


def _part(source: Program, name: str, outputs: Sequence[fx.Node], begin: fx.Node | None) -> Program:
    """The nodes that `outputs` are made of; those in front of `begin` are replaced by an input `hidden`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed = _needed(outputs, begin)
    specs = {spec.name: spec for spec in source.inputs}
    inputs: list[InputSpec] = []
    if begin is not None:
        copies[begin] = _hidden_input(graph, inputs, begin, set(specs))
    for node in source.graph.nodes:
        if node not in needed:
            continue
        if begin is not None and _is_size_of(node, begin):
            new = graph.call_function(aten.sym_size.int, (copies[begin], 1))
        else:
            new = graph.node_copy(node, lambda operand: copies[operand])
            new.name = node.name
        new.meta["val"] = node.meta["val"]
        copies[node] = new
        if node.op == "placeholder":
            inputs.append(specs[node.name])
    result = graph.output(tuple(copies[node] for node in outputs))
    result.meta["val"] = tuple(node.meta["val"] for node in outputs)
    keys = {spec.key for spec in inputs if spec.kind == "weight"}
    return Program(
        graph_module=fx.GraphModule(torch.nn.Module(), graph), inputs=inputs, weights=source.weights.only(keys), kind="decoder",
        name=f"{source.name}.{name}", info=source.info, cache=source.cache,
    )  # fmt: skip


def _needed(outputs: Sequence[fx.Node], begin: fx.Node | None) -> set[fx.Node]:
    """What `outputs` are made of, without `begin` and what is in front of it alone."""
    needed: set[fx.Node] = set()
    stack = [node for node in outputs if node is not begin]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if begin is None or not _is_size_of(node, begin):
            stack += [operand for operand in node.all_input_nodes if operand is not begin]
    return needed


def _is_size_of(node: fx.Node, hidden: fx.Node) -> bool:
    """Whether a node is the number of tokens, which `hidden` [1, T, H] has, too."""
    found = node.meta.get("val")
    return node.op == "call_function" and isinstance(found, torch.SymInt) and str(found) == str(value(hidden).shape[1])


def _hidden_input(graph: fx.Graph, inputs: list[InputSpec], like: fx.Node, taken: set[str]) -> fx.Node:
    assert "hidden" not in taken, "a program with hidden states as an input has no early exit"
    node = graph.placeholder("hidden")
    example = node.meta["val"] = value(like)
    shape = tuple(int(size) if isinstance(size, int) else str(size) for size in example.shape)
    inputs.append(InputSpec(name="hidden", kind="token", key="hidden", shape=shape, dtype=example.dtype))
    return node


def _exit(part: Program, trained: ExitWeights | None) -> Program:
    """The exit, with its own norm and adapter where it has been trained. Raises ValueError where these do not fit."""
    if trained is None:
        return part
    hidden = next(node for node in part.graph.nodes if node.name == "hidden")
    norms = [node for node in part.graph.nodes if is_call(node, RMS_NORM) and node.args[0] is hidden]
    if len(norms) != 1 or len(hidden.users) != 1:
        raise ValueError(
            f"the trained exit has an RMSNorm, and {part.name} has {sorted(target_text(user) for user in hidden.users)} behind the "
            "last layer; leave its checkpoint out"
        )
    (norm,) = norms
    example = value(hidden)
    if trained.norm.shape != (example.shape[2],):
        raise ValueError(
            f"the trained exit is for hidden states of {trained.norm.shape[0]}, and those of {part.name} have {example.shape[2]}; "
            "give the checkpoint that was trained for this model"
        )
    weights = {}
    for name, weight in (("down", trained.down), ("up", trained.up), ("norm", trained.norm)):
        key = part.weights.add(f"exit.{name}.weight", weight)
        like = example.new_empty(weight.shape, dtype=weight.dtype)
        weights[name] = part.add_input(f"exit_{name}", kind="weight", key=key, example=like)
    with part.graph.inserting_before(norm):
        inner = call(part, aten.silu.default, call(part, aten.linear.default, hidden, weights["down"]))
        adapted = call(part, aten.add.Tensor, hidden, call(part, aten.linear.default, inner, weights["up"]))
        new = call(part, RMS_NORM, adapted, weights["norm"], trained.eps, 0.0, True)
    norm.replace_all_uses_with(new)
    part.graph.erase_node(norm)
    drop_unused_inputs(part)
    part.graph_module.recompile()
    return part


def _check(program: Program) -> None:
    """Raises ValueError where parts share the work of a layer, or an exit reads more than hidden states."""
    work = {
        name: {n.name for n in part.graph.nodes if is_call(n, *_LAYER_WORK)} for name, part in program.parts.items()
    }
    shared = sorted(work["early"] & work["late"])
    if shared:
        raise ValueError(
            f"{program.name} has no early exit: {', '.join(shared[:3])} of the first layers is read by later ones besides the "
            "hidden states; build it without early_exit"
        )
    foreign = [
        spec.name
        for spec in program.parts["exit"].inputs
        if spec.kind == "cache" or spec.key in ("token_ids", "positions")
    ]
    if foreign:
        raise ValueError(
            f"{program.name} has no early exit: its head reads {', '.join(foreign[:3])} besides hidden states; build it without "
            "early_exit"
        )
