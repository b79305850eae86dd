"""A program as a model that can be trained: the graph of a build, run on whole rows of tokens, with gradients.

    parameters by name --> stored dtype --> joined, transposed, cast (the WeightMap's recipes) --> weights of the graph
    aten.linear of the plan        rounded weight x rounded input        (what the build's quantized_linear computes)
    camshaft.attention             row by row, keys and values rounded as the cache stores them
    everything else                its definition in torch

Teacher and student are the same graph; the student has a plan. The plan is the build's own (`plan_layers`), so that which layers
are rounded, in which format and joined with which others cannot differ from what `quantize_linear` does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from ...graph import ops
from ...graph.linear_format import LinearFormat
from ...graph.program import Program
from ...graph.weights import Recipe as WeightRecipe
from ...passes.center_keys import can_shift
from ...passes.match import is_call
from ...passes.quantization.plan import plan_layers
from ...passes.quantization.recipe import Recipe
from ...passes.resolve_masks import ATTENTION
from .rounding import WeightRounding, cast_through, round_cache, round_input


@dataclass(frozen=True)
class CacheRounding:
    """How keys and values are stored. centered: keys lose their mean, as `center_keys` has it where there is calibration data."""

    dtype: torch.dtype
    centered: bool


@dataclass
class Plan:
    """What a student rounds. layers: by node of the graph. kept: reason -> weights that stay as they are."""

    layers: dict[fx.Node, WeightRounding] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    cache: CacheRounding | None = None

    @property
    def formats(self) -> list[LinearFormat]:
        """The format of each layer."""
        return [layer.format for layer in self.layers.values()]


def plan_student(program: Program, recipe: Recipe | None, cache: CacheRounding | None) -> Plan:
    """The plan of a canonical, fused program that is not paged. Raises ValueError where groups do not divide a layer's columns."""
    plan = Plan(cache=cache)
    if recipe is not None:
        found = plan_layers(program, recipe)
        plan.kept = dict(found.kept)
        plan.layers = {
            node: WeightRounding(layer.format, layer.recipe.candidates) for node, layer in found.layers.items()
        }
    return plan


class ProgramModel:
    """Runs a canonical, fused program that is not paged on rows of tokens.

    parameters: the model's own weights by name, the names that the recipes of `program.weights` use; float32 masters of what is
    trained, anything of what is not. stored: dtypes that trained ones are written in, to which they are rounded in every step.
    """

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, Tensor],
        stored: Mapping[str, torch.dtype],
        device: torch.device,
        plan: Plan | None = None,
    ) -> None:
        self.program = program
        self.parameters = parameters
        self.plan = plan or Plan()
        self._stored = stored
        self._device = device
        self._weights = {spec.name: spec.key for _, spec in program.placeholders("weight")}
        self._constants = {
            key: program.weights[key].to(device)
            for key in self._weights.values()
            if program.weights[key].recipe is None
        }

    @torch.no_grad()
    def search_scales(self) -> None:
        """Finds the scales of all rounded weights anew, as a build finds them."""
        for node, layer in self.plan.layers.items():
            layer.search(self._weight(self._weights[node.args[1].name]))

    def __call__(self, tokens_BT: Tensor, watched: Collection[fx.Node] = ()) -> tuple[Tensor, list[Tensor]]:
        """Runs rows of tokens [B, T], which do not see each other.

        Returns logits [B * T, V] of the tokens behind each one, in the program's dtype, and for each linear layer in `watched`, in
        graph order, what it reads, before it is rounded.
        """
        rows, length = tokens_BT.shape
        given = {
            "token_ids": tokens_BT.reshape(1, -1),
            "positions": torch.arange(length, device=tokens_BT.device).repeat(rows)[None],
        }
        run = _Run(self, length, watched)
        values = [
            given[spec.name] if spec.kind != "weight" else self._weight(spec.key)
            for _, spec in self.program.placeholders()
        ]
        logits: Tensor = run.run(*values)[0]
        return logits[0], run.seen

    def _weight(self, key: str) -> Tensor:
        if key in self._constants:
            return self._constants[key]
        weight = self.program.weights[key]
        assert weight.recipe is not None
        return self._make(weight.recipe).to(weight.dtype)

    def _make(self, recipe: WeightRecipe) -> Tensor:
        """A weight by its recipe, with gradients; `read_parameters` refuses models whose weights are made in other ways."""
        if "source" in recipe:
            name = recipe["source"]
            return cast_through(self.parameters[name], self._stored.get(name, self.parameters[name].dtype))
        if "cast" in recipe:
            return self._make(recipe["cast"]).to(getattr(torch, recipe["dtype"]))
        if "transpose" in recipe:
            return self._make(recipe["transpose"]).t()
        return torch.cat([self._make(part) for part in recipe["concatenate"]], recipe["dim"])


class _Run(fx.Interpreter):
    """One run over packed rows of `length` tokens each. seen: what the watched layers read."""

    def __init__(self, model: ProgramModel, length: int, watched: Collection[fx.Node]) -> None:
        super().__init__(model.program.graph_module)
        self.seen: list[Tensor] = []
        self._plan = model.plan
        self._length = length
        self._watched = watched

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n in self._watched:
            self.seen.append(args[0])
        if n in self._plan.layers:
            return _rounded_linear(self._plan.layers[n], *args)
        if is_call(n, ATTENTION):
            return self._attend(n, args)
        target: Any = ops.DEFINITIONS.get(n.target, n.target)
        return target(*args, **kwargs)

    def _attend(self, node: fx.Node, args: tuple[Any, ...]) -> Tensor:
        """camshaft.attention of q, k, v [1, H, B * T, D], each row on its own: [1, B * T, H, V]."""
        q, k, v = (x.unflatten(2, (-1, self._length)).squeeze(0).transpose(0, 1) for x in args[:3])
        cache = self._plan.cache
        if cache is not None:
            if cache.centered and can_shift(node):
                k = k - k.detach().mean((0, 2), keepdim=True)
            k, v = round_cache(k, cache.dtype), round_cache(v, cache.dtype)
        attended: Tensor = ops.DEFINITIONS[ATTENTION](q, k, v, *args[3:])
        return attended.flatten(0, 1)[None]


def _rounded_linear(layer: WeightRounding, x: Tensor, weight_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of `camshaft.quantized_linear`, of rounded values whose scales are multiplied in."""
    product = functional.linear(round_input(x, layer.format), layer(weight_NK), None if bias is None else bias.float())
    return product.to(x.dtype)
