"""expose_cache: attention over one row becomes attention over KV caches that are inputs and outputs of the graph.

For engines that run without Camshaft's runtime: embeddings to logits, the caches held by the caller. B sequences of S rows each;
the rest of the graph goes on seeing one packed row of T = B * S tokens.

    before                                          after, kind "linear"
    token_ids, positions [1, T]                     token_ids, positions [B, S]
    o = camshaft.attention(q, k, v, None,           k' = camshaft.update_cache(k_cache_0, k, positions[:, 0])
            sinks, slopes, scale, w, cap)           v' = camshaft.update_cache(v_cache_0, v, positions[:, 0])
    q [1, H, T, D], k [1, G, T, D]                  o = camshaft.masked_attention(q, k', v', mask, bias, sinks, scale, cap)
    y = linear(h[:, sample_rows], w)   [1, R, V]    y = linear(h[:, b * S + last_rows], w)   [B, V] float32
    output (y,)                                     output (y, k', v', ...)

    kind "paged": k' = camshaft.write_blocks(k_cache_0, k, slot_mapping); attention over camshaft.read_blocks(k', block_tables)

    entries of sequence b      0 ............ positions[b, i] ...........
    row i sees                 [ ..... window .....]                        j <= p, and p - j < window

New inputs: a key and a value cache per layer, [B, G, max_seq_len, D] (linear) or [num_blocks, block_size, G, D] (paged); last_rows
[B] int64 in place of sample_rows, if the program has it (otherwise the logits of all rows come out, [B, S, V]); for paged caches
slot_mapping [B, S] and block_tables [B, W] int64. The rows of a sequence have consecutive positions.
Relies on: canonical attention (its arguments name window, soft cap, sinks and slopes). Outputs change their meaning.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ..graph import cache_ops as _cache_ops  # noqa: F401  registers the operators
from ..graph.program import CacheSpec, LayerCache, Program
from .base import GraphPass, Stage
from .match import aten, call, infer, is_call, value
from .resolve_masks import ATTENTION

CacheKind = Literal["linear", "paged"]

UPDATE_CACHE = torch.ops.camshaft.update_cache.default
WRITE_BLOCKS = torch.ops.camshaft.write_blocks.default
READ_BLOCKS = torch.ops.camshaft.read_blocks.default
MASKED_ATTENTION = torch.ops.camshaft.masked_attention.default


@dataclass
class ExposeCache(GraphPass):
    """Rewrites every attention to read and write caches that the caller holds.

    batch_size (B), num_tokens (S), num_blocks, table_width (W): a number, or None for a size that varies. max_seq_len: entries of a
    linear cache per sequence. block_size: tokens of a block. num_blocks and table_width are for paged caches alone.
    """

    kind: CacheKind
    batch_size: int | None
    num_tokens: int | None
    max_seq_len: int
    block_size: int = 16
    num_blocks: int | None = None
    table_width: int | None = None

    name = "expose_cache"
    stage = Stage.CACHE
    numerics = "changed"

    def run(self, program: Program) -> int:
        nodes = [node for node in program.graph.nodes if is_call(node, ATTENTION)]
        if not nodes:
            return 0
        program.cache = CacheSpec(layers=tuple(_layer(node) for node in nodes), block_size=self.block_size)
        old = [node for node in program.graph.nodes if node.op == "call_function"]
        step = _Step(self, program)
        for node in old:
            _renew(node)
        outputs = []
        for index, node in enumerate(nodes):
            outputs.extend(step.attend(node, index, program.cache.layers[index]))
        output = next(node for node in program.graph.nodes if node.op == "output")
        with program.graph.inserting_before(output):
            logits = step.logits(output.args[0][0])
        output.args = ((logits, *outputs),)
        return len(nodes)


def _layer(node: fx.Node) -> LayerCache:
    k, v = value(node.args[1]), value(node.args[2])
    return LayerCache(
        num_kv_heads=int(k.shape[1]),
        head_dim=int(k.shape[3]),
        value_dim=int(v.shape[3]),
        window=node.args[7],
        dtype=k.dtype,
    )


def _renew(node: fx.Node) -> None:
    """The example value of a node for the new inputs; a size that does not vary any more becomes a number."""
    node.meta["val"] = infer(node)
    if isinstance(node.meta["val"], int):
        for user in list(node.users):
            user.args = fx.node.map_arg(user.args, lambda n: node.meta["val"] if n is node else n)
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: node.meta["val"] if n is node else n)


class _Step:
    """The inputs that all layers share, and the nodes made of them; a mask exists once for each window."""

    def __init__(self, options: ExposeCache, program: Program) -> None:
        self.options, self.program, self.graph = options, program, program.graph
        self.mode: Any = value(next(iter(program.graph.nodes))).fake_mode  # type: ignore[attr-defined]
        for node, _ in program.placeholders("weight"):  # those that passes added may be on the meta device
            with self.mode:
                node.meta["val"] = torch.empty(value(node).shape, dtype=value(node).dtype)
        self.tokens = self._resize("token_ids", self._example("token_ids", options.batch_size, options.num_tokens))
        self.batch, self.rows = value(self.tokens).shape
        self.positions = self._resize("positions", value(self.tokens))
        self.slots: fx.Node | None = None
        self.tables: fx.Node | None = None
        self.num_blocks: Any = options.num_blocks
        if options.kind == "paged":
            width = self._example("width", options.table_width).shape[0]
            self.num_blocks = self._example("num_blocks", options.num_blocks).shape[0]
            self.tables = self._input("block_tables", "metadata", (self.batch, width), torch.int64)
            self.slots = self._input("slot_mapping", "metadata", (self.batch, self.rows), torch.int64)
        self._flatten_tokens()
        self._choose_rows()

    # ------------------------------------------------------------------------------------------------------ inputs
    def _example(self, name: str, *sizes: int | None) -> torch.Tensor:
        """An int64 example whose sizes vary where None is given."""
        hints = [size if size is not None else 5 + 2 * len(name) + axis for axis, size in enumerate(sizes)]
        dims = [DimDynamic.STATIC if size is not None else DimDynamic.DYNAMIC for size in sizes]
        example: torch.Tensor = self.mode.from_tensor(
            torch.zeros(hints, dtype=torch.int64),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims),
            source=ConstantSource(f"example_{name}"),
        )
        return example

    def _input(self, name: str, kind: Any, shape: tuple[Any, ...], dtype: torch.dtype, key: str = "") -> fx.Node:
        with self.mode:
            example = torch.empty(shape, dtype=dtype)
        return self.program.add_input(name, kind=kind, key=key or name, example=example)

    def _resize(self, key: str, example: torch.Tensor) -> fx.Node:
        """Gives a token input the shape [B, S]."""
        node, spec = next(pair for pair in self.program.placeholders("token") if pair[1].key == key)
        node.meta["val"] = example
        shape = tuple(int(size) if isinstance(size, int) else str(size) for size in example.shape)
        self.program.inputs[self.program.inputs.index(spec)] = replace(spec, shape=shape)
        return node

    def _body(self) -> Any:
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        return self.graph.inserting_before(first)

    def _flatten_tokens(self) -> None:
        for node in (self.tokens, self.positions):
            users = list(node.users)
            with self._body():
                row = call(self.program, aten.reshape.default, node, [1, -1])
            for user in users:
                user.replace_input_with(node, row)
        with self._body():
            if self.slots is not None:
                self.flat_slots = call(self.program, aten.reshape.default, self.slots, [-1])
            else:
                self.start = call(self.program, aten.select.int, self.positions, 1, 0)

    def _choose_rows(self) -> None:
        """sample_rows [R] becomes b * S + last_rows [B]."""
        found = [node for node, spec in self.program.placeholders("metadata") if spec.key == "sample_rows"]
        self.picks_rows = bool(found)
        if not found:
            return
        last = self._input("last_rows", "metadata", (self.batch,), torch.int64)
        with self._body():
            first = call(
                self.program, aten.mul.Tensor, self._count(self._size(self.tokens, 0)), self._size(self.tokens, 1)
            )
            chosen = call(self.program, aten.add.Tensor, first, last)
        found[0].replace_all_uses_with(chosen)
        self.graph.erase_node(found[0])
        self.program.inputs[:] = [spec for spec in self.program.inputs if spec.key != "sample_rows"]

    # ------------------------------------------------------------------------------------------------------- pieces
    def _size(self, node: fx.Node, axis: int) -> Any:
        """A size as a number, or as the node that reads it."""
        size = value(node).shape[axis]
        return int(size) if isinstance(size, int) else call(self.program, aten.sym_size.int, node, axis)

    def _count(self, size: Any) -> fx.Node:
        """0, 1, .. size - 1, int64."""
        node = self.graph.call_function(aten.arange.default, (size,))
        with self.mode:
            node.meta["val"] = torch.arange(size.meta["val"] if isinstance(size, fx.Node) else size)
        return node

    def _batched(self, node: fx.Node) -> fx.Node:
        """[1, H, T, D] -> [B, H, S, D]"""
        heads, size = value(node).shape[1], value(node).shape[3]
        row = call(self.program, aten.transpose.int, node, 1, 2)
        shape = [self._size(self.tokens, 0), self._size(self.tokens, 1), int(heads), int(size)]
        return call(self.program, aten.transpose.int, call(self.program, aten.reshape.default, row, shape), 1, 2)

    def _mask(self, window: int, num_entries: Any, slopes: fx.Node | None) -> tuple[fx.Node, fx.Node | None]:
        """What rows see, [B, 1, S, L] bool, and the bias of ALiBi (Press et al. 2022) [B, H, S, L] float32 or None."""
        add = partial(call, self.program)
        entry = self._count(num_entries)
        at = add(aten.unsqueeze.default, add(aten.unsqueeze.default, self.positions, 1), 3)
        mask = add(aten.le.Tensor, entry, at)
        if window:
            near = add(aten.gt.Tensor, entry, add(aten.sub.Tensor, at, window))
            mask = add(aten.logical_and.default, mask, near)
        if slopes is None:
            return mask, None
        distance = add(aten._to_copy.default, add(aten.sub.Tensor, entry, at), dtype=torch.float32)
        if value(slopes).dtype != torch.float32:
            slopes = add(aten._to_copy.default, slopes, dtype=torch.float32)
        return mask, add(aten.mul.Tensor, distance, add(aten.reshape.default, slopes, [-1, 1, 1]))

    def attend(self, node: fx.Node, index: int, layer: LayerCache) -> list[fx.Node]:
        """Replaces one attention; returns the updated key and value caches."""
        q, k, v, _, sinks, slopes, scale, window, softcap = node.args
        caches = [self._cache(f"{name}_cache_{index}", f"{name}.{index}", layer, size)
                  for name, size in (("k", layer.head_dim), ("v", layer.value_dim))]  # fmt: skip
        with self.graph.inserting_before(node):
            if self.tables is None:
                updated = [call(self.program, UPDATE_CACHE, cache, self._batched(new), self.start)
                           for cache, new in zip(caches, (k, v))]  # fmt: skip
                read, num_entries = updated, self.options.max_seq_len
            else:
                updated = [self._write(cache, new) for cache, new in zip(caches, (k, v))]
                read = [call(self.program, READ_BLOCKS, cache, self.tables) for cache in updated]
                width = self._size(self.tables, 1)
                num_entries = (
                    width * self.options.block_size
                    if isinstance(width, int)
                    else call(self.program, operator.mul, width, self.options.block_size)
                )
            mask, bias = self._mask(window, num_entries, slopes)
            out = call(self.program, MASKED_ATTENTION, self._batched(q), *read, mask, bias, sinks, scale, softcap)
            out = call(self.program, aten.transpose.int, out, 1, 2)
            out = call(self.program, aten.reshape.default, out, [1, -1, *(int(n) for n in value(out).shape[2:])])
        node.replace_all_uses_with(out)
        return updated

    def _cache(self, name: str, key: str, layer: LayerCache, size: int) -> fx.Node:
        if self.tables is None:
            shape: tuple[Any, ...] = (self.batch, layer.num_kv_heads, self.options.max_seq_len, size)
        else:
            shape = (self.num_blocks, self.options.block_size, layer.num_kv_heads, size)
        return self._input(name, "cache", shape, layer.dtype, key)

    def _write(self, cache: fx.Node, new: fx.Node) -> fx.Node:
        heads, size = (int(value(new).shape[axis]) for axis in (1, 3))
        row = call(self.program, aten.transpose.int, new, 1, 2)
        return call(
            self.program,
            WRITE_BLOCKS,
            cache,
            call(self.program, aten.reshape.default, row, [-1, heads, size]),
            self.flat_slots,
        )

    def logits(self, logits: fx.Node) -> fx.Node:
        """[1, T or B, V] -> [B, S, V], or [B, V] of the chosen rows; float32."""
        sizes = [self._size(self.tokens, 0), *([] if self.picks_rows else [self._size(self.tokens, 1)])]
        out = call(self.program, aten.reshape.default, logits, [*sizes, int(value(logits).shape[-1])])
        if value(out).dtype != torch.float32:
            out = call(self.program, aten._to_copy.default, out, dtype=torch.float32)
        return out
