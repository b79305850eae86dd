"""Numbers of four and eight bits that torch has no arithmetic for: e2m1 values (two to a byte) and e8m0 scales.

e2m1 has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. e8m0 is an exponent
alone: byte b means 2^(b - 127), and 255 means NaN. Source: OCP Microscaling Formats (MX)
Specification 1.0 (2023), sections 5.3 and 5.4.

Numbers are filled in by masks: those that where() is given are copied from the host, which waits, and CUDA graphs cannot hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
"""Largest e2m1 number."""
E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn."""
_EXPONENT_BITS = 0xFF
_MANTISSA_BITS = 0x7FFFFF
_E8M0_NAN = 255
_HALF_SMALLEST_NORMAL = 0x00400000
"""The bits of 2^-127 in float32, which is subnormal."""
_FLOAT_NAN = 0x7FC00000


def quotient(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded on every device.

    By a Python number torch divides so on the CPU, and on CUDA multiplies by the rounded reciprocal. Among 16-bit rows of 8-bit
    values many lie between two steps exactly, and one bit of a scale decides where they go.
    """
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def round_to_e2m1(x: Tensor) -> Tensor:
    """The e2m1 number next to each of x, ties to even, saturated at 6: any shape, float32 to float32; NaN stays NaN."""
    size = x.abs()
    step = torch.full_like(size, 0.5).masked_fill_(size >= 2, 1.0).masked_fill_(size >= 4, 2.0)
    return (torch.round(size / step) * step).clamp(max=E2M1_MAX).copysign(x)


def e2m1_codes(x: Tensor) -> Tensor:
    """The four bits (uint8, 0 to 15, bit 3 the sign) of x rounded to e2m1."""
    rounded = round_to_e2m1(x)
    size = rounded.abs()
    code = torch.where(size <= 2, 2 * size, (size + 2).clamp(max=7)).to(torch.uint8)
    return code | (torch.signbit(rounded).to(torch.uint8) << 3)


def pack_halves(codes: Tensor) -> Tensor:
    """uint8 [.., K] of four bits each to uint8 [.., K / 2]: even k in the low half. K is even."""
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def decode_e8m0(scale: Tensor) -> Tensor:
    """uint8 exponents to the float32 powers of two that they mean; 255 to NaN."""
    exponent = scale.to(torch.int32)
    bits = (exponent << 23).masked_fill_(exponent == 0, _HALF_SMALLEST_NORMAL)
    return bits.masked_fill_(exponent == _E8M0_NAN, _FLOAT_NAN).view(torch.float32)


def floor_e8m0(amax: Tensor, max_exponent: int) -> Tensor:
    """The scale of blocks whose largest magnitude is amax (float32, not negative), as uint8, by the rule of the MX specification.

    2^(floor(log2 amax) - max_exponent), section 6.3; `max_exponent` is that of the largest value (2 for e2m1, 8 for e4m3). What is
    above the largest value is then cut off. NaN and infinity make 255.
    """
    exponent = (amax.view(torch.int32) >> 23) & _EXPONENT_BITS
    return (exponent - max_exponent).clamp(0, 254).masked_fill_(~amax.isfinite(), _E8M0_NAN).to(torch.uint8)


def ceil_e8m0(amax: Tensor, largest: float) -> Tensor:
    """As `floor_e8m0`, but the smallest power of two that cuts nothing off: amax / scale is at most `largest`."""
    ratio = quotient(amax, largest)
    bits = ratio.view(torch.int32)
    exponent = ((bits >> 23) & _EXPONENT_BITS) + ((bits & _MANTISSA_BITS) != 0).to(torch.int32)
    return exponent.clamp(0, 254).masked_fill_(~amax.isfinite(), _E8M0_NAN).to(torch.uint8)
