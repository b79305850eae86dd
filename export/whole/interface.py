"""The interface of an exported graph: plain names, dtypes and shapes of what goes in and out, and what updates what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...graph.program import InputSpec, Program

_SIZES = {
    "token_ids": ("batch", "num_tokens"),
    "block_tables": ("batch", "blocks_per_sequence"),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output. shape: a number, or the name of a size that varies; updates: of an output, the input it replaces."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    updates: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """Plain data for export.json."""
        entry: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        return entry if self.updates is None else {**entry, "updates": self.updates}


@dataclass(frozen=True, kw_only=True)
class Interface:
    """Inputs in the order token_ids, positions, last_rows, paging, caches; outputs logits, then caches."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def name_of(self, spec: InputSpec) -> str:
        """The plain name of a graph input that is no weight."""
        return input_name(spec)


def input_name(spec: InputSpec) -> str:
    """ "k_cache.0" for the cache "k.0"; other inputs keep their keys."""
    if spec.kind != "cache":
        return spec.key
    kind, layer = spec.key.split(".")
    return f"{kind}_cache.{layer}"


def describe_interface(program: Program) -> Interface:
    """The interface of a program that `expose_cache` rewrote. Inputs that the model does not read are left out."""
    order = ("token_ids", "positions", "last_rows", "block_tables", "slot_mapping")
    pairs = [(node, spec) for node, spec in program.placeholders() if spec.kind != "weight"]
    pairs.sort(key=lambda pair: (order.index(pair[1].key), 0) if pair[1].key in order else _cache_order(pair[1]))
    sizes: dict[str, str] = {}
    for node, spec in pairs:
        names = _SIZES.get(spec.key, ("num_blocks",) if spec.kind == "cache" and len(spec.shape) == 4 else ())
        for size, name in zip(node.meta["val"].shape, names):
            if not isinstance(size, int):
                sizes.setdefault(str(size), name)  # the batch of a linear cache is that of token_ids
    inputs = tuple(
        Tensor(name=input_name(spec), dtype=_name(node.meta["val"]), shape=_shape(node.meta["val"], sizes))
        for node, spec in pairs
    )
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    caches = [tensor for tensor in inputs if "_cache." in tensor.name]
    logits = results[0].meta["val"]
    outputs = (
        Tensor(name="logits", dtype=_name(logits), shape=_shape(logits, sizes)),
        *(
            Tensor(name=t.name.replace("_cache.", "_cache_out."), dtype=t.dtype, shape=t.shape, updates=t.name)
            for t in caches
        ),
    )
    return Interface(inputs=inputs, outputs=outputs)


def _cache_order(spec: InputSpec) -> tuple[int, int]:
    kind, layer = spec.key.split(".")
    return 100 + int(layer), "kv".index(kind)


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shape(value: torch.Tensor, sizes: dict[str, str]) -> tuple[int | str, ...]:
    return tuple(int(size) if isinstance(size, int) else sizes[str(size)] for size in value.shape)
