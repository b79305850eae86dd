"""quantize_linear: linear layers in the formats that a recipe gives them.

    before                                          after
    y = linear(x, w, bias)                          y = camshaft.quantized_linear(x, values, scale, zero_point, global_scale,
    x [.., K], w [N, K]                                     bias, x_scale, format)

    channels that an algorithm scales or reorders   x' = index_select(x * factor [K], -1, order [K]), which is what y reads

    format fp8/fp8 (a scale per row and per token)  xq, xs = camshaft.quantize_rows(x)
                                                    y = camshaft.scaled_linear(xq, xs, w8, ws, bias, dtype)
    xq [.., K] float8_e4m3fn, xs [.., 1] float32    w8 [N, K] float8_e4m3fn, ws [N] float32

    no kernel, and the recipe has dequantize        y = linear(x, w', bias), w' = w rounded to its format, in the dtype of w

The formats are those of `graph.linear_format`. Rounding to nearest needs the weight alone, which is read and quantized when the
engine is built; what needs the layers' inputs is asked of `quantizer`. Layers that read one x share what is made of it. Runs behind
the fuse passes, so that joined projections are one product. What stays as it is, and why, stands in the program's notes: what makes
the logits and routers (unless the recipe says otherwise), what the recipe leaves out, computed weights, experts (camshaft.moe) and,
in fp8/fp8, what `quantize_fp8.obstacle` names. Numerics: quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..graph.program import Program
from .base import GraphPass, Stage
from .match import value
from .quantization.algorithm import LayerPlan, LayerQuantizer, QuantizedLayer
from .quantization.plan import plan_layers
from .quantization.recipe import Recipe
from .quantization.rewrite import LayerRewriter
from .quantization.support import KernelSupport


@dataclass
class QuantizeLinear(GraphPass):
    """Brings linear layers with a stored weight to a recipe's formats.

    quantizer: quantizes by calibration data; needed where the recipe is calibrated. kernels: of the target; None: the operators'
    definitions run every format.
    """

    recipe: Recipe
    quantizer: LayerQuantizer | None = None
    kernels: KernelSupport | None = None

    name = "quantize_linear"
    stage = Stage.FUSE
    numerics = "quantized"

    def options(self) -> dict[str, Any]:
        digest = None if self.quantizer is None else self.quantizer.digest()
        return {
            "recipe": self.recipe.to_json(),
            "calibration": digest,
            "kernels": None if self.kernels is None else self.kernels.where,
        }

    def run(self, program: Program) -> int:
        plan = plan_layers(program, self.recipe)
        layers: Mapping[Any, LayerPlan] = plan.layers
        found: Mapping[Any, QuantizedLayer] = {}
        if self.recipe.calibrated and layers:
            if self.quantizer is None:
                raise ValueError(needs_calibration(self.recipe))
            if self.recipe.mixed:
                layers = self.quantizer.assign(program, layers, self.recipe)
                for node in plan.layers.keys() - layers.keys():
                    plan.kept["the budget leaves it as it is"].append(plan.layers[node].weight)
            found = self.quantizer.quantize(program, layers)
        missing = {node: self._missing(layer, value(node.args[1]).shape) for node, layer in layers.items()}
        rewriter = LayerRewriter(program)
        for node, layer in layers.items():
            dense = missing[node] is not None and layer.recipe.dequantize
            rewriter.replace(node, layer, found.get(node), dense=dense)
        formats = Counter((str(layer.format), _outcome(layer, missing[node])) for node, layer in layers.items())
        _note(program, formats, rewriter, plan.kept)
        return rewriter.count

    def _missing(self, layer: LayerPlan, shape: tuple[int, ...]) -> str | None:
        """Why the target has no kernel for a layer, or None. Raises ValueError where that is not allowed."""
        reason = None if self.kernels is None else self.kernels.missing(layer.format, tuple(shape))
        if reason is None or self.kernels is None or layer.recipe.dequantize or not self.kernels.required:
            return reason
        raise ValueError(
            f"{layer.weight} in {layer.format}: {self.kernels.where} has no kernel for it ({reason}); choose another recipe or "
            "group, skip the layer, or set the recipe's dequantize (weights in the compute dtype)"
        )


def needs_calibration(recipe: Recipe) -> str:
    """What to say where a calibrated recipe has no data."""
    why = recipe.algorithm if recipe.algorithm != "round" else "a static scale, or a budget"
    return (
        f"the recipe needs calibration data ({why}): give calibration=texts or token ids, --calibration FILE on the command line, "
        "or a recipe without, such as 'fp8', 'int8' or 'int4'"
    )


def _outcome(layer: LayerPlan, missing: str | None) -> str:
    """What the report says of a layer without a kernel."""
    if missing is None:
        return ""
    how = "rounded, and stored in the compute dtype" if layer.recipe.dequantize else "run by the operator's definition"
    return f" ({how}: {missing})"


def _note(
    program: Program, formats: Counter[tuple[str, str]], work: LayerRewriter, kept: Mapping[str, list[str]]
) -> None:
    """Adds what was done, and what was left and why, to the program's notes, which the build's report shows."""
    if not formats and not kept:
        return
    lines = []
    if formats:
        counts = ", ".join(f"{count} linear layers in {format}{how}" for (format, how), count in formats.items())
        sizes = f"{work.bytes_before / 1e6:.1f} MB of weights before, {work.bytes_after / 1e6:.1f} MB now"
        lines.append(f"quantized: {counts}; {sizes}")
    for reason, names in kept.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"not quantized: {names[0]}{more}: {reason}")
    program.info = {**program.info, "notes": (*program.info.get("notes", ()), *lines)}
