"""The WeightMap: every weight of a Program by name, with shape and dtype, read only when it is asked for.

Passes change weights by naming new ones (concatenated, cast, split); nothing is read until `load`, so that a model is
never held twice: an engine is built, or an artifact written, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weight:
    """One weight: shape, dtype and how to get it. `load` returns a CPU or device tensor of that shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Weight:
        """A weight that is already in memory (kept by reference)."""
        tensor = tensor.detach()
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def cast(self, dtype: torch.dtype) -> Weight:
        """The same weight in another dtype."""
        if dtype == self.dtype:
            return self
        load = self.load
        return Weight(self.shape, dtype, lambda: load().to(dtype))

    def map(self, shape: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> Weight:
        """The weight after `function`, which must return a tensor of `shape` in the same dtype."""
        load = self.load
        return Weight(shape, self.dtype, lambda: function(load()))


def concatenate(weights: list[Weight], dim: int = 0) -> Weight:
    """Weights side by side along `dim`; the shapes must agree elsewhere and the dtypes everywhere."""
    first = weights[0]
    assert all(w.dtype == first.dtype and len(w.shape) == len(first.shape) for w in weights), weights
    shape = list(first.shape)
    shape[dim] = sum(w.shape[dim] for w in weights)
    loads = [w.load for w in weights]

    def load() -> Tensor:
        out: Tensor | None = None
        begin = 0
        for read in loads:
            part = read()
            if out is None:
                out = torch.empty(shape, dtype=part.dtype, device=part.device)
            out.narrow(dim, begin, part.shape[dim]).copy_(part)
            begin += part.shape[dim]
        assert out is not None
        return out

    return Weight(tuple(shape), first.dtype, load)


class WeightMap(Mapping[str, Weight]):
    """Names to weights, in the order in which the model names them."""

    def __init__(self, weights: Mapping[str, Weight] | None = None) -> None:
        self._weights: dict[str, Weight] = dict(weights or {})

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, name: str, weight: Weight) -> str:
        """Adds a weight and returns its name; a taken name gets a numeric suffix."""
        unique, count = name, 1
        while unique in self._weights:
            unique, count = f"{name}_{count}", count + 1
        self._weights[unique] = weight
        return unique

    def copy(self) -> WeightMap:
        """A shallow copy: passes add to it without touching the original."""
        return WeightMap(self._weights)

    def only(self, names: set[str]) -> WeightMap:
        """The entries that are in `names`."""
        return WeightMap({name: weight for name, weight in self._weights.items() if name in names})

    @property
    def num_bytes(self) -> int:
        """Size of all weights in bytes."""
        return sum(weight.num_bytes for weight in self._weights.values())
