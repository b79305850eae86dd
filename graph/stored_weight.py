"""Matrices that a checkpoint stores quantized: the tensors of their format, beside the dense matrix that they mean.

A `Weight` whose `stored` is set can be loaded as any other (dequantized, wherever a pass or an operator needs numbers), and a
linear layer can read its parts instead. What passes do to the weight, its parts follow: joined rows stay quantized where the
formats allow it, a cast changes nothing, and a transposed matrix has no parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .linear_format import BLOCK, LinearFormat, part_shapes
from .quant_formats import QuantizedWeight, dequantize_weight
from .weights import Weight, concatenate, make_weight

StoredPart = Literal["values", "scale", "zero_point", "global_scale", "input_scale", "order"]
"""The tensors of `linear_format`; input_scale float32 [], the static scale of the layer's input; and order int64 [K], where
columns of the values stand in another order than the input's: column k belongs to x[..., order[k]]."""

_ALONE = ("global_scale", "input_scale", "order")
"""Parts of which there is one for the matrix: matrices can be joined where they are equal."""


@dataclass(frozen=True)
class StoredWeight:
    """A matrix [N, K] as stored. parts: by name, lazily read; those of `linear_format` have its shapes and dtypes.

    equal: fingerprints of the parts of which a joined matrix has one; matrices with other ones stay apart.
    """

    format: LinearFormat
    shape: tuple[int, int]
    parts: Mapping[StoredPart, Weight]
    equal: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected: dict[str, object] = {name: part for name, part in part_shapes(self.format, self.shape).items()}
        if "input_scale" in self.parts:
            expected["input_scale"] = (), torch.float32
        if "order" in self.parts:
            expected["order"] = self.shape[1:], torch.int64
        found = {name: (part.shape, part.dtype) for name, part in self.parts.items()}
        assert found == expected, (str(self.format), found, expected)

    @property
    def identity(self) -> str:
        """What a graph that reads the parts depends on."""
        return f"{self.format} {sorted(self.equal.items())}"

    @property
    def joins_as(self) -> tuple[str, ...] | None:
        """What must be equal for rows to be put below each other; None where that cannot be done.

        Scales of whole matrices become scales of rows. Blocks of 128 rows must not be cut.
        """
        if self.format.block and self.shape[0] % BLOCK:
            return None
        return (str(_by_rows(self.format)), *(f"{name}={print}" for name, print in sorted(self.equal.items())))

    def join(self, others: Sequence[StoredWeight]) -> StoredWeight | None:
        """The rows of this matrix and of others below each other, or None where they have no common format."""
        members = [self, *others]
        if any(m.joins_as is None or m.joins_as != self.joins_as for m in members):
            return None
        members = [m._with_row_scales() for m in members]
        joined: dict[StoredPart, Weight] = {}
        for name, part in members[0].parts.items():
            joined[name] = part if name in _ALONE else concatenate([m.parts[name] for m in members])
        shape = (sum(m.shape[0] for m in members), self.shape[1])
        return StoredWeight(members[0].format, shape, joined, self.equal)

    def _with_row_scales(self) -> StoredWeight:
        if self.format.group != -1:
            return self
        rows = self.shape[:1]
        scale = make_weight(
            [self.parts["scale"]], lambda parts: next(parts).expand(rows).contiguous(), rows, torch.float32
        )
        return replace(self, format=_by_rows(self.format), parts={**self.parts, "scale": scale})

    def dense(self) -> Weight:
        """The float32 matrix [N, K] that the parts mean, columns in the input's order, with `stored` set to them."""
        names = [name for name in self.parts if name != "input_scale"]

        def make(parts: Iterator[Tensor]) -> Tensor:
            tensors = dict(zip(names, parts))
            order = tensors.pop("order", None)
            matrix = dequantize_weight(QuantizedWeight(**tensors), self.format)
            return matrix if order is None else torch.empty_like(matrix).index_copy_(1, order, matrix)

        made = make_weight([self.parts[name] for name in names], make, self.shape, torch.float32)
        return replace(made, stored=self)


def _by_rows(format: LinearFormat) -> LinearFormat:
    return replace(format, group=0) if format.group == -1 else format
