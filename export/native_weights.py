"""Weights of linear layers as the native step reads them: bfloat16 where that is exact, int8 and int4 panels of quantized layers.

Layouts are drawn in kernels/step_ops.c and kernels/step_quantized.c.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.linear_format import LinearFormat
from .native_program import Unsupported

_CHUNK_BYTES = (32768, 131072)
"""Weights that a thread takes at a time, least and most: a few microseconds of work, against tens of nanoseconds for the taking."""
_CHUNKS = 32
"""Chunks that a weight is cut into within these bounds: few, since each begins with memory that nothing has asked for ahead."""
_MAX_GROUP = 256
"""Longest group along K: sums of its products of int16 with int8 fit into 32 bits."""
_MAX_EXACT = 130_000
"""Most products of int8 with int8 whose sum fits into 32 bits."""
_INT8_ORDER = [0, 2, 1, 3]
"""The k of the bytes of a word of int8, from the lowest up."""
_INT4_ORDER = (0, 4, 1, 5)
"""The k in the lower halves of the bytes of a word of int4, from the lowest up; the upper half of each has k + 2."""


@dataclass(frozen=True)
class IntegerPanels:
    """A quantized weight [N, K] for LINEAR_INT.

    stored: uint8 [panels, bytes]; num_groups, group: how K, padded, is cut; zero_point: that of all values, where they share one.
    """

    stored: Tensor
    num_outputs: int
    num_groups: int
    group: int
    four_bits: bool
    has_zero_points: bool
    zero_point: int
    per_chunk: int


class WeightStore:
    """Weights of linear layers as the interpreter reads them, each once. panel: outputs in a panel of bfloat16."""

    def __init__(self, panel: int) -> None:
        self.panel = panel
        self.copied_bytes = 0
        self._stored: dict[tuple[int, torch.Size, tuple[int, ...]], tuple[Tensor, tuple[Tensor, int, int]]] = {}
        self._integers: dict[tuple[int, str], tuple[Tensor, IntegerPanels]] = {}

    def linear(self, weight_NK: Tensor) -> tuple[Tensor, int, int]:
        """(tensor, kind, outputs per chunk): bfloat16 panels (drawn in step_ops.c) where exact, else float32 in place."""
        key = (weight_NK.data_ptr(), weight_NK.shape, weight_NK.stride())
        if key not in self._stored:
            packed = self._pack(weight_NK) if sys.byteorder == "little" else None
            stored = weight_NK.contiguous() if packed is None else packed
            if stored is not weight_NK:
                self.copied_bytes += stored.numel() * stored.element_size()
            row_bytes, step = (4 * weight_NK.shape[1], 4) if packed is None else (2 * weight_NK.shape[1], self.panel)
            # the weight itself is kept so that its address stays its own
            self._stored[key] = (
                weight_NK,
                (stored, int(packed is not None), _per_chunk(row_bytes, weight_NK.shape[0], step)),
            )
        return self._stored[key][1]

    def _pack(self, weight_NK: Tensor) -> Tensor | None:
        half = weight_NK.to(torch.bfloat16)
        if not torch.equal(half.float(), weight_NK):
            return None
        num_outputs, dim = half.shape
        half = torch.nn.functional.pad(half, (0, dim % 2, 0, -num_outputs % self.panel))
        return half.unflatten(0, (-1, self.panel)).unflatten(2, (-1, 2)).transpose(1, 2).contiguous()

    def integers(self, values: Tensor, scale: Tensor, zero_point: Tensor | None, format: LinearFormat) -> IntegerPanels:
        """The panels of an int8 or int4 weight as `linear_format` stores it. Raises Unsupported."""
        key = (values.data_ptr(), str(format))
        if key not in self._integers:
            panels = pack_integers(values, scale, zero_point, format, self.panel // 2)
            self.copied_bytes += panels.stored.numel()
            self._integers[key] = values, panels
        return self._integers[key][1]


def _per_chunk(row_bytes: int, num_outputs: int, step: int) -> int:
    """Outputs per chunk, a multiple of `step`."""
    least, most = _CHUNK_BYTES
    chunk_bytes = min(max(row_bytes * num_outputs // _CHUNKS, least), most)
    return max(1, round(chunk_bytes / row_bytes / step)) * step


def group_length(format: LinearFormat, dim: int) -> int:
    """How many k share a scale and an integer sum. Raises Unsupported for groups that are cut at no multiple of a word."""
    word = 8 if format.weights == "int4" else 4
    if format.group > 0:
        fits = [size for size in range(word, min(format.group, _MAX_GROUP) + 1, word) if format.group % size == 0]
        if not fits:
            raise Unsupported(f"groups of {format.group}")
        return fits[-1]
    whole = -(-dim // word) * word
    if format.weights == "int8" and format.activations in ("int8", "int8_static"):
        if dim > _MAX_EXACT:
            raise Unsupported(f"{dim} columns in int8")
        return whole  # one exact sum
    return min(whole, _MAX_GROUP)


def pack_integers(
    values: Tensor, scale: Tensor, zero_point: Tensor | None, format: LinearFormat, panel: int
) -> IntegerPanels:
    """Panels of `panel` outputs, values first turned into unsigned int4 or signed int8."""
    if format.weights not in ("int4", "int8"):
        raise Unsupported(f"{format.weights} weights")
    if sys.byteorder != "little":
        raise Unsupported("integers on a big-endian machine")
    four_bits = format.weights == "int4"
    codes_NK = _codes(values, signed=zero_point is None) if four_bits else values.view(torch.uint8)
    num_outputs, dim = codes_NK.shape
    group = group_length(format, dim)
    num_groups = -(-dim // group)
    pad = (0, num_groups * group - dim, 0, -num_outputs % panel)
    words = torch.nn.functional.pad(codes_NK, pad).view(-1, panel, num_groups, group)
    words = _words(words, format).flatten(2)  # [panels, groups, bytes]
    spread: Callable[[Tensor], Tensor] = lambda part: _by_panel(part, num_groups, panel)  # noqa: E731
    header = [spread(scale.float())]
    if zero_point is not None:
        header.append(spread(zero_point.to(torch.int32) - (0 if four_bits else 128)))
    stored = torch.cat([*(part.view(torch.uint8) for part in header), words], dim=2).flatten(1).contiguous()
    return IntegerPanels(
        stored=stored,
        num_outputs=num_outputs,
        num_groups=num_groups,
        group=group,
        four_bits=four_bits,
        has_zero_points=zero_point is not None,
        zero_point=8 if four_bits and zero_point is None else 0,
        per_chunk=_per_chunk(stored.shape[1] // panel, num_outputs, panel),
    )


def _codes(packed: Tensor, *, signed: bool) -> Tensor:
    """uint8 [N, K / 2] to [N, K] of 0 to 15; signed values count from 8."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return codes ^ 8 if signed else codes


def _words(codes: Tensor, format: LinearFormat) -> Tensor:
    """[panels, panel, groups, group] of codes to the bytes [panels, groups, words, panel, 4]."""
    if format.weights == "int4":
        k = codes.unflatten(-1, (-1, 8))
        codes = torch.stack([k[..., low] | k[..., low + 2] << 4 for low in _INT4_ORDER], dim=-1)
    else:
        codes = codes.unflatten(-1, (-1, 4))[..., _INT8_ORDER]
    return codes.permute(0, 2, 3, 1, 4).contiguous()


def _by_panel(part: Tensor, num_groups: int, panel: int) -> Tensor:
    """A scale or zero point [N] or [N, groups] as [panels, num_groups, panel]; those of outputs that are missing are 0."""
    wide = part[:, None] if part.dim() == 1 else part
    wide = wide.repeat_interleave(num_groups // wide.shape[1], 1)
    wide = torch.nn.functional.pad(wide, (0, 0, 0, -wide.shape[0] % panel))
    return wide.unflatten(0, (-1, panel)).transpose(1, 2).contiguous()
