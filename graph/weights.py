"""The WeightMap: every weight of a Program by name, with shape and dtype, read only when it is asked for.

Passes change weights by naming new ones (concatenated, cast, split, quantized); nothing is read until `load`, so that a model
is never held twice: an engine is built, or an artifact written, one tensor at a time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .linear_format import LinearFormat, Part, part_shapes
from .quant_formats import QuantizedWeight, dequantize_weight, quantize_weight

if TYPE_CHECKING:
    from .stored_weight import StoredPart, StoredWeight

Recipe = dict[str, Any]
"""{"source": name}, {"cast": recipe, "dtype": name}, {"transpose": recipe}, {"concatenate": [recipes], "dim": int},
{"quantize": recipe, "format": text, "candidates": int, "part": a Part}, {"round": recipe, "format": text, "candidates": int} (what
those parts mean, dense) or {"stored": recipe, "part": a StoredPart}."""


@dataclass(frozen=True)
class FileRange:
    """Where the bytes of a tensor lie in a file: row by row, little-endian, nothing between them."""

    path: Path
    offset: int
    """Of the first byte."""


@dataclass(frozen=True)
class Weight:
    """One weight: shape, dtype and how to get it. `load` returns a CPU or device tensor of that shape and dtype.

    recipe: how it is made from the model's own weights, as plain data (see `from_recipe`), so that a cached build can be
    applied to other weights of the same model; None for a constant. make_on: as `load`, for a device that what it is made
    from is moved to first; None where it is not made from others. stored: the parts of a matrix that the checkpoint holds quantized
    (`load` dequantizes it), or None. stored_at: the place of just these bytes in a file, or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    recipe: Recipe | None = None
    make_on: Callable[[torch.device], Tensor] | None = None
    stored: StoredWeight | None = None
    stored_at: FileRange | None = None

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

    def to(self, device: torch.device) -> Tensor:
        """The tensor on `device`; what it is made from is moved there first, and joined, cast or quantized there."""
        return self.load().to(device) if self.make_on is None else self.make_on(device)

    def cast(self, dtype: torch.dtype) -> Weight:
        """The same weight in another dtype."""
        if dtype == self.dtype:
            return self
        recipe = None if self.recipe is None else {"cast": self.recipe, "dtype": str(dtype).removeprefix("torch.")}
        return replace(
            make_weight([self], lambda parts: next(parts).to(dtype), self.shape, dtype, recipe), stored=self.stored
        )

    def transpose(self) -> Weight:
        """A matrix with rows and columns exchanged."""
        rows, columns = self.shape
        recipe = None if self.recipe is None else {"transpose": self.recipe}
        return make_weight([self], lambda parts: next(parts).t().contiguous(), (columns, rows), self.dtype, recipe)

    def named(self, name: str) -> Weight:
        """The weight as one of the model's own, under the name by which recipes refer to it."""
        return replace(self, recipe={"source": name})

    def stored_part(self, part: StoredPart) -> Weight:
        """One of the tensors that the matrix is stored as; `stored` must be set."""
        assert self.stored is not None
        recipe = None if self.recipe is None else {"stored": self.recipe, "part": part}
        return replace(self.stored.parts[part], recipe=recipe)


def make_weight(
    parts: list[Weight],
    make: Callable[[Iterator[Tensor]], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    recipe: Recipe | None = None,
) -> Weight:
    """A weight that `make` makes of the tensors of `parts`, which are read as it asks for them."""
    return Weight(
        shape,
        dtype,
        lambda: make(part.load() for part in parts),
        recipe,
        lambda device: make(part.to(device) for part in parts),
    )


def concatenate(weights: list[Weight], dim: int = 0) -> Weight:
    """Weights side by side along `dim`; the shapes must agree elsewhere and the dtypes everywhere."""
    first = weights[0]
    assert all(w.dtype == first.dtype and len(w.shape) == len(first.shape) for w in weights), weights
    shape = list(first.shape)
    shape[dim] = sum(w.shape[dim] for w in weights)

    def make(parts: Iterator[Tensor]) -> Tensor:
        out: Tensor | None = None
        begin = 0
        for part in parts:
            if out is None:
                out = torch.empty(shape, dtype=part.dtype, device=part.device)
            out.narrow(dim, begin, part.shape[dim]).copy_(part)
            begin += part.shape[dim]
        assert out is not None
        return out

    recipes = [w.recipe for w in weights]
    recipe = None if None in recipes else {"concatenate": recipes, "dim": dim}
    stored = None
    if first.stored is not None and dim == 0:
        others = [w.stored for w in weights[1:] if w.stored is not None]
        stored = first.stored.join(others) if len(others) == len(weights) - 1 else None
    return replace(make_weight(weights, make, tuple(shape), first.dtype, recipe), stored=stored)


# ------------------------------------------------------------------------------------------------------------ quantized
class QuantizedParts:
    """A matrix [N, K] rounded to nearest in a format: the tensors that it is stored as, all from one source.

    The source is read and quantized once for all of them: what was not asked for is kept until it is. candidates: as in
    `quantize_weight`.
    """

    def __init__(self, weight: Weight, format: LinearFormat, candidates: int = 1) -> None:
        self.shapes = part_shapes(format, weight.shape)
        self.weight = weight
        self.format = format
        self.candidates = candidates
        self._kept: dict[Part, Tensor] = {}
        self._lock = threading.Lock()

    def part(self, part: Part) -> Weight:
        """One of the weights; `shapes` names them."""
        shape, dtype = self.shapes[part]
        return Weight(
            shape,
            dtype,
            lambda: self._take(part, None),
            self._recipe("quantize", {"part": part}),
            lambda device: self._take(part, device),
        )

    def dense(self) -> Weight:
        """The matrix that the stored tensors mean, in the source's dtype."""

        def make(parts: Iterator[Tensor]) -> Tensor:
            matrix = next(parts)
            return dequantize_weight(self._quantize(matrix), self.format, matrix.dtype)

        return make_weight([self.weight], make, self.weight.shape, self.weight.dtype, self._recipe("round", {}))

    def _recipe(self, kind: str, more: Recipe) -> Recipe | None:
        source = self.weight.recipe
        if source is None:
            return None
        return {kind: source, "format": str(self.format), "candidates": self.candidates, **more}

    def _quantize(self, matrix: Tensor) -> QuantizedWeight:
        return quantize_weight(matrix, self.format, candidates=self.candidates)

    def _take(self, part: Part, device: torch.device | None) -> Tensor:
        with self._lock:
            if part not in self._kept:
                stored = self._quantize(self.weight.load() if device is None else self.weight.to(device))
                self._kept = {name: getattr(stored, name) for name in self.shapes}
            tensor = self._kept.pop(part)
            return tensor if device is None else tensor.to(device)


# -------------------------------------------------------------------------------------------------------------- recipes
def from_recipe(recipe: Recipe, sources: Mapping[str, Weight]) -> Weight:
    """Makes a weight out of `sources` by a recipe; raises KeyError if a source is missing."""
    return _Remaker(sources).make(recipe)


def from_recipes(recipes: Mapping[str, Recipe], sources: Mapping[str, Weight]) -> dict[str, Weight]:
    """Makes weights out of `sources` by their recipes; the parts of one quantized matrix share its reading. Raises KeyError."""
    remaker = _Remaker(sources)
    return {name: remaker.make(recipe) for name, recipe in recipes.items()}


class _Remaker:
    def __init__(self, sources: Mapping[str, Weight]) -> None:
        self.sources = sources
        self._quantized: dict[str, QuantizedParts] = {}

    def make(self, recipe: Recipe) -> Weight:
        if "source" in recipe:
            return self.sources[recipe["source"]]
        if "cast" in recipe:
            return self.make(recipe["cast"]).cast(getattr(torch, recipe["dtype"]))
        if "transpose" in recipe:
            return self.make(recipe["transpose"]).transpose()
        if "quantize" in recipe:
            return self._parts(recipe, "quantize").part(recipe["part"])
        if "round" in recipe:
            return self._parts(recipe, "round").dense()
        if "stored" in recipe:
            return self.make(recipe["stored"]).stored_part(recipe["part"])
        return concatenate([self.make(part) for part in recipe["concatenate"]], recipe["dim"])

    def _parts(self, recipe: Recipe, kind: str) -> QuantizedParts:
        """The quantized matrix of a recipe, made once for all its parts."""
        text, candidates = recipe["format"], recipe["candidates"]
        key = json.dumps([recipe[kind], text, candidates], sort_keys=True)
        if key not in self._quantized:
            self._quantized[key] = QuantizedParts(self.make(recipe[kind]), LinearFormat.parse(text), candidates)
        return self._quantized[key]


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
