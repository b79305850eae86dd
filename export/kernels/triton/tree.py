"""Rows of token trees: what they see of their own sequence's rows, and how far they are from it (the masks of reference.py).

Bits between a row's own and a key's are the ancestors between them, which say how many positions the row is behind the key:

    key                  context ......... | row 0  1  2  3
    mask 1101 (row 3)    1 1 1 1 ... 1 1 1 |     1  0  1  1     2 positions behind row 0, 1 behind row 2
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def num_bits(x):
    # Set bits of x (uint64) as int32: sums of 2, 4 and 8 bits side by side, then of all bytes (Warren 2012, section 5-1)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def load_tree(tree_mask, packed_row, row, keep):
    # The masks of rows as uint64, without bits of rows behind their own; row: their places in the sequence's rows. 0: no tree.
    mask = tl.load(tree_mask + packed_row, mask=keep, other=0).to(tl.uint64, bitcast=True)
    behind = (63 - tl.minimum(row, 63)).to(tl.uint64)
    return (mask << behind) >> behind


@triton.jit
def place_in_tree(tree, key_row, distance, visible):
    # Corrects, for the rows that `tree` [M] has a mask for, distance [M, N] (key minus row, int32) and visible [M, N] to the
    # keys of the sequence's own rows, key_row [N] (below 0: of the context).
    at = tl.minimum(tl.maximum(key_row, 0), 63).to(tl.uint64)
    rest = tree[:, None] >> at[None, :]
    inside = (tree != 0)[:, None] & (key_row >= 0)[None, :]
    seen = ((rest & 1) != 0) & (key_row < 64)[None, :]
    return tl.where(inside, -num_bits(rest >> 1), distance), tl.where(inside, seen, visible)
