"""Program: one traced model on its way through the passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from .weights import WeightMap

InputKind = Literal["weight", "token", "cache", "metadata", "user"]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One graph input: a placeholder's name and what is bound to it.

    kind: "weight" (key names an entry of the WeightMap), "token" (a per-token tensor: token_ids, positions),
    "cache" (key is "k.LAYER" or "v.LAYER"), "metadata" (paging metadata of a step), "user" (an argument of a module that is
    no language model).
    """

    name: str
    kind: InputKind
    key: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """KV cache of one attention layer: sizes per token, and the sliding window in tokens (0: full attention)."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """KV caches of a Program: one entry per attention layer, in graph order, and the groups that share block tables.

    Layers with the same window share a group; `groups[g]` lists its layers and `group_of(layer)` names it.
    """

    layers: tuple[LayerCache, ...]
    block_size: int

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each group; full attention (0) first."""
        return tuple(sorted({layer.window for layer in self.layers}))

    def group_of(self, layer: int) -> int:
        """The group (index into `windows`) of a layer."""
        return self.windows.index(self.layers[layer].window)

    def layers_of(self, group: int) -> list[int]:
        """The layers of a group."""
        return [i for i, layer in enumerate(self.layers) if layer.window == self.windows[group]]

    def bytes_per_block(self, group: int) -> int:
        """Bytes of one block over all layers of a group."""
        return self.block_size * sum(self.layers[i].bytes_per_token for i in self.layers_of(group))


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did: matches, wall time in seconds, node counts, fingerprint, and the error against eager if checked.

    max_error: largest absolute difference of the outputs before and after the pass, where numerics were asked for.
    """

    name: str
    stage: str
    num_matches: int
    seconds: float
    nodes_before: int
    nodes_after: int
    fingerprint: str
    max_error: float | None = None


@dataclass
class Program:
    """A graph with everything that it needs: inputs, weights, caches and the passes that it went through.

    `graph_module` is flat and functional: each weight, cache and input is a placeholder, described by `inputs` in the same
    order; every node carries `meta["val"]`. `kind` is "decoder" (token_ids and positions in, logits out) or "module".
    `in_spec` and `out_spec` are the trees of a module's (args, kwargs) and outputs; `arguments` names the leaves of the
    former, in order, among them those that are no tensors and have no placeholder.
    """

    graph_module: fx.GraphModule
    inputs: list[InputSpec]
    weights: WeightMap
    kind: Literal["decoder", "module"]
    name: str
    info: dict[str, Any] = field(default_factory=dict)
    cache: CacheSpec | None = None
    history: tuple[PassRecord, ...] = ()
    out_spec: Any = None
    in_spec: Any = None
    arguments: tuple[str, ...] = ()
    parts: dict[str, Program] = field(default_factory=dict)
    """Further graphs over the same weights and caches, made of this one by a pass, by name (`split_early_exit`)."""

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.graph_module.graph

    def input_of(self, node: fx.Node) -> InputSpec | None:
        """The InputSpec of a placeholder, or None for any other node."""
        if node.op != "placeholder":
            return None
        return next((spec for spec in self.inputs if spec.name == node.name), None)

    def placeholders(self, kind: InputKind | None = None) -> list[tuple[fx.Node, InputSpec]]:
        """Placeholders with their specs, in graph order."""
        specs = {spec.name: spec for spec in self.inputs}
        pairs = [(node, specs[node.name]) for node in self.graph.nodes if node.op == "placeholder"]
        return [(node, spec) for node, spec in pairs if kind is None or spec.kind == kind]

    def clone(self) -> Program:
        """A copy whose graph and weight map can be changed; weights and history are shared."""
        copied = fx.GraphModule(self.graph_module, _copy_graph(self.graph))
        return replace(self, graph_module=copied, inputs=list(self.inputs), weights=self.weights.copy())

    def add_input(self, name: str, *, kind: InputKind, key: str, example: torch.Tensor) -> fx.Node:
        """Adds a placeholder in front of the others; `example` gives its shape and dtype (fake, meta or real)."""
        first = next(iter(self.graph.nodes))
        mode: Any = getattr(first.meta["val"], "fake_mode", None)
        taken = {spec.name for spec in self.inputs}
        name = next(c for c in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if c not in taken)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        fake = (
            example
            if getattr(example, "fake_mode", None) is mode
            else mode.from_tensor(example.to("meta"), static_shapes=True)
        )
        node.meta["val"] = fake
        shape = tuple(int(size) if isinstance(size, int) else str(size) for size in fake.shape)
        self.inputs.insert(0, InputSpec(name=node.name, kind=kind, key=key, shape=shape, dtype=fake.dtype))
        return node

    @property
    def all_weights(self) -> WeightMap:
        """The weights of the graph and of its parts, each once."""
        every = dict(self.weights)
        for part in self.parts.values():
            every.update(part.weights)
        return WeightMap(every)

    def count(self, target: Any) -> int:
        """Number of nodes that call `target`."""
        return sum(1 for node in self.graph.nodes if node.target == target)

    def _repr_html_(self) -> str:
        from .display import program_html

        return program_html(self)


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = copied.node_copy(node, lambda n: values[n])
        values[node].name = node.name  # fx itself would rename "input", because Python has a function of that name
    return copied
