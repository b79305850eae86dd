"""Bit layouts: integers in 32-bit words, and two values to a byte.

word = v0 | v1 << bits | v2 << 2 bits ...        the first value lies in the lowest bits
byte = v[2 i] | v[2 i + 1] << 4                  graph.quant_ops: the first value in the low half
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.small_floats import pack_halves


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [.., W] -> uint8 [.., W * 32 / bits], values 0 to 2^bits - 1. bits: 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits in 32-bit words, allowed: 4, 8")
    octets = words.contiguous().view(torch.uint8)  # little endian: the lowest byte is the first
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def stored_integers(values: Tensor, bits: int, signed: bool) -> Tensor:
    """Unsigned values, uint8 [N, K], in the stored form of `graph.linear_format`; signed: 2^(bits - 1) becomes zero.

    4 bits: uint8 [N, K / 2], two's complement in each half where signed. 8 bits: int8 [N, K], value - 128 either way.
    """
    if bits == 8:
        return (values ^ 128).view(torch.int8)
    return pack_halves(values ^ 8 if signed else values)  # v - 8 in two's complement is v with its upper bit turned
