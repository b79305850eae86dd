"""KV caches inside a network: what they compute, and that they build."""

from __future__ import annotations

import pytest
import torch
from tensorrt_interpreter import run_network
from torch import Tensor

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from camshaft.export.emitter import UnsupportedError
from camshaft.export.tensorrt.builder import Builder, Value
from camshaft.export.tensorrt.kv_cache import gather_blocks, kv_cache_update, scatter_blocks
from camshaft.export.tensorrt.library import find_library
from camshaft.export.tensorrt.network import new_network, serialize
from camshaft.export.tensorrt.ops_attention import fused_attention

HALF = torch.float16


def inputs_of(builder: Builder, tensors: dict[str, Tensor]) -> list[Value]:
    """Network inputs for tensors."""
    return [builder.input(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


def random(*shape: int) -> Tensor:
    """Random fp16 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(HALF)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_linear_cache(num_tokens: int) -> None:
    tensors = {
        "cache": random(2, 2, 16, 64), "update": random(2, 2, num_tokens, 64), "start": torch.tensor([0, 9], dtype=torch.int32),
    }  # fmt: skip
    maker, builder = new_network(find_library())
    cache, update, start = inputs_of(builder, tensors)
    builder.output(kv_cache_update(builder, cache, update, start), "cache_out")
    out = run_network(builder.trt, builder.network, tensors)["cache_out"]
    expected = tensors["cache"].clone()
    expected[0, :, :num_tokens] = tensors["update"][0]
    expected[1, :, 9 : 9 + num_tokens] = tensors["update"][1]
    assert torch.equal(out, expected)
    assert serialize(maker, builder).layers == {"KV_CACHE_UPDATE": 1}


def test_the_cache_must_be_an_input() -> None:
    _, builder = new_network(find_library())
    cache = builder.filled(0.0, HALF, (1, 2, 16, 64))
    update = builder.input("update", HALF, (1, 2, 1, 64))
    with pytest.raises(UnsupportedError, match="not an input of the network"):
        kv_cache_update(builder, cache, update, builder.input("start", torch.int32, (1,)))
    with pytest.raises(UnsupportedError, match="write indices of torch.int64"):
        kv_cache_update(builder, update, update, builder.input("wide", torch.int64, (1,)))


def test_blocks_written_gathered_and_attended() -> None:
    """One decode step of two sequences: a pool of 6 blocks of 4 rows, the last one spare."""
    tensors = {
        "q": random(2, 4, 1, 64), "k_pool": random(6, 4, 2, 64), "v_pool": random(6, 4, 2, 64), "k": random(2, 2, 64),
        "v": random(2, 2, 64).flip(0), "slots": torch.tensor([5, 14], dtype=torch.int64),
        "tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), "mask": torch.arange(8) < torch.tensor([[[[6]]], [[[7]]]]),
    }  # fmt: skip
    maker, builder = new_network(find_library())
    q, k_pool, v_pool, k, v, slots, tables, mask = inputs_of(builder, tensors)
    pools = [scatter_blocks(builder, pool, update, slots) for pool, update in ((k_pool, k), (v_pool, v))]
    keys, values = (gather_blocks(builder, pool, tables) for pool in pools)
    assert keys.shape == (2, 2, 8, 64)
    builder.output(fused_attention(builder, q, keys, values, 0.125, mask=mask), "y")
    for name, pool in zip(("k_out", "v_out"), pools):
        builder.output(pool, name)
    out = run_network(builder.trt, builder.network, tensors)
    expected = [tensors["k_pool"].clone(), tensors["v_pool"].clone()]
    for pool, update in zip(expected, (tensors["k"], tensors["v"])):
        pool[1, 1], pool[3, 2] = update
    assert torch.equal(out["k_out"], expected[0]) and torch.equal(out["v_out"], expected[1])
    rows = [pool[tensors["tables"].long()].flatten(1, 2).transpose(1, 2).float() for pool in expected]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        tensors["q"].float(), *rows, attn_mask=tensors["mask"], scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(out["y"].float(), wanted, atol=2e-3, rtol=2e-3)  # fp16
    layers = serialize(maker, builder).layers
    assert layers["SCATTER"] == 2 and layers["GATHER"] == 2 and layers["ATTENTION_OUTPUT"] == 1
