"""What a quantization algorithm is given and gives back: the interface between the insertion pass and algorithms that see data.

`QuantizeLinear` decides which layers are quantized and in which format (a plan). Rounding to nearest needs the weight alone, and
the pass does it itself. Whatever needs the layers' inputs is asked of a `LayerQuantizer`, once, for all layers of the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx

from ...graph.linear_format import LinearFormat
from ...graph.program import Program
from ...graph.quant_formats import QuantizedWeight
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is to be done with one linear layer."""

    weight: str
    """Key of its weight [N, K] in the WeightMap."""
    format: LinearFormat
    recipe: Recipe
    """Algorithm and its options: the recipe itself, or an override's."""


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What an algorithm made of one linear layer: y = quantized_linear((x * channel_factor)[..., order], weight, ..., x_scale)."""

    format: LinearFormat
    weight: QuantizedWeight
    """Stored tensors of the weight, its columns divided by `channel_factor` and then ordered as `order` says; CPU or device."""
    channel_factor: Tensor | None = None
    """float32 [K], or None: what the input's channels are multiplied by (AWQ, SmoothQuant)."""
    order: Tensor | None = None
    """int64 [K], or None: column k of the stored weight belongs to channel order[k] of the input (GPTQ's act-order)."""
    x_scale: Tensor | None = None
    """float32 [], or None: static scale of the input, where the format has one."""


class Observer(Protocol):
    """Sees values of a program on calibration data."""

    def digest(self) -> str:
        """Hex digits that change with the data; part of a build's key."""
        ...

    def values_of(self, program: Program, nodes: Collection[fx.Node]) -> Iterator[tuple[fx.Node, Iterator[Tensor]]]:
        """Each of the nodes of a program that is not paged, in graph order, with its values on the tokens, piece by piece."""
        ...


class LayerQuantizer(Observer, Protocol):
    """Quantizes layers by what their inputs are; `quantization.calibrator.Calibrator` does it on calibration data."""

    def assign(
        self, program: Program, plan: Mapping[fx.Node, LayerPlan], recipe: Recipe
    ) -> Mapping[fx.Node, LayerPlan]:
        """Mixed precision: the plan with formats chosen under the recipe's budget. Layers that it leaves out stay unquantized."""
        ...

    def quantize(self, program: Program, plan: Mapping[fx.Node, LayerPlan]) -> Mapping[fx.Node, QuantizedLayer]:
        """Quantizes every layer of the plan (aten.linear nodes of a canonical, fused program that is not paged).

        Layers whose algorithm is "round" are among them: later layers must see what those lost. The program stays as it is.
        Raises ValueError for too little data, and for inputs with NaN or Inf.
        """
        ...
