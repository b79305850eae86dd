"""The WeightMap: every weight of a Program by name, with shape and dtype, read only when it is asked for.

Passes change weights by naming new ones (concatenated, cast, split); nothing is read until `load`, so that a model is
never held twice: an engine is built, or an artifact written, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Recipe = dict[str, Any]
"""{"source": name}, {"cast": recipe, "dtype": name}, {"transpose": recipe} or {"concatenate": [recipes], "dim": int}."""


@dataclass(frozen=True)
class Weight:
    """One weight: shape, dtype and how to get it. `load` returns a CPU or device tensor of that shape and dtype.

    recipe: how it is made from the model's own weights, as plain data (see `from_recipe`), so that a cached build can be
    applied to other weights of the same model; None for a constant.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    recipe: Recipe | None = None

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
        recipe = None if self.recipe is None else {"cast": self.recipe, "dtype": str(dtype).removeprefix("torch.")}
        return Weight(self.shape, dtype, lambda: load().to(dtype), recipe)

    def transpose(self) -> Weight:
        """A matrix with rows and columns exchanged."""
        load = self.load
        rows, columns = self.shape
        recipe = None if self.recipe is None else {"transpose": self.recipe}
        return Weight((columns, rows), self.dtype, lambda: load().t().contiguous(), recipe)

    def named(self, name: str) -> Weight:
        """The weight as one of the model's own, under the name by which recipes refer to it."""
        return Weight(self.shape, self.dtype, self.load, {"source": name})


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

    recipes = [w.recipe for w in weights]
    recipe = None if None in recipes else {"concatenate": recipes, "dim": dim}
    return Weight(tuple(shape), first.dtype, load, recipe)


def from_recipe(recipe: Recipe, sources: Mapping[str, Weight]) -> Weight:
    """Makes a weight out of `sources` by a recipe; raises KeyError if a source is missing."""
    if "source" in recipe:
        return sources[recipe["source"]]
    if "cast" in recipe:
        return from_recipe(recipe["cast"], sources).cast(getattr(torch, recipe["dtype"]))
    if "transpose" in recipe:
        return from_recipe(recipe["transpose"], sources).transpose()
    return concatenate([from_recipe(part, sources) for part in recipe["concatenate"]], recipe["dim"])


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
