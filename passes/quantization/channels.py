"""Where the channels of a layer's input come from, and which of them are copies of one that was computed once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from ..match import VIEWS, is_call, value
from ..resolve_masks import ATTENTION

Heads = tuple[int, int, int]
"""(key/value heads G, query heads for each of them R, value head size V): channels of attention's output are [G, R, V]."""


def value_heads(x: fx.Node) -> Heads | None:
    """The heads of x [.., G * R * V] where it is the output of camshaft.attention, viewed flat; else None."""
    while is_call(x, *VIEWS):
        (x, *_) = cast(Any, x.args)
    if not is_call(x, ATTENTION):
        return None
    num_heads, size = (int(n) for n in value(x).shape[2:])
    kv_heads = int(value(cast(fx.Node, x.args[2])).shape[1])
    return kv_heads, num_heads // kv_heads, size


def tied(scale_K: Tensor, heads: Heads | None) -> Tensor:
    """Scales that are alike (by geometric mean) for channels that weigh one channel of the values, so that they can be its own."""
    if heads is None or heads[1] == 1:
        return scale_K
    mean = scale_K.log().unflatten(0, heads).mean(1, keepdim=True).exp()
    return mean.expand(heads).flatten().contiguous()


def untied(factor_K: Tensor, heads: Heads) -> Tensor | None:
    """The factors [G * V] of the values' channels that `tied` ones [G * R * V] mean; None where copies differ."""
    spread = factor_K.unflatten(0, heads)
    return spread[:, 0].flatten() if torch.equal(spread, spread[:, :1].expand_as(spread)) else None
