"""The Triton attention kernels on a GPU: numerics against the reference, then decode, prefill and mixed steps, timed.

    python3 bench/gpu_attention.py --out OUT [--sweep decode|prefill|all] [--peers] [--skip decode,mixed] [--only fresh]

Llama-3.1-8B's attention (32 heads, 8 kv heads, size 128, blocks of 16 tokens), bfloat16 queries; one call is one layer.
A CUDA graph holds calls over several layers' caches, more bytes than the second-level cache. Shares are of 4.0 TB/s
(reading), TFLOP/s count the products of visible pairs alone. OUT/gpu-attention.json holds every number. --sweep times
tile sizes: the winner is a line in export/kernels/triton/configs.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_fresh
import attention_rope
import torch
import triton as triton_package
from attention_steps import BLOCK, CACHES, DEVICE, DIM, HEADS, KV, LAYOUTS, READ_BYTES_PER_S, Step, graph_us
from attention_sweep import compile_all, sweep
from camshaft.export.kernels import reference
from camshaft.export.kernels.triton import paged_attention
from camshaft.export.kernels.triton.configs import DecodeConfig, decode_config


# ------------------------------------------------------------------------------------------------------------ numerics
def numerics() -> list[dict[str, Any]]:
    """Largest error against the reference, and whether batch-invariant rows are equal to the last bit."""
    results = []
    steps = {
        "decode": [(1, n) for n in (1, 15, 16, 17, 255, 256, 257, 1500, 3000)],
        "mixed": [(1, 600), (1, 37), (128, 128), (300, 1000), (1, 1), (2, 2), (0, 5), (64, 64), (1, 2000)],
    }
    for (name, lengths), cache, layout in itertools.product(steps.items(), CACHES, LAYOUTS):
        step = Step([pair for pair in lengths if pair[1]], cache, layout, layers=1)
        before = tuple(tensor.clone() for tensor in step.caches[0])
        expected = step.call(kernel=_reference)
        step_caches, step.caches = step.caches, [before]
        variants = ({}, {"batch_invariant": True}, {"decode": _joined_by_kernel(cache)}, {"decode": _transposed(cache)})
        for more in variants:
            difference = (step.call(**more).float() - expected.float()).abs()
            excess = (difference - 1.6e-2 * expected.float().abs()).max().item()
            # bfloat16 rounds the softmax's weights and the result
            same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, step_caches[0]))
            entry = {"step": name, "cache": cache, "layout": layout, "variant": str(more)}
            entry |= {"max_error": difference.max().item(), "cache_equal": same, "ok": excess < 1.6e-2 and same}
            results.append(entry)
    results.append(_invariance())
    for entry in results:
        print("ok  " if entry["ok"] else "FAIL", entry, flush=True)
    return results


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **more: Any
) -> torch.Tensor:
    """The reference over caches widened to float32, rounded again afterwards."""
    wide = [cache.float() for cache in (k_cache, v_cache)]
    k, v = (t.to(k_cache.dtype).to(q.dtype) for t in (k, v))
    out = reference.paged_attention(q, k, v, *wide, **more)
    for cache, result in zip((k_cache, v_cache), wide):
        cache.copy_(result.to(cache.dtype))
    return out


def _joined_by_kernel(cache: str) -> DecodeConfig:
    return dataclasses.replace(decode_config(DIM, CACHES[cache].itemsize, 2), join="kernel")


def _transposed(cache: str) -> DecodeConfig:
    return dataclasses.replace(decode_config(DIM, CACHES[cache].itemsize, 2), transposed=True)


def _invariance() -> dict[str, Any]:
    """One sequence of 700 tokens: whole, in chunks, with others around it, token by token at the end."""
    step = Step([(700, 700), (1, 900), (130, 400)], "bf16", layers=1)
    whole = step.call(batch_invariant=True)[:700].clone()
    differences = {}
    starts = step.metadata["query_start"]
    for name, (first, end) in {"chunk": (256, 512), "one row": (699, 700), "odd chunk": (37, 300)}.items():
        alone = {
            "q": step.q[first:end], "k": step.k[first:end], "v": step.v[first:end],
            "slot_mapping": step.metadata["slot_mapping"][first:end], "block_tables": step.metadata["block_tables"][:1],
            "query_start": torch.tensor([0, end - first], dtype=torch.int32, device=DEVICE),
            "seq_lens": torch.full_like(starts[:1], end),
        }  # fmt: skip
        out = paged_attention(
            **alone, k_cache=step.caches[0][0], v_cache=step.caches[0][1], scale=DIM**-0.5, max_query_len=end - first,
            max_seq_len=end, batch_invariant=True,
        )  # fmt: skip
        differences[name] = (out.float() - whole[first:end].float()).abs().max().item()
    return {"step": "batch invariance", **differences, "ok": not any(differences.values())}


# -------------------------------------------------------------------------------------------------------------- timing
DECODE_SHAPES = [(s, n) for s in (1, 8, 64, 256, 1024) for n in (256, 1500)] + [(8, 8192)]
PREFILL_SHAPES = {
    "16 x 512": [(512, 512)] * 16,
    "4 x 2048": [(2048, 2048)] * 4,
    "1 x 8192": [(8192, 8192)],
    "1 x 2048 over 6144": [(2048, 8192)],
    "16 x 128": [(128, 128)] * 16,
}


def decode_entry(step: Step, **more: Any) -> dict[str, Any]:
    """Time and bandwidth of a decode step."""
    us = step.time_us(**more)
    rate = step.bytes_read / us * 1e6
    return {"us": round(us, 2), "GB/s": round(rate / 1e9), "share": round(rate / READ_BYTES_PER_S, 3)}


def decode_rows(with_peers: bool) -> list[dict[str, Any]]:
    """All decode shapes, both caches, both layouts."""
    rows = []
    for (s, n), cache in itertools.product(DECODE_SHAPES, CACHES):
        for layout in LAYOUTS:
            step = Step([(1, n)] * s, cache, layout)
            labels = {"S": s, "context": n, "cache": cache}
            rows.append({**labels, "kernel": f"camshaft, {layout} layout", **decode_entry(step)})
            show(rows[-1:])
            if layout == "token" and s >= 64:
                rows.append(
                    {**labels, "kernel": "camshaft, batch invariant", **decode_entry(step, batch_invariant=True)}
                )
            if with_peers and layout == "token" and cache == "bf16":
                rows.append({**labels, "kernel": "flashinfer", **_flashinfer(step)})
    return rows


def latency_rows(threads: int) -> list[dict[str, Any]]:
    """Few sequences: other ways to split the keys, to join the splits and to launch."""
    rows = []
    for (s, n), cache in itertools.product([(1, 256), (1, 2048), (8, 1500)], CACHES):
        config = decode_config(DIM, CACHES[cache].itemsize, 2)
        variants = {
            "as it is": config,
            "join=kernel": dataclasses.replace(config, join="kernel"),
            "4 programs/SM": dataclasses.replace(config, programs_per_processor=4),
            "16 programs/SM": dataclasses.replace(config, programs_per_processor=16),
            "128 keys a step, 8 warps": dataclasses.replace(config, block_n=128, num_warps=8),
            **{f"span {n}": dataclasses.replace(config, min_span=n) for n in (64, 128, 512)},
        }
        step = Step([(1, n)] * s, cache)
        compile_all([lambda c=c, step=step: step.call(decode=c) for c in variants.values()], threads)
        for name, other in variants.items():
            rows.append({"S": s, "context": n, "cache": cache, "variant": name, **decode_entry(step, decode=other)})
    return rows


def uneven_rows() -> list[dict[str, Any]]:
    """Few long sequences among many short ones, as a captured graph sees them (splits from the longest that may come)."""
    rows = []
    for s, long, cache in ((64, 4, "fp8"), (256, 8, "fp8"), (1024, 16, "fp8")):
        step = Step([(1, 8000)] * long + [(1, 400)] * (s - long), cache)
        for programs in (4, 8, 16, 32):
            config = dataclasses.replace(decode_config(DIM, 1, 2), programs_per_processor=programs)
            entry = decode_entry(step, decode=config)
            rows.append(
                {"S": s, "context": f"{long} x 8000", "cache": cache, "kernel": f"{programs} programs/SM", **entry}
            )
    return rows


def prefill_entry(step: Step, **more: Any) -> dict[str, Any]:
    """Time and rate of a prefill step."""
    us = step.time_us(**more)
    return {"us": round(us, 1), "TFLOP/s": round(step.flops / us / 1e6, 1)}


def prefill_rows() -> list[dict[str, Any]]:
    """All prefill shapes, both caches, both layouts, and PyTorch's attention without a cache."""
    rows = []
    for (name, lengths), cache in itertools.product(PREFILL_SHAPES.items(), CACHES):
        for layout in LAYOUTS:
            step = Step(lengths, cache, layout, layers=4)
            rows.append(
                {"prompts": name, "cache": cache, "kernel": f"camshaft, {layout} layout", **prefill_entry(step)}
            )
        if cache == "bf16":
            rows.append(
                {
                    "prompts": name,
                    "cache": cache,
                    "kernel": "camshaft, batch invariant",
                    **prefill_entry(step, batch_invariant=True),
                }
            )
            rows.append({"prompts": name, "cache": cache, "kernel": "torch SDPA, dense", **_sdpa(step)})
    return rows


def mixed_rows() -> list[dict[str, Any]]:
    """1,000 decodes among prompts, also with the sizes that a captured graph pads to."""
    rows = []
    for name, lengths in {
        "1000 x 600 + 8 x 128": [(1, 600)] * 1000 + [(128, 128)] * 8,
        "256 x 600 + 1 x 2048": [(1, 600)] * 256 + [(2048, 2048)],
        "1000 x 600 alone": [(1, 600)] * 1000,
        "8 x 128 alone": [(128, 128)] * 8,
    }.items():
        for cache in CACHES:
            step = Step(lengths, cache)
            entry: dict[str, Any] = {"us": round(step.time_us(), 1)}
            if step.bounds["max_query_len"] > 1:
                entry["us, bounds of a graph"] = round(step.time_us(max_query_len=2048, max_seq_len=4096), 1)
            entry["floor us"] = round(step.bytes_read / READ_BYTES_PER_S * 1e6, 1)
            rows.append({"step": name, "cache": cache, **entry})
    return rows


def _sdpa(step: Step) -> dict[str, Any]:
    """PyTorch's fused attention of the same rows over dense keys; equal lengths only."""
    n, length = step.lengths[0]
    if n != length:
        return {"skipped": "torch SDPA has no causal mask for a cached prefix"}
    batch = len(step.lengths)
    q, k, v = (t.reshape(batch, n, -1, DIM).transpose(1, 2).contiguous() for t in (step.q, step.k, step.v))
    best: dict[str, Any] = {}
    for backend in (torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        try:
            with torch.nn.attention.sdpa_kernel(backend):
                us = graph_us(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                )
        except RuntimeError as error:
            best.setdefault("skipped", str(error)[:100])
            continue
        if us < best.get("us", float("inf")):
            best = {"us": round(us, 1), "TFLOP/s": round(step.flops / us / 1e6, 1), "backend": backend.name}
    return best


def _flashinfer(step: Step) -> dict[str, Any]:
    """FlashInfer's paged decode, without the write of the new keys."""
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError as error:
        return {"skipped": f"flashinfer does not import: {error}"}
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    lens = step.metadata["seq_lens"]
    blocks = (lens + BLOCK - 1) // BLOCK
    indptr = torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).int()
    indices = torch.cat([row[:n] for row, n in zip(step.metadata["block_tables"], blocks.tolist())])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr, indices, (lens - 1) % BLOCK + 1, HEADS, KV, DIM, BLOCK, q_data_type=torch.bfloat16,
        kv_data_type=step.caches[0][0].dtype,
    )  # fmt: skip
    us = graph_us(lambda: [wrapper.run(step.q, pair) for pair in step.caches]) / step.layers
    rate = step.bytes_read / us * 1e6
    return {"us": round(us, 2), "GB/s": round(rate / 1e9), "share": round(rate / READ_BYTES_PER_S, 3)}


# -------------------------------------------------------------------------------------------------------------- report
def show(rows: list[dict[str, Any]]) -> None:
    """A table on the terminal."""
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def main() -> int:
    """Runs what was asked for; 1 if a result is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", choices=("decode", "prefill", "all"))
    parser.add_argument("--peers", action="store_true", help="FlashInfer, if it imports")
    parser.add_argument(
        "--skip",
        default="",
        help="of numerics, decode, latency, uneven, prefill, mixed, rope numerics, rope, fresh numerics, fresh",
    )
    parser.add_argument("--only", default="", help="of the same; 'fresh' stands for its numerics, too")
    parser.add_argument("--threads", type=int, default=8, help="that compile in a sweep")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "numerics": numerics,
        "decode": lambda: decode_rows(options.peers),
        "latency": lambda: latency_rows(options.threads),
        "uneven": uneven_rows,
        "prefill": prefill_rows,
        "mixed": mixed_rows,
        "rope numerics": attention_rope.numerics,
        "rope": attention_rope.rows,
        "fresh numerics": lambda: attention_fresh.numerics(options.threads),
        "fresh": attention_fresh.rows,
    }
    for kind in ("decode", "prefill"):
        if options.sweep in (kind, "all"):
            sections[f"sweep {kind}"] = lambda kind=kind: sweep(kind, options.threads)
    results: dict[str, Any] = {
        "command": "python3 " + " ".join(sys.argv), "gpu": torch.cuda.get_device_name(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton_package.__version__,
    }  # fmt: skip
    only = options.only.replace("fresh", "fresh numerics,fresh") if options.only else ",".join(sections)
    for name, function in sections.items():
        if name in options.skip.split(",") or name not in only.split(","):
            continue
        start = time.perf_counter()
        with torch.inference_mode():
            results[name] = function()
        results[f"{name} s"] = round(time.perf_counter() - start, 1)
        (options.out / "gpu-attention.json").write_text(json.dumps(results, indent=1))
    for name in sections:
        if not name.endswith("numerics") and name in results:
            print(f"\n{name} ({results[f'{name} s']} s)")
            show(results[name])
    names = ("numerics", "rope numerics", "fresh numerics")
    checks = [entry for name in names for entry in results.get(name, []) if entry.get("ours", True)]
    return 0 if all(entry["ok"] for entry in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
