"""page_attention: one cache per layer, one block table per window; the rest of the graph stays."""

from __future__ import annotations

import pytest
import torch
from camshaft.graph import ops as _ops  # noqa: F401
from camshaft.graph.verify import verify
from camshaft.passes.normalize import Normalize
from camshaft.passes.page_attention import PAGED_ATTENTION, PageAttention
from graph_cases import captured, check, heads, rows
from torch import Tensor, nn


class Layers(nn.Module):
    """One attention per window, four query heads, two key heads, values of another size."""

    def __init__(self, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.windows = windows
        self.sinks = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        for window in self.windows:
            q, k = heads(x, 4), heads(x[..., :8], 2)
            y = torch.ops.camshaft.attention(q, k, k[..., :2], None, self.sinks, None, 0.5, window, 30.0)
            x = x + y.flatten(2).repeat(1, 1, 2)
        return x


def test_caches_and_groups() -> None:
    program = Normalize()(captured(Layers((0, 5, 0)), rows(16))).program
    result = PageAttention(block_size=4)(program)
    assert result.num_matches == 3
    paged = result.program
    verify(paged, after="page_attention")
    cache = paged.cache
    assert cache is not None
    assert cache.windows == (0, 5)
    assert [cache.group_of(layer) for layer in range(3)] == [0, 1, 0]
    assert [(layer.num_kv_heads, layer.head_dim, layer.value_dim) for layer in cache.layers] == [(2, 4, 2)] * 3
    assert cache.bytes_per_block(0) == 4 * 2 * 2 * (4 + 2) * 4
    metadata = sorted(spec.key for _, spec in paged.placeholders("metadata"))
    assert metadata == [
        "block_tables.0",
        "block_tables.1",
        "query_start",
        "seq_lens",
        "slot_mapping.0",
        "slot_mapping.1",
    ]
    assert sorted(spec.key for _, spec in paged.placeholders("cache")) == [f"{kv}.{i}" for kv in "kv" for i in range(3)]


def test_attributes_and_shapes() -> None:
    paged = PageAttention(block_size=4)(captured(Layers((7,)), rows(16))).program
    (node,) = [n for n in paged.graph.nodes if n.target == PAGED_ATTENTION]
    assert node.args[11:] == (0.5, 7, 30.0)
    assert node.args[9].name == "p_sinks"
    assert [str(size) for size in node.meta["val"].shape][2:] == ["4", "2"]
    assert not isinstance(node.meta["val"].shape[1], int)
    assert PageAttention(block_size=4)(paged).num_matches == 0


def test_paged_attention_is_no_plain_operator() -> None:
    paged = PageAttention(block_size=4)(captured(Layers((0,)), rows(16))).program
    inputs = [
        torch.zeros([s if isinstance(s, int) else 5 for s in spec.shape], dtype=spec.dtype)
        for _, spec in paged.placeholders()
    ]
    with pytest.raises(RuntimeError, match="bound KV cache"):
        paged.graph_module(*inputs)


def test_no_attention() -> None:
    program = check(PageAttention(block_size=4), nn.Linear(8, 8), rows(8), matches=0)
    assert program.cache is None
