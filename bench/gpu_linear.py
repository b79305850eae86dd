"""Linear layers of Llama-3.1-8B on a GPU: every kernel and configuration against an fp32 product, then against the clock.

    python3 bench/gpu_linear.py --out OUT [--quick] [--dtypes bf16,fp8] [--sections sweep,invariant,quantize,layer,one_row]

sweep      each product alone, in a CUDA graph, its weights in turn from several copies so that the L2 cache does not hold them
invariant  rows alone and in batches, to the last bit, and whether other tile sizes give the same bits
quantize   norm + quantize and gate + quantize: what Inductor makes of the definitions, and the kernels written by hand
one_row    a step of one token with fp8 weights (`linear_one_row.py`)
layer      a layer's products and what lies between them, compiled by Inductor: cuBLAS and the sweep's best

Writes OUT/gpu-linear.json as sections end; the table of the best is printed last. A wrong result is an error of its line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from camshaft.export.kernels import gemm  # noqa: E402
from camshaft.export.kernels.gemm import Config  # noqa: E402
from camshaft.export.kernels.gemm_skinny import RowsConfig, TileConfig  # noqa: E402
from camshaft.export.kernels.gemm_tiled import TiledConfig  # noqa: E402
from linear_cases import (  # noqa: E402
    BF16,
    MAX_ERROR,
    MAX_HEAD_ROWS,
    QUICK_TOKENS,
    SHAPES,
    STREAM,
    TOKENS,
    Weights,
    configs,
    error_of,
    floor,
    library,
    name_of,
    product_of,
    seconds,
    synchronize,
)
from linear_layer import invariant, layers, quantize  # noqa: E402
from linear_one_row import one_row  # noqa: E402


def compile_all(dtype: str, tokens: Sequence[int], quick: bool) -> dict[str, str]:
    """Compiles every kernel of the sweep, several at once. Returns what failed, and under "" how many there are."""
    jobs: dict[tuple[Any, ...], tuple[Config, int, int]] = {}
    for n, k in SHAPES.values():
        for rows in tokens:
            padded = 1 << (rows - 1).bit_length()
            for config in configs(dtype, rows, n, k, quick):
                width = {RowsConfig: padded, TileConfig: max(16, padded), TiledConfig: 0}[type(config)]
                jobs.setdefault((name_of(config), width, k % config.block_k), (config, rows, k))
    weights = {k: Weights(dtype, 256, k) for _, k in SHAPES.values()}
    inputs = {(rows, k): weights[k].rows(rows) for rows in tokens for k in weights}
    failed: dict[str, str] = {}

    def build(config: Config, rows: int, k: int) -> None:
        x, scale = inputs[rows, k]
        try:
            with torch.inference_mode(), torch.cuda.stream(STREAM):
                gemm.run(config, x, weights[k].copies[0], scale, weights[k].scale, None, BF16)
        except Exception as error:  # a benchmark: the configuration is dropped, and said
            failed[name_of(config)] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"

    with ThreadPoolExecutor(os.cpu_count() if STREAM else 1) as pool:
        for job in jobs.values():
            pool.submit(build, *job)
    synchronize()
    return failed | {"": f"{len(jobs)} kernels"}


def sweep(dtype: str, tokens: Sequence[int], quick: bool) -> dict[str, Any]:
    """{shape: [{"tokens", "best", "ms": {variant: ms}, "errors": {variant: error}, "percent", "rate"}]}, best first."""
    begun = time.perf_counter()
    failed = compile_all(dtype, tokens, quick)
    print(f"{dtype}: {failed.pop('')} compiled in {time.perf_counter() - begun:.0f} s", *failed.items(), flush=True)
    results: dict[str, Any] = {"failed": failed}
    for shape, (n, k) in SHAPES.items():
        weights = Weights(dtype, n, k)
        results[shape] = []
        for rows in tokens:
            if shape == "head" and rows > MAX_HEAD_ROWS:
                continue
            results[shape].append(measure(weights, rows, failed, quick))
            print(line(dtype, shape, results[shape][-1]), flush=True)
        del weights
        torch.cuda.empty_cache()
    return results


def measure(weights: Weights, rows: int, failed: dict[str, str], quick: bool) -> dict[str, Any]:
    """One product: all variants, checked and timed."""
    dtype, n, k = weights.dtype, weights.n, weights.k
    x, x_scale = weights.rows(rows)
    wanted = weights.expected(x, x_scale)
    least = floor(dtype, rows, n, k)
    tried: dict[str, Config | None] = dict.fromkeys(library(dtype, rows))
    products = library(dtype, rows)
    for config in configs(dtype, rows, n, k, quick):
        if name_of(config) not in failed:
            tried[name_of(config)] = config
            products[name_of(config)] = product_of(config)
    ms: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, product in products.items():
        with torch.cuda.stream(STREAM):
            out = product(x, weights.copies[0], x_scale, weights.scale)
        synchronize()
        if name != "library, no scales":
            errors[name] = error_of(out, wanted)
        if errors.get(name, 0.0) > MAX_ERROR[dtype]:
            print(f"WRONG: {dtype} T={rows} N={n} K={k} {name}: error {errors[name]:.1e}", flush=True)
            continue
        calls = [lambda w=w: product(x, w, x_scale, weights.scale) for w in weights.copies]  # noqa: B023
        ms[name] = 1e3 * seconds(calls, least)
    ordered = dict(sorted(ms.items(), key=lambda item: item[1]))
    best = next(name for name in ordered if name != "library, no scales")
    config = tried[best]
    return {
        "tokens": rows, "best": best, "ms": {name: round(value, 5) for name, value in ordered.items()},
        "floor_ms": 1e3 * least, "config": config, "percent": round(1e5 * least / ordered[best], 1), "errors": errors,
        "gb_s": round(n * k * (1 if dtype == "fp8" else 2) / ordered[best] / 1e6),
        "tflop_s": round(2 * rows * n * k / ordered[best] / 1e9),
    }  # fmt: skip


def line(dtype: str, shape: str, row: dict[str, Any]) -> str:
    """The best of a product, the library beside it, and the next two."""
    ms, best = row["ms"], row["best"]
    rate = f"{row['gb_s']:5} GB/s" if row["tokens"] <= 128 else f"{row['tflop_s']:4} TFLOP/s"
    others = [f"{name} {value:.4f}" for name, value in ms.items() if name not in (best, "library")][:3]
    return (
        f"{dtype:4} {shape:8} T={row['tokens']:<5} {ms[best]:.4f} ms {rate:>12} {row['percent']:5.1f}%  {best:28} "
        f"| library {ms.get('library', float('nan')):.4f} | {', '.join(others)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and configurations")
    parser.add_argument("--dtypes", default="bf16,fp8")
    parser.add_argument("--sections", default="sweep,invariant,quantize,layer,one_row")
    parser.add_argument("--tokens", default="", help="numbers of rows, instead of the usual ones")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import triton

    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = tuple(map(int, args.tokens.split(","))) if args.tokens else QUICK_TOKENS if args.quick else TOKENS
    results: dict[str, Any] = {
        "command": sys.argv, "gpu": torch.cuda.get_device_name() if STREAM else "none",
        "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "seconds": {},
    }  # fmt: skip
    dtypes, sections = args.dtypes.split(","), args.sections.split(",")
    work: list[tuple[str, Callable[[], Any]]] = [
        (f"sweep {dtype}", lambda dtype=dtype: sweep(dtype, tokens, args.quick))
        for dtype in dtypes
        if "sweep" in sections
    ]
    if "invariant" in sections:
        work.append(("invariant", lambda: [invariant(dtype) for dtype in dtypes]))
    if "quantize" in sections:
        work.append(("quantize", lambda: quantize(args.quick)))
    if "one_row" in sections:
        work.append(("one_row", lambda: one_row(args.quick)))
    if "layer" in sections:
        work.append(("layer", lambda: [layers(dtype, results.get(f"sweep {dtype}"), args.quick) for dtype in dtypes]))
    with torch.inference_mode():
        for name, section in work:
            begun = time.perf_counter()
            results[name] = section()
            results["seconds"][name] = round(time.perf_counter() - begun, 1)
            (args.out / "gpu-linear.json").write_text(json.dumps(results, indent=1, default=str))
    for dtype in dtypes:
        for shape, rows in results.get(f"sweep {dtype}", {}).items():
            print(*(line(dtype, shape, row) for row in rows if isinstance(row, dict)), sep="\n")
    print(results["seconds"])


if __name__ == "__main__":
    main()
