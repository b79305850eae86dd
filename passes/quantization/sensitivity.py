"""Sensitivity: what each layer's output loses in each format, and formats chosen for all layers under one budget.

A layer's error in a format is the squared error of its output over the output's squared norm, weights rounded to nearest, inputs
as the format rounds them, for a sample of calibration tokens. From the formats with the fewest bits on, layers are raised step by
step, always where the error falls most for a bit (greedy, which solves the integer program of HAWQ-V3, Yao et al. 2020, well
enough when the steps are many). A layer's steps are the lower convex hull of its (bits, error), so that no step hides a better one.

    max_bits               steps are taken while the weights' average stays within the budget
    max_activation_bits    the same with the bits of what the layers read, each number counted as often as it is multiplied
    max_error              the fewest steps whose quantized model, run on calibration tokens, is within the KL divergence, found by
                           bisection
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ...graph.linear_format import Activations, LinearFormat, check_divides
from ...graph.program import Program
from ...graph.quant_formats import quantize_weight
from .algorithm import LayerPlan, QuantizedLayer
from .calibration import CalibrationData
from .recipe import Recipe

if TYPE_CHECKING:
    from .calibrator import Calibrator

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 1024
"""Tokens that errors of layers are measured on."""
KL_TOKENS = 2048
"""Tokens that the divergence of a whole model is measured on."""
ACTIVATION_BITS: dict[Activations, float] = {
    "none": 16, "fp8": 8, "fp8_static": 8, "fp8_block": 8 + 32 / 128, "int8": 8, "int8_static": 8,
    "nvfp4": 4 + 8 / 16, "nvfp4_search": 4 + 8 / 16, "mxfp4": 4 + 8 / 32, "mxfp8": 8 + 8 / 32,
}  # fmt: skip
"""Bits of a number of a layer's input with its share of a block's scale (a token's counts as free)."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One format of one layer: None leaves it as it is. bits: that are budgeted. error: relative squared error of its output."""

    format: LinearFormat | None
    bits: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """Raises one layer to a format of more bits; gain: error that goes, for a bit that comes."""

    layer: fx.Node
    choice: Choice
    added_bits: float
    gain: float


def measure(
    calibrator: Calibrator, program: Program, plan: Mapping[fx.Node, LayerPlan], formats: Sequence[LinearFormat]
) -> dict[fx.Node, list[Choice]]:
    """The error of every layer in every format that its groups allow, and as it is (0), from one run of the unquantized model."""
    found: dict[fx.Node, list[Choice]] = {}
    sample = replace(calibrator, data=_first(calibrator.tokens, SAMPLE_TOKENS))
    for inputs in sample.run(program).inputs_of(list(plan)):
        x = torch.cat(list(inputs.chunks()))
        for layer in inputs.layers:
            weight = inputs.weight(layer)
            choices = [Choice(format=None, bits=weight.numel() * weight.dtype.itemsize * 8.0, error=0.0)]
            exact = torch.matmul(x, weight.t()).float()
            for format in dict.fromkeys((plan[layer].format, *formats)):
                if _fits(format, weight):
                    error = _error(x, weight, exact, format)
                    choices.append(Choice(format=format, bits=weight.numel() * format.bits, error=error))
            found[layer] = choices
    return found


def upgrades(choices: Mapping[fx.Node, list[Choice]]) -> tuple[dict[fx.Node, Choice], list[Step]]:
    """(the choice of the fewest bits for each layer, all steps up from there, those that gain most first)."""
    start: dict[fx.Node, Choice] = {}
    steps: list[Step] = []
    for layer, options in choices.items():
        hull = _lower_hull(options)
        start[layer] = hull[0]
        for low, high in zip(hull, hull[1:]):
            added = high.bits - low.bits
            steps.append(Step(layer=layer, choice=high, added_bits=added, gain=(low.error - high.error) / added))
    return start, sorted(
        steps, key=lambda step: -step.gain
    )  # along a hull gains fall: a layer's steps keep their order


def assign_formats(
    calibrator: Calibrator, program: Program, plan: Mapping[fx.Node, LayerPlan], recipe: Recipe
) -> dict[fx.Node, LayerPlan]:
    """The plan with a format for each layer under the recipe's budget; what stays as it is, is left out.

    Raises ValueError where the budget cannot be met: the formats with the fewest bits already have more.
    """
    choices = measure(calibrator, program, plan, recipe.alternatives)
    if recipe.max_activation_bits is not None:
        choices = {layer: _of_activations(options, _numel(program, layer)) for layer, options in choices.items()}
    start, steps = upgrades(choices)
    for name in ("max_bits", "max_activation_bits"):
        budget = getattr(recipe, name)
        if budget is not None:
            taken = _within_bits(start, steps, budget, sum(_numel(program, layer) for layer in plan), name)
            return _apply(plan, start, taken)
    assert recipe.max_error is not None
    divergence = _Divergence(calibrator, program)
    low, high = 0, len(steps)  # with all steps every layer is as it is, or as good as that
    while low < high:
        middle = (low + high) // 2
        found = divergence(_apply(plan, start, steps[:middle]))
        logger.info("mixed precision: %d of %d steps, KL %.5f nats", middle, len(steps), found)
        low, high = (low, middle) if found <= recipe.max_error else (middle + 1, high)
    return _apply(plan, start, steps[:low])


def _of_activations(options: Sequence[Choice], num_weights: int) -> list[Choice]:
    """The choices that quantize a layer, with the bits of its inputs in the place of its weights': one input number a weight."""
    return [
        replace(option, bits=num_weights * ACTIVATION_BITS[option.format.activations])
        for option in options
        if option.format is not None
    ]


def _within_bits(
    start: Mapping[fx.Node, Choice], steps: list[Step], budget: float, num_weights: int, name: str
) -> list[Step]:
    """The steps that fit, in order; a layer whose step does not fit takes none behind it."""
    left = budget * num_weights - sum(choice.bits for choice in start.values())
    if left < 0:
        least = sum(choice.bits for choice in start.values()) / num_weights
        raise ValueError(
            f"{name} is {budget:g} bits, and the smallest formats of the recipe take {least:.3f}; raise it, or give "
            "smaller alternatives"
        )
    taken: list[Step] = []
    closed: set[fx.Node] = set()
    for step in steps:
        if step.layer in closed or step.added_bits > left:
            closed.add(step.layer)
            continue
        taken.append(step)
        left -= step.added_bits
    return taken


def _apply(
    plan: Mapping[fx.Node, LayerPlan], start: Mapping[fx.Node, Choice], steps: list[Step]
) -> dict[fx.Node, LayerPlan]:
    chosen = {**start, **{step.layer: step.choice for step in steps}}
    return {
        layer: replace(item, format=choice.format)
        for layer, item in plan.items()
        if (choice := chosen[layer]).format is not None
    }


class _Divergence:
    """KL divergence of a program with quantized layers from the program itself, nats per token, on the first calibration tokens."""

    def __init__(self, calibrator: Calibrator, program: Program) -> None:
        self._calibrator = calibrator
        self._sample = replace(calibrator, data=_first(calibrator.tokens, KL_TOKENS))
        self._program = program
        self._reference = [log_probs.cpu() for log_probs in self._log_probs({})]

    def __call__(self, plan: Mapping[fx.Node, LayerPlan]) -> float:
        layers = self._calibrator.quantize(self._program, plan) if plan else {}
        total, count = 0.0, 0
        for expected, actual in zip(self._reference, self._log_probs(layers), strict=True):
            expected = expected.to(actual.device)
            total += float((expected.exp() * (expected - actual)).sum())
            count += expected.shape[0]
        return total / count

    def _log_probs(self, layers: Mapping[fx.Node, QuantizedLayer]) -> Iterator[Tensor]:
        from .calibrator import use_layer

        run = self._sample.run(self._program)
        for inputs in run.inputs_of(list(layers), to_end=True):
            for layer in inputs.layers:
                use_layer(inputs, layer, layers[layer])
        for logits, _ in run.outputs():
            yield logits.flatten(0, -2).float().log_softmax(-1)


def _first(data: CalibrationData, num_tokens: int) -> CalibrationData:
    """The first sequences, as many as make up `num_tokens`."""
    sequences: list[tuple[int, ...]] = []
    for sequence in data.sequences:
        sequences.append(sequence[: num_tokens - sum(map(len, sequences))])
        if sum(map(len, sequences)) >= num_tokens:
            break
    return CalibrationData(sequences=tuple(sequences))


def _fits(format: LinearFormat, weight: Tensor) -> bool:
    try:
        check_divides(format, tuple(weight.shape))
    except ValueError:
        return False
    return True


def _error(x: Tensor, weight: Tensor, exact: Tensor, format: LinearFormat) -> float:
    from .calibrator import emulated

    layer = QuantizedLayer(format=format, weight=quantize_weight(weight, format, candidates=8))
    if format.activations in ("fp8_static", "int8_static"):
        limit = 448.0 if format.activations == "fp8_static" else 127.0
        layer = replace(layer, x_scale=x.abs().amax().float() / limit)
    difference = emulated(layer, None, x.dtype)(x).float() - exact
    energy = float(exact.square().sum())
    return float(difference.square().sum()) / energy if energy > 0 else 0.0


def _lower_hull(options: list[Choice]) -> list[Choice]:
    """The choices that no mixture of two others beats in both bits and error, by rising bits."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda choice: (choice.bits, choice.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(low: Choice, high: Choice) -> float:
    return (high.error - low.error) / max(high.bits - low.bits, 1e-9)


def _numel(program: Program, layer: fx.Node) -> int:
    spec = program.input_of(layer.args[1])
    assert spec is not None
    rows, columns = program.weights[spec.key].shape
    return rows * columns
