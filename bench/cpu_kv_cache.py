"""Attention over KV caches of float32, int8 and float8_e4m3fn on the CPU: the C kernel, beside the torch reference.

    python bench/cpu_kv_cache.py --out bench/results/cpu-kv-int8.json [--threads 1] [--repeats 15]

One call is a layer of a step: it writes the new tokens' keys and values and attends. Several layers take turns, so that no cache is
in the processor's own cache memory, and the dtypes take turns too. A value is the median of --repeats calls, and the fastest one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from camshaft.export.kernels import cpu, reference
from camshaft.graph.quant_ops import saturate
from torch import Tensor

BLOCK = 16
NUM_LAYERS = 8
SCALE = 30.0
"""Of keys and values, as calibrated int8 caches hold them."""


@dataclass(frozen=True)
class Shape:
    """A step: `sequences` of `length` tokens, of which `rows` are new."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    length: int
    sequences: int = 1
    rows: int = 1


SHAPES = (
    Shape("demo, decode", 8, 2, 32, 1000),
    Shape("Llama-3.2-1B, decode", 32, 8, 64, 1000),
    Shape("Llama-3.2-1B, decode", 32, 8, 64, 4000),
    Shape("Llama-3.2-1B, decode", 32, 8, 64, 1000, sequences=8),
    Shape("Llama-3.2-1B, 128 tokens of a prompt", 32, 8, 64, 1000, rows=128),
)


def step_of(shape: Shape) -> dict[str, Any]:
    """The arguments of `paged_attention` but for the caches."""
    blocks = -(-shape.length // BLOCK)
    tables = torch.arange(blocks * shape.sequences, dtype=torch.int32).view(shape.sequences, blocks)
    positions = torch.arange(shape.length - shape.rows, shape.length)
    slots = torch.cat([table.long()[positions // BLOCK] * BLOCK + positions % BLOCK for table in tables])
    total = shape.rows * shape.sequences
    key = (total, shape.num_kv_heads, shape.head_dim)
    return {
        "q": torch.randn(total, shape.num_heads, shape.head_dim), "k": torch.randn(key) * SCALE, "v": torch.randn(key) * SCALE,
        "slot_mapping": slots, "block_tables": tables,
        "query_start": torch.arange(0, total + 1, shape.rows, dtype=torch.int32),
        "seq_lens": torch.full((shape.sequences,), shape.length, dtype=torch.int32),
        "scale": shape.head_dim**-0.5 / SCALE, "max_query_len": shape.rows, "max_seq_len": shape.length,
    }  # fmt: skip


def caches_of(shape: Shape, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer."""
    size = (-(-shape.length // BLOCK) * shape.sequences, BLOCK, shape.num_kv_heads, shape.head_dim)
    pairs = [(torch.randn(size) * SCALE, torch.randn(size) * SCALE) for _ in range(NUM_LAYERS)]
    return [(saturate(key, dtype), saturate(value, dtype)) for key, value in pairs]


def seconds(kernel: Callable[..., Tensor], caches: list[tuple[Tensor, Tensor]], step: dict[str, Any]) -> float:
    """Time of a layer, the mean over all layers once."""
    begun = time.perf_counter()
    for k_cache, v_cache in caches:
        kernel(k_cache=k_cache, v_cache=v_cache, **step)
    return (time.perf_counter() - begun) / len(caches)


def measure(shape: Shape, repeats: int) -> list[dict[str, Any]]:
    """An entry for each dtype, in microseconds per layer and bytes of a layer's cache."""
    step = step_of(shape)
    caches = {dtype: caches_of(shape, dtype) for dtype in cpu.CACHE_DTYPES}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in caches}
    for repeat in range(repeats + 1):
        for dtype, layers in caches.items():
            taken = seconds(cpu.paged_attention, layers, step)
            if repeat:  # the first warms up
                times[dtype].append(taken)
    entries = []
    for dtype, layers in caches.items():
        by_reference = min(seconds(reference.paged_attention, layers[:2], step) for _ in range(3))
        entries.append({
            **asdict(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "median_us": round(1e6 * statistics.median(times[dtype]), 1),
            "fastest_us": round(1e6 * min(times[dtype]), 1),
            "reference_fastest_us": round(1e6 * by_reference, 1),
            "layer_bytes": sum(tensor.numel() * tensor.element_size() for tensor in layers[0]),
        })  # fmt: skip
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """What a reader wants to see."""
    lines = [f"{'step':<38} {'tokens':>7} {'cache':<14} {'us/layer':>9} {'fastest':>8} {'reference':>10} {'KB':>8}"]
    for e in entries:
        name = e["name"] + (f" of {e['sequences']}" if e["sequences"] > 1 else "")
        lines.append(
            f"{name:<38} {e['length']:>7} {e['dtype']:<14} {e['median_us']:>9.0f} {e['fastest_us']:>8.0f} "
            f"{e['reference_fastest_us']:>10.0f} {e['layer_bytes'] / 1e3:>8.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    entries = [entry for shape in SHAPES for entry in measure(shape, args.repeats)]
    facts = {
        "command": sys.argv[1:], "threads": args.threads, "repeats": args.repeats, "torch": torch.__version__,
        "machine": platform.machine(), "load": os.getloadavg()[0],
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps({**facts, "entries": entries}, indent=1) + "\n")
    print(table(entries))


if __name__ == "__main__":
    main()
