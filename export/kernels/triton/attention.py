"""What to launch for a step. All launches follow from host integers (T, S, max_query_len, max_seq_len and the shapes),
nothing is read back and no allocation depends on data: a step can be captured in a CUDA graph and replayed with others.

    max_query_len == 1    decode                     turns q, k (rope) and writes k, v too; one launch
    else                  write                      turns q, k; k, v -> cache at the slot; out = 0 in padding rows
                          decode                     programs of sequences with another number of rows return at once
                          tiles (once a step)        which rows of which sequences make a tile
                          prefill                    sequences with two rows or more, or of them
                          FlashAttention, prefill    where that package is: those without cached tokens, whose keys are rows of
                                                     the step; and the rest
    batch_invariant       write, tiles, prefill      every row alike: the same key blocks in the same order
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import flash
from ..checks import check_arguments
from ..rope import Rope
from ..state import AttentionState
from .configs import DecodeConfig, PrefillConfig, decode_config, num_splits, prefill_config
from .decode import decode_kernel, join_kernel
from .launch import launch
from .prefill import prefill_kernel
from .write import ALL, CONTINUING, tiles_kernel, write_kernel

_MAX_HEAD_DIM = 512
_WRITE_BLOCK = 2048
_INVARIANT_BLOCK_M = 64
"""Query vectors a tile in batch-invariant mode, where decode steps use the same tiles as prompts."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FP8 = torch.float8_e4m3fn
Fresh = Literal["paged", "flash"] | None
_FP8_Q_SCALE = 1 / 16
"""bfloat16 queries over an fp8 cache are multiplied as float16, whose range they might leave."""


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 32 for the interpreter, so that its small cases are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 32


@dataclass(frozen=True)
class _Call:
    """The arguments of one call, and what its launches share."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor
    out: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    scale: float
    softcap: float
    window: int
    rope: Rope | None
    tree_mask: Tensor | None

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.q.shape[1] // self.num_kv_heads

    @property
    def padded_dims(self) -> tuple[int, int]:
        """D and Dv as the kernels' tiles have them."""
        return max(16, _power_of_two(self.q.shape[2])), max(16, _power_of_two(self.v.shape[2]))

    @property
    def element_bytes(self) -> tuple[int, int]:
        """Of the cache and of the queries."""
        return self.k_cache.element_size(), self.q.element_size()

    @property
    def values_in_pairs(self) -> bool:
        """Whether a transposed decode kernel can read an fp8 cache's values by 16-bit numbers."""
        cache = self.v_cache
        places = (cache.shape[3], *cache.stride()[:3], cache.storage_offset())
        return cache.dtype == _FP8 and self.q.dtype != torch.float32 and not any(n % 2 for n in places)

    def q_scale(self) -> float:
        """What queries are multiplied by before they are rounded to `compute`."""
        return _FP8_Q_SCALE if self.k_cache.dtype == _FP8 and self.q.dtype == torch.bfloat16 else 1.0

    @property
    def angles(self) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin [T, R], where queries and keys are still to be turned."""
        return (self.rope.cos, self.rope.sin) if self.rope is not None else (None, None)

    @property
    def angle_strides(self) -> tuple[int, int]:
        """From one row of cos and of sin to the next."""
        return (self.rope.cos.stride(0), self.rope.sin.stride(0)) if self.rope is not None else (0, 0)

    def rotation(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels that turn."""
        rope = self.rope
        return {
            "ROTATED": rope.cos.shape[1] if rope is not None else 0,
            "INTERLEAVED": rope is not None and rope.interleaved,
        }

    def options(self) -> dict[str, Any]:
        """Compile-time arguments of both attention kernels."""
        block_d, block_dv = self.padded_dims
        half = self.k_cache.dtype == _FP8 and self.q.dtype != torch.float32
        compute = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[self.q.dtype]
        return {
            "Q_SCALE": self.q_scale(), "COMPUTE": tl.float16 if half else compute,
            "WINDOW": self.window, "SOFTCAP": self.softcap > 0, "SINKS": self.sinks is not None,
            "ALIBI": self.alibi_slopes is not None, "BLOCK_SIZE": self.k_cache.shape[1], "KV": self.num_kv_heads,
            "GROUP": self.group, "D": self.q.shape[2], "DV": self.v.shape[2], "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "SAME_STRIDES": self.k_cache.stride() == self.v_cache.stride(), "ASM": self.q.is_cuda,
        }  # fmt: skip


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    max_query_len: int,
    max_seq_len: int,
    rope: Rope | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    state: AttentionState | None = None,
    decode: DecodeConfig | None = None,
    prefill: PrefillConfig | None = None,
    fresh: Fresh = None,
) -> Tensor:
    """`reference.paged_attention` on CUDA: the same arguments and result; float16, bfloat16 or float32 queries.

    `max_query_len` must be a true upper bound: at 1 only the decode kernel is launched, which computes one row a sequence.
    `max_seq_len` only picks the number of splits. The metadata's values are not checked: reading them would wait for
    the device. The cache may have another dtype than q, float8_e4m3fn too; it is converted as it is read.

    Args:
        batch_invariant: a row's result does not depend, to the last bit, on the other rows of the step, nor on how its
            sequence was cut into steps; slower where sequences have one row.
        rope: turns q and k first; keys are cached as they are turned.
        tree_mask: as in the reference; all sequences of several rows are then read from the cache.
        state: what calls share; made for this call if None.
        decode, prefill: tile sizes instead of those of `configs`, to measure them.
        fresh: how prompts without cached tokens are served; None: by FlashAttention where it is installed and serves them.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a head size above 512, a scale that is not positive;
            fresh='flash' for what FlashAttention does not serve.
    """
    check_arguments(
        q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, sinks, alibi_slopes, window,
        softcap, tree_mask,
    )  # fmt: skip
    if rope is not None:
        rope.check(q)
    if max(q.shape[2], v.shape[2]) > _MAX_HEAD_DIM or q.dtype not in _DTYPES or scale <= 0:
        raise ValueError(
            f"paged_attention (Triton): head sizes {q.shape[2]} and {v.shape[2]}, dtype {q.dtype}, scale {scale}; allowed "
            f"are sizes to {_MAX_HEAD_DIM}, float16, bfloat16, float32 and scales > 0: use reference.paged_attention"
        )
    out = torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device=q.device)
    call = _Call(
        q, k, v, k_cache, v_cache, slot_mapping, block_tables, query_start, seq_lens, out, sinks, alibi_slopes, scale,
        softcap, window, rope, tree_mask,
    )  # fmt: skip
    if q.shape[0] == 0:
        return out
    state = state or AttentionState()
    widest = max(call.padded_dims)
    decode = decode or decode_config(widest, *call.element_bytes, call.num_seqs * k.shape[1], call.group)
    prefill = prefill or prefill_config(widest, *call.element_bytes)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if max_query_len == 1 and not batch_invariant and call.num_seqs:
            _decode(call, decode, max_seq_len, state, write=True)
            return out
        by_flash = not (batch_invariant or tree_mask is not None) and _takes_flash(call, fresh, max_query_len)
        call = _write(call, keep_keys=by_flash)
        if max_query_len and call.num_seqs:
            if not batch_invariant:
                _decode(call, decode, max_seq_len, state, write=False)
            if by_flash:
                flash.attend_fresh(
                    call.q, call.k, v, out, query_start, seq_lens, scale=scale, window=window, max_query_len=max_query_len,
                    state=state,
                )  # fmt: skip
            kind = CONTINUING if by_flash else ALL
            _prefill(call, prefill, None if batch_invariant else max_query_len, state, kind)
    return out


def _takes_flash(call: _Call, fresh: Fresh, max_query_len: int) -> bool:
    """Whether FlashAttention serves the sequences without cached tokens; otherwise they are read from the cache."""
    if fresh == "paged" or fresh is None and max_query_len < flash.FEWEST_ROWS:
        return False
    reason = flash.why_not_flash(
        call.q, call.k, call.v, softcap=call.softcap, sinks=call.sinks, alibi=call.alibi_slopes
    )
    if reason and fresh == "flash":
        raise ValueError(f"paged_attention: fresh='flash': {reason}")
    return not reason


def _write(call: _Call, *, keep_keys: bool) -> _Call:
    """k and v into the cache; zeros into padding rows of `out`.

    Returns the call with its queries turned, and with `keep_keys` its keys too.
    """
    q, k, v, k_cache, v_cache = call.q, call.k, call.v, call.k_cache, call.v_cache
    num_tokens, num_kv_heads, head_dim = k.shape
    turns, contiguous = call.rope is not None, torch.contiguous_format
    q_turned = torch.empty_like(q, memory_format=contiguous) if turns else None
    k_turned = torch.empty_like(k, memory_format=contiguous) if turns and keep_keys else None
    launch(
        write_kernel, (num_tokens,),
        q, k, v, *call.angles, q_turned, k_turned, k_cache, v_cache, call.out, call.slot_mapping, call.query_start, call.num_seqs,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *call.angle_strides, *k_cache.stride()[:3],
        *v_cache.stride()[:3], BLOCK_SIZE=k_cache.shape[1], H=q.shape[1], KV=num_kv_heads, D=head_dim, DV=v.shape[2],
        BLOCK=_write_block(num_kv_heads * max(head_dim, v.shape[2])), BLOCK_Q=_write_block(q.shape[1] * head_dim),
        KEEP_KEYS=k_turned is not None, ASM=q.is_cuda, **call.rotation(),
    )  # fmt: skip
    return call if q_turned is None else replace(call, q=q_turned, k=k if k_turned is None else k_turned, rope=None)


def _write_block(size: int) -> int:
    """Elements that a program of `write_kernel` handles at once, out of `size` a row."""
    return min(_WRITE_BLOCK, max(16, _power_of_two(size)))


def _decode(call: _Call, config: DecodeConfig, max_seq_len: int, state: AttentionState, *, write: bool) -> None:
    """Attention of the sequences with one row, into `call.out`."""
    device, num_seqs, kv, group = call.q.device, call.num_seqs, call.num_kv_heads, call.group
    splits = num_splits(config, num_seqs * kv, max_seq_len, num_processors(device))
    part_acc = part_top = part_total = arrived = None
    last = config.join == "last"
    if splits > 1:
        shape = (num_seqs, kv * group, splits)
        part_acc = torch.empty((*shape, call.v.shape[2]), dtype=torch.float32, device=device)
        part_top, part_total = torch.empty((2, *shape), dtype=torch.float32, device=device)
        arrived = state.counters(num_seqs * kv, device) if last else None
    # a multiple of the step, so that pieces end where steps do
    min_span = -(-config.min_span // config.block_n) * config.block_n
    registers: dict[str, Any] = {"maxnreg": config.max_registers} if config.max_registers else {}
    split_options = {"SPLITS": splits, "MIN_SPAN": min_span, "BLOCK_G": _power_of_two(group)}
    positions = max(num_seqs, call.q.shape[0]) if write else num_seqs
    block_m = max(8 if config.transposed else 16, _power_of_two(group))
    num_warps = (
        config.num_warps if block_m <= 16 else max(config.num_warps, min(8, block_m // 8))
    )  # room for more heads
    launch(
        decode_kernel, (kv * splits * positions,),
        call.q, call.k, call.v, *call.angles, call.k_cache, call.v_cache, call.out, part_acc, part_top, part_total, arrived,
        call.slot_mapping, call.block_tables, call.query_start, call.seq_lens, call.sinks, call.alibi_slopes,
        num_seqs, call.q.shape[0], *call.q.stride()[:2], *call.k.stride()[:2], *call.v.stride()[:2],
        *call.angle_strides, *call.k_cache.stride()[:3], *call.v_cache.stride()[:3], call.block_tables.stride(0),
        call.scale / call.q_scale(), call.softcap, **call.options(), **call.rotation(), BLOCK_M=block_m,
        BLOCK_N=config.block_n, WRITE=write, JOIN=last, NUM_STAGES=config.num_stages, num_warps=num_warps,
        TRANSPOSED=config.transposed, PAIRS=config.transposed and call.values_in_pairs,
        KC_BLOCK=call.k_cache.stride(0) if config.transposed else 0,
        VC_BLOCK=call.v_cache.stride(0) if config.transposed else 0, **split_options, **registers,
    )  # fmt: skip
    if splits > 1 and not last:
        launch(
            join_kernel, (kv, num_seqs),
            part_acc, part_top, part_total, call.out, call.query_start, call.seq_lens, WINDOW=call.window, KV=kv,
            GROUP=group, DV=call.v.shape[2], BLOCK_DV=call.padded_dims[1], BLOCK_N=config.block_n, **split_options,
        )  # fmt: skip


def _prefill(
    call: _Call, config: PrefillConfig, max_query_len: int | None, state: AttentionState, kind: int
) -> None:  # fmt: skip
    """Attention of the sequences of a kind with two rows or more into `call.out`; of all if `max_query_len` is None."""
    wanted = _INVARIANT_BLOCK_M if max_query_len is None else _power_of_two(max_query_len * call.group)
    block_m = min(config.block_m, wanted)
    block_m = max(block_m, 16, _power_of_two(call.group))
    tiles, bound = _tiles(call, state, kind, 1 if max_query_len is None else 2, block_m // call.group)
    programs = config.programs_per_processor * num_processors(call.q.device)
    launch(
        prefill_kernel, (min(bound * call.num_kv_heads, programs),),
        call.q, call.k_cache, call.v_cache, call.out, tiles, call.block_tables, call.query_start, call.seq_lens,
        call.sinks, call.alibi_slopes, call.tree_mask, *call.q.stride()[:2], *call.k_cache.stride()[:3],
        *call.v_cache.stride()[:3], call.block_tables.stride(0), call.scale / call.q_scale(), call.softcap,
        **call.options(), BLOCK_M=block_m, TREE=call.tree_mask is not None,
        BLOCK_N=config.block_n, MASK_ALL=max_query_len is None, NUM_STAGES=config.num_stages,
        num_warps=4 if block_m <= 64 and max(call.padded_dims) <= 128 else config.num_warps,
    )  # fmt: skip


def _tiles(call: _Call, state: AttentionState, kind: int, min_rows: int, block_q: int) -> tuple[Tensor, int]:
    """The tiles of `block_q` rows of the sequences of a kind with `min_rows` rows or more, and the most that there can be."""
    num_tokens = call.q.shape[0]
    # sum of ceil(n / block_q) over the sequences with n >= min_rows rows
    bound = num_tokens // block_q + min(call.num_seqs, num_tokens // min_rows)
    tiles = state.tiles.get((kind, min_rows, block_q))
    if tiles is None:
        tiles = torch.empty((1 + bound, 2), dtype=torch.int32, device=call.q.device)
        launch(
            tiles_kernel, (triton.cdiv(bound, 32),),
            call.query_start, call.seq_lens, tiles, call.num_seqs, bound, KIND=kind, MIN_ROWS=min_rows, BLOCK_Q=block_q,
            BLOCK_S=256, BLOCK_T=32,
        )  # fmt: skip
        state.tiles[kind, min_rows, block_q] = tiles
    return tiles, bound


def _power_of_two(size: int) -> int:
    return int(triton.next_power_of_2(size))
