"""Which linear layers of a program a recipe quantizes, to what, and why others stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import fx

from ...graph import weights
from ...graph.linear_format import LinearFormat, check_divides
from ...graph.program import Program
from .. import quantize_fp8
from ..fuse_projections import is_router
from ..match import aten, is_call, static, value
from ..select_rows import head_of
from .algorithm import LayerPlan
from .recipe import HEAD, ROUTER, Recipe

MOE = torch.ops.camshaft.moe.default
FP8_ROWS = LinearFormat(weights="fp8", activations="fp8")
"""The format that becomes `quantize_rows` and `scaled_linear`, which fuse with what makes their input."""
ROUNDED = "rounded"
"""Key of a node's meta: its weight was rounded and is stored dense."""


@dataclass
class ProgramPlan:
    """layers: what to do with which aten.linear, in graph order. kept: reason -> weights that stay as they are."""

    layers: dict[fx.Node, LayerPlan] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def plan_layers(program: Program, recipe: Recipe) -> ProgramPlan:
    """The plan of a canonical, fused program. Raises ValueError, with layer and numbers, where groups do not divide K."""
    plan = ProgramPlan()
    head = logits_layer(program)
    for node in program.graph.nodes:
        if is_call(node, MOE):
            plan.kept["experts of camshaft.moe are left as they are"].append(weight_name(program, node.args[3]))
        if not is_call(node, aten.linear.default) or ROUNDED in node.meta:
            continue
        name = weight_name(program, node.args[1])
        chosen, reason = _choose(program, node, recipe, is_head=node is head)
        if chosen is None or chosen.format is None:
            plan.kept[reason].append(name)
            continue
        check_divides(chosen.format, tuple(value(node.args[1]).shape), name)
        plan.layers[node] = LayerPlan(weight=name, format=chosen.format, recipe=chosen)
    return plan


def _choose(program: Program, node: fx.Node, recipe: Recipe, *, is_head: bool) -> tuple[Recipe | None, str]:
    """(the recipe of one layer, "") or (None, why it stays as it is)."""
    reason = _obstacle(program, node)
    if reason is not None:
        return None, reason
    if is_head and HEAD in recipe.skip:
        return None, "it makes the logits"
    if ROUTER in recipe.skip and is_router(node):
        return None, "it feeds a choice (a router or gate)"
    chosen = recipe.for_layer(source_names(program, node.args[1]))
    if chosen is None or chosen.format is None:
        return None, "the recipe leaves it as it is"
    if chosen.format != FP8_ROWS:
        return chosen, ""
    reason = quantize_fp8.obstacle(value(node.args[1]))
    return (chosen, "") if reason is None else (None, reason)


def logits_layer(program: Program) -> fx.Node | None:
    """The layer of a language model that makes the logits; None for a module that is none."""
    output = next(node for node in program.graph.nodes if node.op == "output")
    return head_of(output.args[0][0]) if program.kind == "decoder" else None


def weight_name(program: Program, node: object) -> str:
    """Key of the weight that a placeholder names, or the node's name."""
    spec = program.input_of(node) if isinstance(node, fx.Node) else None
    return str(node) if spec is None else spec.key


def source_names(program: Program, node: object) -> tuple[str, ...]:
    """The names by which recipes may call a weight: its key, and those of the model's own weights that it is made from."""
    name = weight_name(program, node)
    recipe = program.weights[name].recipe if name in program.weights else None
    return tuple(dict.fromkeys((name, *_sources(recipe))))


def _sources(recipe: weights.Recipe | None) -> list[str]:
    if recipe is None:
        return []
    found = [recipe["source"]] if "source" in recipe else []
    for inner in (recipe.get("cast"), recipe.get("transpose"), *recipe.get("concatenate", ())):
        found += _sources(inner)
    return found


def _obstacle(program: Program, node: fx.Node) -> str | None:
    """Why no recipe can quantize a linear layer, or None."""
    weight = node.args[1]
    spec = program.input_of(weight) if isinstance(weight, fx.Node) else None
    if spec is None or spec.kind != "weight" or value(weight).dim() != 2:
        return "its weight is computed"
    if not value(weight).dtype.is_floating_point or value(weight).dtype.itemsize < 2:
        return f"its weight is in {str(value(weight).dtype).removeprefix('torch.')}"
    if any(static(size) in (None, 0) for size in value(weight).shape):
        return "a size of its weight varies"
    return None
