"""The calibrator: quantizes the layers of a plan by what their inputs are, in the order in which a model computes them.

    for each value x that layers of the plan read, in graph order                       (`CalibrationRun`)
        statistics of x over all calibration tokens                                     (`InputStatistics`)
        channel factors of AWQ or SmoothQuant, one for all layers that read x           x' = x * factor, W' = W / factor
        moments of x' as the layer will see it, rounded as the format says              H = mean of Q(x') Q(x')^T
        each weight W' rounded: to nearest with the best scales, or by GPTQ
        on with the layers' outputs as quantized

Statistics that were saved can stand in for the data: then nothing is run, and layers do not see what earlier ones lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.linear_format import STATIC_ACTIVATIONS, LinearFormat
from ...graph.program import Program
from ...graph.quant_formats import QuantizedWeight, dequantize_weight, quantize_weight
from ...graph.quantized_linear import quantize_activations
from .algorithm import LayerPlan, QuantizedLayer
from .awq import clip, search_scale
from .calibration import CalibrationData, CalibrationRun, LayerInput, ProgressCallback
from .channels import Heads, value_heads
from .gptq import corrected, gptq
from .recipe import Recipe
from .smoothquant import smoothing_scale
from .statistics import InputStatistics, SavedStatistics, static_scale

_LIMITS = {"fp8_static": 448.0, "int8_static": 127.0}
_MOMENT_ALGORITHMS = ("awq", "gptq")


@dataclass
class Calibrator:
    """A `LayerQuantizer` on calibration data.

    data: the tokens; None: there are saved statistics alone. device: where the model is run, one weight at a time. statistics: of
    layers by the keys of their weights; where they are enough for a recipe, nothing is run. chunk_tokens: tokens that are run at a
    time. progress: called before each group of layers with (done, all, name).
    """

    data: CalibrationData | None
    device: torch.device
    statistics: Mapping[str, InputStatistics] | None = None
    chunk_tokens: int = 4096
    progress: ProgressCallback | None = None

    @property
    def tokens(self) -> CalibrationData:
        """The data. Raises ValueError where there are saved statistics alone."""
        if self.data is None:
            raise ValueError(
                "saved calibration statistics are not enough for this build: AWQ and GPTQ need second moments (save them with "
                "moments), mixed precision and KV caches the text itself; give calibration text"
            )
        return self.data

    def digest(self) -> str:
        """Hex digits that change with the data and the statistics."""
        data = "" if self.data is None else self.data.digest()
        statistics = SavedStatistics(self.statistics or {}).digest()
        return hashlib.sha256(f"{data} {statistics}".encode()).hexdigest()[:16]

    def assign(
        self, program: Program, plan: Mapping[fx.Node, LayerPlan], recipe: Recipe
    ) -> Mapping[fx.Node, LayerPlan]:
        """Mixed precision under the recipe's budget; see `sensitivity`."""
        from .sensitivity import assign_formats

        return assign_formats(self, program, plan, recipe)

    def collect(
        self, program: Program, layers: Iterable[fx.Node], *, moments: bool = False
    ) -> dict[str, InputStatistics]:
        """Statistics of the unquantized model's inputs of `layers` (nodes of linear layers), by the keys of their weights."""
        run = self.run(program)
        found: dict[str, InputStatistics] = {}
        for group in run.inputs_of(list(layers)):
            statistics = InputStatistics.of(group.chunks(), moment=moments).to(torch.device("cpu"))
            found |= {run.weight_key(layer): statistics for layer in group.layers}
        return found

    def values_of(self, program: Program, nodes: Collection[fx.Node]) -> Iterator[tuple[fx.Node, Iterator[Tensor]]]:
        """Each of the nodes of a program that is not paged, in graph order, with its values on the tokens, piece by piece."""
        return self.run(program).values_of(nodes)

    def run(self, program: Program) -> CalibrationRun:
        """A new run over the data. Raises ValueError where there are saved statistics alone."""
        return CalibrationRun(
            program, self.tokens, device=self.device, chunk_tokens=self.chunk_tokens, progress=self.progress
        )

    def quantize(self, program: Program, plan: Mapping[fx.Node, LayerPlan]) -> Mapping[fx.Node, QuantizedLayer]:
        """Quantizes every layer of the plan; the program stays as it is. Raises ValueError (see `LayerQuantizer`)."""
        found: dict[fx.Node, QuantizedLayer] = {}
        if self.statistics is not None and all(_enough(self.statistics.get(p.weight), p) for p in plan.values()):
            for group in _groups(plan):
                found |= self._from_statistics(program, group, plan)
            return found
        copies = _HostCopies()
        original = self._unquantized(program, plan)
        for inputs in self.run(program).inputs_of(list(plan)):
            beside = next(original, None)
            plans = {layer: plan[layer] for layer in inputs.layers}
            weights = {layer: inputs.weight(layer) for layer in inputs.layers}
            moment = any(_reads_moment(p) for p in plans.values())
            statistics = InputStatistics.of(inputs.chunks(), moment=moment)
            made = quantize_group(plans, weights, statistics, inputs, value_heads(inputs.x), beside)
            for layer, quantized in made.items():
                use_layer(inputs, layer, quantized)
                found[layer] = copies.of(quantized)
        return found

    def _unquantized(self, program: Program, plan: Mapping[fx.Node, LayerPlan]) -> Iterator[LayerInput]:
        """A run of the unquantized model beside the other, where GPTQ fits weights to its outputs; else nothing."""
        if any(item.recipe.algorithm == "gptq" and item.recipe.gptq_correct for item in plan.values()):
            return replace(self, progress=None).run(program).inputs_of(list(plan))
        return iter(())

    def _from_statistics(
        self, program: Program, group: list[fx.Node], plan: Mapping[fx.Node, LayerPlan]
    ) -> dict[fx.Node, QuantizedLayer]:
        assert self.statistics is not None
        weights = {layer: program.weights[plan[layer].weight].to(self.device) for layer in group}
        statistics = self.statistics[plan[group[0]].weight].to(self.device)
        x: Any = group[0].args[0]
        made = quantize_group({layer: plan[layer] for layer in group}, weights, statistics, None, value_heads(x))
        copies = _HostCopies()
        return {layer: copies.of(quantized) for layer, quantized in made.items()}


def quantize_group(
    plans: Mapping[fx.Node, LayerPlan],
    weights: Mapping[fx.Node, Tensor],
    statistics: InputStatistics,
    inputs: LayerInput | None,
    heads: Heads | None = None,
    original: LayerInput | None = None,
) -> dict[fx.Node, QuantizedLayer]:
    """Quantizes the layers that read one x.

    statistics: of x. inputs: x itself; None: the moments of rounded inputs are taken for those of x. heads: where x is attention's
    output, see `channels`. original: x in the unquantized model, in the same pieces. Raises ValueError.
    """
    made: dict[fx.Node, QuantizedLayer] = {}
    sets: dict[tuple[str, LinearFormat], list[fx.Node]] = {}
    for layer, plan in plans.items():
        sets.setdefault((plan.recipe.algorithm, plan.format), []).append(layer)
    for (_, format), layers in sets.items():
        recipe = plans[layers[0]].recipe
        members = [weights[layer] for layer in layers]
        factor = _channel_factor(members, statistics, format, recipe, plans[layers[0]].weight, heads)
        scaled = statistics if factor is None else statistics.scaled(factor)
        moment = cross = None
        if recipe.algorithm in _MOMENT_ALGORITHMS:
            if inputs is not None and format.activations != "none":
                moment = _rounded_moment(inputs.chunks(), factor, format, scaled)
            else:
                moment = scaled.require_moment(plans[layers[0]].weight)
            if inputs is not None and original is not None and recipe.algorithm == "gptq" and recipe.gptq_correct:
                cross = _cross_moment(original.chunks(), _rounded(inputs.chunks(), factor, format, scaled))
        x_scale = (
            static_scale(scaled, _LIMITS[format.activations]) if format.activations in STATIC_ACTIVATIONS else None
        )
        for layer, weight in zip(layers, members):
            wide = weight.float() if factor is None else weight.float() / factor
            if moment is not None and cross is not None:
                wide = corrected(wide, moment, cross, damp=recipe.gptq_damp, name=plans[layer].weight)
            parts, order = _round(wide, moment, scaled, plans[layer])
            made[layer] = QuantizedLayer(
                format=format, weight=parts, channel_factor=factor, order=order, x_scale=x_scale
            )
    return made


def _channel_factor(
    weights: list[Tensor],
    statistics: InputStatistics,
    format: LinearFormat,
    recipe: Recipe,
    name: str,
    heads: Heads | None,
) -> Tensor | None:
    """What x is multiplied by, float32 [K] and exact in the weights' dtype; None: nothing."""
    if recipe.algorithm == "smoothquant":
        scale: Tensor | None = smoothing_scale(statistics.amax, weights, recipe.smoothing, heads=heads)
    elif recipe.algorithm == "awq":
        scale = search_scale(weights, statistics, format, steps=recipe.awq_grid, heads=heads, name=name).scale
    else:
        return None
    return None if scale is None else (1.0 / scale).to(weights[0].dtype).float()


def _round(
    wide_NK: Tensor, moment: Tensor | None, statistics: InputStatistics, plan: LayerPlan
) -> tuple[QuantizedWeight, Tensor | None]:
    """(stored tensors, order of columns) of one weight."""
    recipe = plan.recipe
    if recipe.algorithm == "gptq":
        assert moment is not None
        rounded = gptq(
            wide_NK,
            moment,
            plan.format,
            damp=recipe.gptq_damp,
            block=recipe.gptq_block,
            act_order=recipe.act_order,
            sweeps=recipe.gptq_sweeps,
            name=plan.weight,
        )
        return rounded.parts, rounded.order
    if recipe.algorithm == "awq":
        assert moment is not None
        return clip(wide_NK, moment, plan.format, candidates=recipe.candidates), None
    return quantize_weight(wide_NK, plan.format, candidates=recipe.candidates), None


def _rounded_moment(
    chunks: Iterable[Tensor], factor: Tensor | None, format: LinearFormat, statistics: InputStatistics
) -> Tensor:
    """Mean of q q^T over inputs q as the product sees them."""
    moment = InputStatistics.of(_rounded(chunks, factor, format, statistics), moment=True).moment
    assert moment is not None
    return moment


def _rounded(
    chunks: Iterable[Tensor], factor: Tensor | None, format: LinearFormat, statistics: InputStatistics
) -> Iterator[Tensor]:
    """Inputs as the product sees them, float32."""
    limit = _LIMITS.get(format.activations)
    x_scale = None if limit is None else static_scale(statistics, limit)
    for x in chunks:
        values, scale = quantize_activations(x if factor is None else x.float() * factor, format, x_scale)
        yield values if scale is None else values * scale


def _cross_moment(originals: Iterable[Tensor], rounded: Iterable[Tensor]) -> Tensor:
    """Mean of x q^T, [K, K] float32, over the tokens of both."""
    total: Tensor | None = None
    num_tokens = 0
    for x, q in zip(originals, rounded, strict=True):
        if total is None:
            total = torch.zeros((x.shape[1], q.shape[1]), device=x.device)
        total.addmm_(x.float().t(), q)
        num_tokens += x.shape[0]
    assert total is not None
    return total / num_tokens


def emulated(layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The layer as a function of x: inputs rounded as the format says, products in the compute dtype."""
    dense = dequantize_weight(layer.weight, layer.format, dtype)

    def function(x: Tensor) -> Tensor:
        if layer.channel_factor is not None:
            x = (x.float() * layer.channel_factor).to(dtype)
        if layer.order is not None:
            x = x.index_select(-1, layer.order)
        values, scale = quantize_activations(x, layer.format, layer.x_scale)
        product = torch.matmul(values.to(dtype), dense.t())
        product = product if scale is None else (product.float() * scale).to(dtype)
        return product if bias is None else product + bias

    return function


def use_layer(inputs: LayerInput, layer: fx.Node, quantized: QuantizedLayer) -> None:
    """Lets a quantized layer stand for the one that it was made of."""
    bias = layer.args[2] if len(layer.args) > 2 else None
    loaded = None if bias is None else inputs.run.load(bias)
    inputs.set_layer(layer, emulated(_on(quantized, inputs.run.device), loaded, inputs.weight(layer).dtype))


def _on(layer: QuantizedLayer, device: torch.device) -> QuantizedLayer:
    """The layer with all tensors on a device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    stored = layer.weight
    return replace(
        layer,
        weight=QuantizedWeight(
            stored.values.to(device), stored.scale.to(device), moved(stored.zero_point), moved(stored.global_scale)
        ),
        channel_factor=moved(layer.channel_factor),
        order=moved(layer.order),
        x_scale=moved(layer.x_scale),
    )


class _HostCopies:
    """Results in host memory, so that they do not fill the device; a channel factor that layers share stays one tensor."""

    def __init__(self) -> None:
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: QuantizedLayer) -> QuantizedLayer:
        """The layer with its tensors in host memory."""
        copied = _on(layer, torch.device("cpu"))
        factor = layer.channel_factor
        if factor is None or copied.channel_factor is None:
            return copied
        _, shared = self._factors.setdefault(
            id(factor), (factor, copied.channel_factor)
        )  # the first keeps its id in use
        return replace(copied, channel_factor=shared)


def _reads_moment(plan: LayerPlan) -> bool:
    """Whether a layer needs the second moments of its input before that is rounded."""
    if plan.recipe.algorithm == "gptq":
        return plan.format.activations == "none"
    return plan.recipe.algorithm == "awq"


def _enough(statistics: InputStatistics | None, plan: LayerPlan) -> bool:
    """Whether saved statistics do for a layer."""
    return statistics is not None and (statistics.moment is not None or plan.recipe.algorithm not in _MOMENT_ALGORITHMS)


def _groups(plan: Mapping[fx.Node, LayerPlan]) -> list[list[fx.Node]]:
    """Layers that read one value, in order."""
    groups: dict[Any, list[fx.Node]] = {}
    for layer in plan:
        groups.setdefault(layer.args[0], []).append(layer)
    return list(groups.values())
