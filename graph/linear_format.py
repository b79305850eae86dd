"""Formats of quantized linear layers: how a weight [N, K] is stored, and what its input is rounded to.

    kind    weight                         scale                                     zero_point        global_scale
    int8    int8 [N, K]                    float32 [N] or [N, K / g]                 uint8, as scale   -
    int4    uint8 [N, K / 2], two a byte   float32 [N] or [N, K / g]                 uint8, as scale   -
    fp8     float8_e4m3fn [N, K]           float32 [], [N], [N, K / g] or            -                 -
                                           [ceil(N / 128), ceil(K / 128)]
    nvfp4   uint8 [N, K / 2] of e2m1       float8_e4m3fn [N, K / 16]                 -                 float32 []
    mxfp4   uint8 [N, K / 2] of e2m1       uint8 (e8m0) [N, K / 32]                  -                 -
    mxfp8   float8_e4m3fn [N, K]           uint8 (e8m0) [N, K / 32]                  -                 -

A weight is (value - zero_point) * scale * global_scale. Of two values in a byte the one with the even k is in the low half.
Integers without a zero point are signed (int4: -8 to 7), with one they are unsigned: int4 0 to 15; int8 0 to 255, of which
value - 128 is stored. e8m0 byte b means 2^(b - 127).

Text of a format: WEIGHTS[:GROUP][:zp]/ACTIVATIONS, such as "int4:g128:zp/none", "int8/int8", "fp8:tensor/fp8_static",
"fp8:block128/fp8_block", "nvfp4/nvfp4". GROUP is g128 (groups along K), tensor (one scale) or block128 (blocks of 128 x 128).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch

WeightKind = Literal["fp8", "int8", "int4", "nvfp4", "mxfp4", "mxfp8"]
Activations = Literal[
    "none", "fp8", "fp8_static", "fp8_block", "int8", "int8_static", "nvfp4", "nvfp4_search", "mxfp4", "mxfp8"
]  # fmt: skip
Part = Literal["values", "scale", "zero_point", "global_scale"]
"""The tensors of a stored weight, in the order in which the operator takes them."""

PARTS: tuple[Part, ...] = get_args(Part)
WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
BLOCK = 128
"""Rows and columns of a block of block-wise fp8, and length of a block of its activations."""
FIXED_GROUPS: dict[str, int] = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
"""Kinds whose groups have one size, by their definition."""
PACKED_KINDS = ("int4", "nvfp4", "mxfp4")
"""Kinds with two values in a byte."""
STATIC_ACTIVATIONS = ("fp8_static", "int8_static")
"""Activations whose scale is a weight, found by calibration."""
_ACTIVATION_BLOCKS = {"fp8_block": BLOCK, "nvfp4": 16, "nvfp4_search": 16, "mxfp4": 32, "mxfp8": 32}
_TEXT = re.compile(r"(?P<weights>\w+)(?::(?P<group>g\d+|tensor|block128))?(?P<zp>:zp)?/(?P<activations>\w+)")


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """How a linear layer's weight is stored and what its input is rounded to. Raises ValueError for what does not go together."""

    weights: WeightKind
    group: int = 0
    """Length along K of what shares a scale: 0 an output row, -1 the matrix, else a group; nvfp4 is 16 and mxfp4, mxfp8 32."""
    block: bool = False
    """fp8 only: blocks of 128 x 128 share a scale; `group` is 128."""
    zero_point: bool = False
    """int4 and int8 only: unsigned values that count from a zero point."""
    activations: Activations = "none"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_KINDS:
            raise ValueError(f"weights are {self.weights!r}; allowed: {', '.join(WEIGHT_KINDS)}")
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations are {self.activations!r}; allowed: {', '.join(ACTIVATIONS)}")
        fixed = FIXED_GROUPS.get(self.weights)
        if fixed is not None:
            if self.group not in (0, fixed):
                raise ValueError(f"{self.weights} has groups of {fixed}, and group is {self.group}; leave it out")
            object.__setattr__(self, "group", fixed)
        if self.group < -1 or self.group % 2 and self.group != -1:
            raise ValueError(f"group is {self.group}; allowed: 0 (a row), -1 (the matrix), or an even number")
        if self.group == -1 and self.weights != "fp8":
            raise ValueError(f"one scale for the matrix (group -1) is for fp8, not {self.weights}; use group 0")
        if self.block and (self.weights != "fp8" or self.group not in (0, BLOCK)):
            raise ValueError(f"blocks are {BLOCK} x {BLOCK} of fp8, not {self.weights} with group {self.group}")
        if self.block:
            object.__setattr__(self, "group", BLOCK)
        if self.zero_point and self.weights not in ("int4", "int8"):
            raise ValueError(f"{self.weights} has no zero point; it is for int4 and int8")

    def __str__(self) -> str:
        return f"{self.weights_text}/{self.activations}"

    @property
    def weights_text(self) -> str:
        """The text of the stored weight alone: the format without its activations."""
        group = ""
        if self.block:
            group = f":block{BLOCK}"
        elif self.weights not in FIXED_GROUPS and self.group:
            group = ":tensor" if self.group < 0 else f":g{self.group}"
        return f"{self.weights}{group}{':zp' if self.zero_point else ''}"

    @classmethod
    def parse(cls, text: str) -> LinearFormat:
        """The format that `str` wrote. Raises ValueError for anything else."""
        return _parse(text)

    @property
    def activation_block(self) -> int:
        """Length along K of what shares a scale of the activations; 0: a token, or the static scale."""
        return _ACTIVATION_BLOCKS.get(self.activations, 0)

    @property
    def bits(self) -> float:
        """Bits of a weight with its share of scale and zero point (groups along K; rows count as free)."""
        bits = 4 if self.weights in PACKED_KINDS else 8
        if self.block:
            return bits + 32 / BLOCK**2
        if self.group <= 0:
            return bits
        scale = 8 if self.weights in FIXED_GROUPS else 32
        return bits + (scale + (8 if self.zero_point else 0)) / self.group


@lru_cache(maxsize=256)
def _parse(text: str) -> LinearFormat:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"format {text!r} is not WEIGHTS[:GROUP][:zp]/ACTIVATIONS, such as 'int4:g128/none'")
    group = match["group"] or "g0"
    return LinearFormat(
        weights=match["weights"],  # type: ignore[arg-type]
        group={"tensor": -1, "block128": BLOCK}.get(group) or int(group[1:] if group[1:].isdigit() else 0),
        block=group.startswith("block"),
        zero_point=match["zp"] is not None,
        activations=match["activations"],  # type: ignore[arg-type]
    )


def check_divides(format: LinearFormat, shape: tuple[int, ...], name: str = "the weight") -> None:
    """Raises ValueError, with the numbers, where a weight [N, K] does not fit the format's groups."""
    if len(shape) != 2:
        raise ValueError(f"{name} is {list(shape)}; a weight in {format} is a matrix [N, K]")
    rows, dim = shape
    group = format.group if format.group > 0 and not format.block else 2 if format.weights in PACKED_KINDS else 1
    for what, size in (("weights", group), ("activations", format.activation_block)):
        if size and dim % size:
            if what == "activations" and format.activations == "fp8_block":
                continue  # the last block is shorter, as the weight's
            raise ValueError(
                f"{name} is {rows} x {dim}, and groups of {size} ({what} of {format}) do not divide its {dim} columns; use a group "
                "that does, or skip the layer"
            )


def part_shapes(format: LinearFormat, shape: tuple[int, ...]) -> dict[Part, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that a weight [N, K] is stored as. Raises ValueError where groups do not divide K."""
    check_divides(format, shape)
    rows, dim = shape
    values: tuple[tuple[int, ...], torch.dtype]
    if format.weights in PACKED_KINDS:
        values = (rows, dim // 2), torch.uint8
    else:
        values = (rows, dim), torch.int8 if format.weights == "int8" else torch.float8_e4m3fn
    scale_dtype = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8, "mxfp8": torch.uint8}
    scale = scale_shape(format, shape)
    parts: dict[Part, tuple[tuple[int, ...], torch.dtype]] = {
        "values": values,
        "scale": (scale, scale_dtype.get(format.weights, torch.float32)),
    }
    if format.zero_point:
        parts["zero_point"] = scale, torch.uint8
    if format.weights == "nvfp4":
        parts["global_scale"] = (), torch.float32
    return parts


def scale_shape(format: LinearFormat, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scale of a weight [N, K]."""
    rows, dim = shape
    if format.block:
        return math.ceil(rows / BLOCK), math.ceil(dim / BLOCK)
    if format.group > 0:
        return rows, dim // format.group
    return (rows,) if format.group == 0 else ()
