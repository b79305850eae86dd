"""Paged attention on the CPU in float32, over a cache of float32, int8 or float8_e4m3fn: the Python side of cpu.c.

The library is compiled on first use (see `native`) and called through ctypes, which releases the GIL. All arguments go
in one packed struct of 8-byte fields: a few microseconds a call.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check_arguments
from .native import NativeBuildError, NativeLibrary, build_library, loaded_openmp_runtimes

_SOURCE = Path(__file__).with_name("cpu.c")
ARGUMENTS = struct.Struct("@13P25q2d")
"""args_t in cpu.c."""
CACHE_DTYPES = (torch.float32, torch.int8, torch.float8_e4m3fn)
"""What keys and values may be stored in, in the order of kv_cache.c."""


@dataclass(frozen=True)
class Availability:
    """Whether a kernel can run here; true or false in a condition."""

    ok: bool
    """Whether it can run."""
    reason: str
    """Why not and what to do; empty where it can."""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class _Loaded:
    availability: Availability
    library: NativeLibrary | None = None
    call: Callable[[bytes], int] | None = None
    openmp_threads: int = 0


@functools.cache
def _load() -> _Loaded:
    """Build and open the library once a process; a failure is kept, with its reason."""
    try:
        library = build_library(_SOURCE)
        opened = ctypes.CDLL(str(library.path))
    except NativeBuildError as error:
        return _Loaded(Availability(False, str(error)))
    except OSError as error:
        return _Loaded(Availability(False, f"the compiled CPU kernel does not load: {error}; delete it to rebuild"))
    call = opened.camshaft_paged_attention
    call.argtypes, call.restype = [ctypes.c_char_p], ctypes.c_int64
    opened.camshaft_openmp_threads.restype = ctypes.c_int64
    return _Loaded(Availability(True, ""), library, call, int(opened.camshaft_openmp_threads()))


def is_available() -> Availability:
    """Whether the C kernel can be used here (compiles it on the first call); `.reason` says why not."""
    return _load().availability


def describe() -> dict[str, Any]:
    """What `camshaft doctor` shows: availability, the library, compiler and flags, and the OpenMP runtimes loaded."""
    loaded = _load()
    facts: dict[str, Any] = {"available": loaded.availability.ok, "reason": loaded.availability.reason}
    if loaded.library is not None:
        facts |= {
            "library": str(loaded.library.path),
            "compiler": loaded.library.compiler,
            "flags": " ".join(loaded.library.flags),
            "openmp": loaded.library.openmp,
            "openmp_threads": loaded.openmp_threads,
            "openmp_runtimes_loaded": loaded_openmp_runtimes(),
            "note": loaded.library.note,
        }
    return facts


def supports(q: Tensor, k_cache: Tensor) -> bool:
    """Whether the C kernel takes these tensors: float32 queries and a cache of one of `CACHE_DTYPES` on the CPU."""
    return q.device.type == "cpu" and q.dtype == torch.float32 and k_cache.dtype in CACHE_DTYPES


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
    tree_mask: Tensor | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """`reference.paged_attention` for float32 tensors on the CPU, caches in one of `CACHE_DTYPES`; the arguments are the same, and
    `num_threads`.

    Args:
        num_threads: most threads to use; None: torch.get_num_threads(). Small work stays on the calling thread.

    Raises:
        ValueError: arguments that do not fit, a slot outside the cache, a block table entry that a sequence needs and
            that is no block; then nothing was written.
        NotImplementedError: another dtype or device; use the reference.
        RuntimeError: the kernel cannot be compiled here (`is_available` says why).
    """
    loaded = _load()
    if loaded.call is None:
        raise RuntimeError(f"the CPU attention kernel is not available: {loaded.availability.reason}")
    if not supports(q, k_cache):
        raise NotImplementedError(
            f"the CPU attention kernel takes float32 on the CPU, and caches in {', '.join(map(str, CACHE_DTYPES))}; q is {q.dtype} "
            f"on {q.device}, the cache is {k_cache.dtype}: use reference.paged_attention"
        )
    data = (q, k, v, k_cache, v_cache)
    metadata = (slot_mapping, block_tables, query_start, seq_lens)
    strides = [t.stride() for t in data]
    if not _fits(data, metadata, strides, (sinks, alibi_slopes, tree_mask), window, softcap):
        check_arguments(*data, *metadata, sinks, alibi_slopes, window, softcap, tree_mask)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, block_size, num_kv_heads, value_dim = v_cache.shape
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=torch.float32)
    packed = ARGUMENTS.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        slot_mapping.data_ptr(), block_tables.data_ptr(), query_start.data_ptr(), seq_lens.data_ptr(),
        0 if sinks is None else sinks.data_ptr(), 0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if tree_mask is None else tree_mask.data_ptr(), out.data_ptr(),
        *strides[0][:2], *strides[1][:2], *strides[2][:2], *strides[3][:3], *strides[4][:3], block_tables.stride(0),
        num_tokens, seq_lens.shape[0], num_heads, num_kv_heads, head_dim, value_dim,
        num_blocks, block_size, block_tables.shape[1], window,
        torch.get_num_threads() if num_threads is None else num_threads,
        CACHE_DTYPES.index(k_cache.dtype), scale, softcap,
    )  # fmt: skip
    status = loaded.call(packed)
    if status:
        raise_status(status, slot_mapping, block_tables, query_start, seq_lens, k_cache)
    return out


def _fits(
    data: tuple[Tensor, ...], metadata: tuple[Tensor, ...], strides: list[tuple[int, ...]],
    optional: tuple[Tensor | None, ...], window: int, softcap: float,
) -> bool:  # fmt: skip
    """What `check_arguments` checks for the usual call, in a third of the time; False only means: look closer."""
    q, k, v, k_cache, v_cache = data
    slot_mapping, block_tables, query_start, seq_lens = metadata
    if any([tensor is not None for tensor in optional]) or window < 0 or softcap < 0:
        return False
    if not (q.dim() == 3 and v_cache.dim() == 4 and block_tables.dim() == 2 and seq_lens.dim() == 1):
        return False
    (num_tokens, num_heads, head_dim), (num_blocks, block_size, num_kv_heads, value_dim) = q.shape, v_cache.shape
    num_seqs, _ = block_tables.shape
    return (
        k.shape == (num_tokens, num_kv_heads, head_dim)
        and v.shape == (num_tokens, num_kv_heads, value_dim)
        and k_cache.shape == (num_blocks, block_size, num_kv_heads, head_dim)
        and slot_mapping.shape == (num_tokens,)
        and query_start.shape == (num_seqs + 1,)
        and seq_lens.shape == (num_seqs,)
        and num_heads % num_kv_heads == 0
        and q.dtype == k.dtype == v.dtype
        and k_cache.dtype == v_cache.dtype
        and slot_mapping.dtype == torch.int64
        and block_tables.dtype == query_start.dtype == seq_lens.dtype == torch.int32
        and all([stride[-1] == 1 for stride in strides])
        and all([t.is_cpu for t in data])
        and all([t.is_cpu and t.stride()[-1] == 1 for t in metadata])
    )


def raise_status(
    status: int, slot_mapping: Tensor, block_tables: Tensor, query_start: Tensor, seq_lens: Tensor, k_cache: Tensor
) -> None:
    """Turn cpu.c's FAIL(code, index) into a message with the values."""
    code, index = status % 8, status // 8
    num_blocks, block_size = k_cache.shape[:2]
    if code == 1:
        raise ValueError(
            f"paged_attention: slot_mapping[{index}] is {int(slot_mapping[index])}; allowed are -1 (write nothing) and "
            f"0..{num_blocks * block_size - 1} ({num_blocks} blocks of {block_size} tokens)"
        )
    if code == 2:
        raise ValueError(
            f"paged_attention: query_start[{index}] is {int(query_start[index])} in {query_start.tolist()}; it must "
            f"start at 0, ascend and end at most at the number of rows, {slot_mapping.shape[0]}"
        )
    if code == 3:
        rows = int(query_start[index + 1] - query_start[index])
        raise ValueError(
            f"paged_attention: seq_lens[{index}] is {int(seq_lens[index])} with {rows} query rows; it must be at least "
            f"that and at most {block_tables.shape[1] * block_size} ({block_tables.shape[1]} x {block_size} tokens)"
        )
    if code == 4:
        raise ValueError(
            f"paged_attention: block_tables[{index}] is {block_tables[index].tolist()} for "
            f"{int(seq_lens[index])} tokens; the blocks that hold visible tokens must be 0..{num_blocks - 1}"
        )
    raise MemoryError("paged_attention: no memory for the CPU kernel's scratch space")
