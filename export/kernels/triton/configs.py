"""Tile sizes of the Triton attention kernels: tables to edit after a measurement (`python3 bench/gpu_attention.py --sweep`).

A row is picked by the wider of the two head sizes, padded to a power of two, and by what is multiplied: 16-bit numbers
(an fp8 cache is converted to float16 on the way), or float32, which runs without tensor cores in small tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Join = Literal["kernel", "last"]
"""Who adds up the pieces of split keys: a second kernel, or the program of a sequence and head that ends last."""


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """One row a sequence: a program streams the keys of one kv head past its G query heads."""

    block_n: int
    """Keys a step."""
    num_warps: int
    num_stages: int
    """Steps in flight in the software pipeline."""
    min_span: int = 256
    """Fewest keys of a split."""
    programs_per_processor: int = 8
    """Up to this many programs a streaming multiprocessor, keys are split."""
    join: Join = "last"
    transposed: bool = False
    """Keys are the rows of both products, and G query heads are padded to 8 columns rather than to 16 rows (transposed.py)."""
    max_registers: int | None = None
    """Of a thread; fewer let more programs run on a processor at once. None: as many as the compiler likes."""


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Several rows a sequence: a program holds BLOCK_M query vectors (rows times the heads of a kv head)."""

    block_m: int
    block_n: int
    """Keys a step."""
    num_warps: int
    num_stages: int
    programs_per_processor: int = 2
    """Programs a streaming multiprocessor; each takes one tile after the other."""


# Shared memory of an H100/H200 block: 227 KiB. A stage holds block_n * (D + Dv) cache elements.
_DECODE_CONFIGS: dict[int, DecodeConfig] = {  # widest head size -> config, 16-bit cache
    64: DecodeConfig(block_n=128, num_warps=4, num_stages=3),
    128: DecodeConfig(block_n=32, num_warps=1, num_stages=5, transposed=True),
    256: DecodeConfig(block_n=32, num_warps=4, num_stages=3),
    512: DecodeConfig(block_n=32, num_warps=8, num_stages=2),
}
_DECODE_FP8_CONFIGS: dict[int, DecodeConfig] = {  # 8-bit cache
    64: DecodeConfig(block_n=128, num_warps=4, num_stages=3),
    128: DecodeConfig(block_n=32, num_warps=1, num_stages=4, transposed=True),
    256: DecodeConfig(block_n=32, num_warps=4, num_stages=3),
    512: DecodeConfig(block_n=32, num_warps=8, num_stages=2),
}
_MANY_PAIRS = 512
_FEW_PAIRS: dict[tuple[int, int], tuple[tuple[int, DecodeConfig], ...]] = {
    (128, 2): ((16, DecodeConfig(block_n=64, num_warps=2, num_stages=5, transposed=True)),),
    (128, 1): (
        (16, DecodeConfig(block_n=128, num_warps=4, num_stages=5, transposed=True)),
        (_MANY_PAIRS, DecodeConfig(block_n=64, num_warps=2, num_stages=5, transposed=True)),
    ),
}
"""Where latency counts: (widest head size, bytes of a cache element) -> pairs of a limit and what is used below it.

The limit is of sequences times kv heads."""
_NARROW_GROUP = 8
_WIDE_GROUPS: dict[
    tuple[int, int], DecodeConfig
] = {  # more query heads than that a kv head: (widest, cache bytes) -> config
    (128, 2): DecodeConfig(block_n=64, num_warps=2, num_stages=5),
    (128, 1): DecodeConfig(block_n=32, num_warps=1, num_stages=5),
}
_PREFILL_CONFIGS: dict[int, PrefillConfig] = {  # 16-bit cache
    64: PrefillConfig(block_m=128, block_n=64, num_warps=4, num_stages=3),
    128: PrefillConfig(block_m=256, block_n=64, num_warps=8, num_stages=5, programs_per_processor=4),
    256: PrefillConfig(block_m=64, block_n=64, num_warps=8, num_stages=2, programs_per_processor=1),
    512: PrefillConfig(block_m=32, block_n=32, num_warps=8, num_stages=1),
}
_PREFILL_FP8_CONFIGS: dict[int, PrefillConfig] = {  # 8-bit cache
    64: PrefillConfig(block_m=128, block_n=64, num_warps=4, num_stages=3),
    128: PrefillConfig(block_m=256, block_n=64, num_warps=8, num_stages=5, programs_per_processor=4),
    256: PrefillConfig(block_m=64, block_n=64, num_warps=8, num_stages=2, programs_per_processor=1),
    512: PrefillConfig(block_m=32, block_n=32, num_warps=8, num_stages=1),
}


def decode_config(
    widest: int, cache_bytes: int, query_bytes: int, num_pairs: int = _MANY_PAIRS, group: int = 1
) -> DecodeConfig:
    """For padded head size `widest` (at most 512), bytes of a cache element and of a query element.

    num_pairs: sequences times kv heads of the step. group: query heads of a kv head.
    """
    if query_bytes > 2:
        return DecodeConfig(block_n=32 if widest <= 128 else 16, num_warps=4, num_stages=1)
    widest = max(64, widest)
    if group > _NARROW_GROUP and (widest, cache_bytes) in _WIDE_GROUPS:
        return _WIDE_GROUPS[widest, cache_bytes]
    for limit, config in _FEW_PAIRS.get((widest, cache_bytes), ()):
        if num_pairs < limit:
            return config
    return (_DECODE_FP8_CONFIGS if cache_bytes == 1 else _DECODE_CONFIGS)[widest]


def prefill_config(widest: int, cache_bytes: int, query_bytes: int) -> PrefillConfig:
    """As `decode_config`, for sequences of several rows."""
    if query_bytes > 2:
        size = 32 if widest <= 128 else 16
        return PrefillConfig(block_m=size, block_n=size, num_warps=4, num_stages=1, programs_per_processor=4)
    table = _PREFILL_FP8_CONFIGS if cache_bytes == 1 else _PREFILL_CONFIGS
    return table[max(64, widest)]


def num_splits(config: DecodeConfig, num_pairs: int, max_seq_len: int, processors: int) -> int:
    """Most pieces that a sequence's keys are cut into: a power of two.

    num_pairs: sequences times kv heads, each a program when nothing is split. A sequence uses only as many pieces as hold
    `min_span` keys each; that is decided on the device.
    """
    wanted = config.programs_per_processor * processors // max(1, num_pairs)
    splits = max(1, min(wanted, -(-max_seq_len // config.min_span), 64))
    return 1 << (splits.bit_length() - 1)
