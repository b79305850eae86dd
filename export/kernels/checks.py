"""The argument checks that the attention kernels share; messages say what is wrong, the values and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int,
    softcap: float,
    tree_mask: Tensor | None = None,
) -> None:
    """Check ranks, shapes, dtypes, strides and devices of `paged_attention`'s arguments, not the tensors' values.

    Raises:
        ValueError: naming the first argument that does not fit, its value and what is allowed.
    """
    for name, tensor, rank in (
        ("q", q, 3), ("k", k, 3), ("v", v, 3), ("k_cache", k_cache, 4), ("v_cache", v_cache, 4),
        ("slot_mapping", slot_mapping, 1), ("block_tables", block_tables, 2),
        ("query_start", query_start, 1), ("seq_lens", seq_lens, 1),
    ):  # fmt: skip
        if tensor.dim() != rank:
            raise ValueError(f"paged_attention: {name} has shape {tuple(tensor.shape)}; it needs {rank} dimensions")
        if tensor.device != q.device:
            raise ValueError(f"paged_attention: {name} is on {tensor.device} but q is on {q.device}; move it there")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"paged_attention: {name} has strides {tensor.stride()}; its last dimension must be contiguous"
            )
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, value_dim = v_cache.shape
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("k", k, (num_tokens, num_kv_heads, head_dim)),
        ("v", v, (num_tokens, num_kv_heads, value_dim)),
        ("k_cache", k_cache, (num_blocks, block_size, num_kv_heads, head_dim)),
        ("slot_mapping", slot_mapping, (num_tokens,)),
        ("query_start", query_start, (seq_lens.shape[0] + 1,)),
        ("block_tables", block_tables, (seq_lens.shape[0], block_tables.shape[1])),
    ]
    for name, optional in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if optional is None:
            continue
        expected.append((name, optional, (num_heads,)))
        if optional.dtype != torch.float32 or optional.device != q.device or not optional.is_contiguous():
            raise ValueError(
                f"paged_attention: {name} is {optional.dtype} on {optional.device} with strides {optional.stride()}; "
                f"it must be contiguous float32 on {q.device}"
            )
    if tree_mask is not None:
        expected.append(("tree_mask", tree_mask, (num_tokens,)))
        if tree_mask.dtype != torch.int64 or tree_mask.device != q.device or not tree_mask.is_contiguous():
            raise ValueError(
                f"paged_attention: tree_mask is {tree_mask.dtype} on {tree_mask.device} with strides {tree_mask.stride()}; "
                f"it must be contiguous int64 on {q.device}"
            )
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"paged_attention: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"paged_attention: {num_heads} query heads over {num_kv_heads} key/value heads; "
            "the first must be a multiple of the second"
        )
    for name, tensor, dtype in (
        ("slot_mapping", slot_mapping, torch.int64), ("block_tables", block_tables, torch.int32),
        ("query_start", query_start, torch.int32), ("seq_lens", seq_lens, torch.int32),
        ("k", k, q.dtype), ("v", v, q.dtype), ("v_cache", v_cache, k_cache.dtype),
    ):  # fmt: skip
        if tensor.dtype != dtype:
            raise ValueError(f"paged_attention: {name} is {tensor.dtype}, expected {dtype}")
    if window < 0 or softcap < 0:
        raise ValueError(f"paged_attention: window={window}, softcap={softcap}; both must be >= 0 (0 turns them off)")
