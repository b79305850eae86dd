"""Quantized linear layers of Llama-3.1-8B on a GPU: every format against its definition, then configurations against the clock.

    python3 bench/gpu_quant.py --out OUT [--seconds 400] [--sections numerics,sweep,layers,prefill] [--formats ...] [--rows 1,2,32]

numerics   every format at several numbers of rows, by the tables, against the definition in float32
sweep      each product alone, in a CUDA graph, its weights in turn from several copies so that the L2 cache does not hold them
layers     the four products of a layer in one CUDA graph, by the tables, at 1 to 256 rows: ms, and against bf16
prefill    the same at 4,096 rows: TFLOP/s

After a sweep, layers are timed once more with the best configurations of it.

Writes OUT/gpu-quant.json as sections end. The sweep stops at its share of --seconds and says what it left out. Tables for
`export/kernels/quantized/tables.py` are printed last. A wrong or failing variant is an error of its line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from camshaft.export.kernels import gemm, row_quantize  # noqa: E402
from camshaft.export.kernels.quantized.linear import quantized_linear  # noqa: E402
from linear_cases import BANDWIDTH, BF16, DEVICE, SHAPES, STREAM, Weights, error_of, seconds, synchronize  # noqa: E402
from quant_cases import (  # noqa: E402
    FORMATS,
    MAX_ERROR,
    SWEPT,
    Config,
    QuantWeights,
    configs,
    kernel_of,
    literal,
    name_of,
    product_of,
    tried,
)
from torch import Tensor  # noqa: E402

LAYER = ("qkv", "o", "gate_up", "down")
CHECK_ROWS = (1, 3, 8, 33, 64, 256, 2048) if DEVICE == "cuda" else (1, 33, 70)
CHECK_SHAPE = (1040, 4096) if DEVICE == "cuda" else (80, 256)
SWEEP_ROWS = (1, 2, 16, 32, 64, 128, 256, 512, 1024, 4096) if DEVICE == "cuda" else (1, 70)
LAYER_ROWS = (1, 2, 4, 8, 16, 32, 64, 256) if DEVICE == "cuda" else (1,)
PREFILL_ROWS = 4096 if DEVICE == "cuda" else 80
PEAK_TIME = 2 / 788e12
"""Seconds of a multiplication and addition in bf16."""
VARIANTS = {
    "bf16": None, "fp8": None, "w8a16": "int8/none", "w4a16": "int4:g128/none", "w4a8": "int4:g128/fp8", "w8a8": "int8/int8",
    "fp8 blocks": "fp8:block128/fp8_block", "nvfp4": "nvfp4/none",
}  # fmt: skip
COLUMNS = {"o": 4096, "down": 4096, "qkv": 8192, "gate_up": None}
"""The line of a table that a product belongs to: at most so many columns."""


# ------------------------------------------------------------------------------------------------------------- numerics
def numerics(formats: Sequence[str]) -> dict[str, dict[int, float | str]]:
    """{format: {rows: error, or what was raised}}"""
    results: dict[str, dict[int, float | str]] = {}
    for text in formats:
        weights = QuantWeights(text, *CHECK_SHAPE)
        parts, errors = weights.parts, dict[int, float | str]()
        for rows in CHECK_ROWS:
            x = weights.rows(rows)
            try:
                with torch.cuda.stream(STREAM):
                    out = quantized_linear(
                        x, parts.values, parts.scale, parts.zero_point, parts.global_scale, None, weights.x_scale, text
                    )
                synchronize()
                errors[rows] = error_of(out, weights.expected(x))
            except Exception as error:  # a benchmark: said, and the next one is run
                errors[rows] = _said(error)
        bad = [rows for rows, error in errors.items() if isinstance(error, str) or error > MAX_ERROR]
        listed = " ".join(f"{r}: {e}" if isinstance(e, str) else f"{r}: {e:.1e}" for r, e in errors.items())
        print(f"{'WRONG' if bad else 'ok':5} {text:24} {listed}", flush=True)
        results[text] = errors
    return results


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


# ---------------------------------------------------------------------------------------------------------------- sweep
def compile_all(text: str, rows_tried: Sequence[int], deadline: float) -> dict[str, str]:
    """Compiles what the sweep of a format runs, several at once. Returns what failed."""
    jobs: dict[tuple[Any, ...], tuple[Config, int, QuantWeights]] = {}
    for n, k in {(256, k) for _, k in SHAPES.values()}:
        small = QuantWeights(text, n, k)
        for shape in LAYER:
            small.n = SHAPES[shape][0]  # which configurations are tried depends on it
            for rows in rows_tried:
                for config in configs(small, rows):
                    jobs.setdefault(kernel_of(config, rows, k), (config, rows, small))
    failed: dict[str, str] = {}

    def build(config: Config, rows: int, weights: QuantWeights) -> None:
        if time.perf_counter() > deadline:
            failed[name_of(config)] = "not compiled in time"
            return
        try:
            with torch.inference_mode(), torch.cuda.stream(STREAM):
                product_of(weights, config)(weights.rows(rows), weights.copies[0])
        except Exception as error:  # a benchmark: the configuration is dropped, and said
            failed[name_of(config)] = _said(error)

    with ThreadPoolExecutor(os.cpu_count() if STREAM else 1) as pool:
        for job in jobs.values():
            pool.submit(build, *job)
    synchronize()
    print(f"{text}: {len(jobs)} kernels, failed: {failed}", flush=True)
    return failed


def sweep(text: str, rows_tried: Sequence[int], deadline: float) -> dict[str, Any]:
    """{shape: {rows: {"ms": {variant: ms}, "errors", "literals"}}, "failed"} of a format, variants best first."""
    failed = compile_all(text, rows_tried, deadline)
    results: dict[str, Any] = {"failed": failed}
    for shape in LAYER:
        weights = QuantWeights(text, *SHAPES[shape])
        results[shape] = {}
        for rows in rows_tried:
            if time.perf_counter() > deadline:
                print(f"{text}: no time left for {shape} from {rows} rows", flush=True)
                return results
            results[shape][rows] = measure(text, shape, weights, rows, failed)
        del weights
        if STREAM is not None:
            torch.cuda.empty_cache()
    return results


def _sweep_share(text: str, rows_tried: Sequence[int], end: float, formats_left: int) -> dict[str, Any]:
    """A sweep that ends at the format's share of the time until `end`, which is larger for the first formats."""
    now = time.perf_counter()
    return sweep(text, rows_tried, now + (end - now) * 2 / (formats_left + 1))


def measure(text: str, shape: str, weights: QuantWeights, rows: int, failed: dict[str, str]) -> dict[str, Any]:
    """One product: all variants, checked and timed."""
    x = weights.rows(rows)
    wanted = weights.expected(x)
    least = max(weights.bytes(rows) / BANDWIDTH, rows * weights.n * weights.k * PEAK_TIME)
    ms: dict[str, float] = {}
    errors: dict[str, float | str] = {}
    literals: dict[str, str] = {}
    for config in configs(weights, rows):
        name = name_of(config)
        if name in failed:
            continue
        product = product_of(weights, config)
        try:
            with torch.cuda.stream(STREAM):
                out = product(x, weights.copies[0])
            synchronize()
            errors[name] = error_of(out, wanted)
            if errors[name] > MAX_ERROR:  # type: ignore[operator]
                print(f"WRONG: {text} {shape} T={rows} {name}: error {errors[name]:.1e}", flush=True)
                continue
            calls = [lambda w=w, product=product: product(x, w) for w in weights.copies]
            ms[name] = 1e3 * seconds(calls, least, replays=3)
            literals[name] = literal(config)
        except Exception as error:  # a benchmark: recorded, and the next one is run
            errors[name] = _said(error)
            print(f"FAILED: {text} {shape} T={rows} {name}: {errors[name]}", flush=True)
    ms = dict(sorted(ms.items(), key=lambda item: item[1]))
    if ms:
        best = next(iter(ms))
        rate = (
            f"{weights.bytes(rows) / ms[best] / 1e6:5.0f} GB/s"
            if rows <= 64
            else f"{2 * rows * weights.n * weights.k / ms[best] / 1e9:4.0f} TFLOP/s"
        )
        print(f"{text:22} {shape:8} T={rows:<5} {ms[best]:.4f} ms {rate:>12} {best:36} | {tried(ms)}", flush=True)
    return {"ms": ms, "errors": errors, "literals": literals, "floor_ms": 1e3 * least}


def best_lines(results: dict[str, Any]) -> Iterator[tuple[int, int | None, list[str], str]]:
    """(rows, columns, products, variant): products of one line of a table share the variant with the least sum of times."""
    for rows in sorted({rows for shape in LAYER for rows in results.get(shape, {})}):
        for columns in dict.fromkeys(COLUMNS.values()):
            shapes = [s for s in LAYER if COLUMNS[s] == columns and rows in results.get(s, {})]
            found = [results[s][rows]["ms"] for s in shapes]
            names = set.intersection(*map(set, found)) if found else set()
            if names:
                yield rows, columns, shapes, min(names, key=lambda name: sum(one[name] for one in found))


def print_table(text: str, results: dict[str, Any]) -> None:
    """The best of each line as Python."""
    print(f"# {text}")
    for rows, columns, shapes, best in best_lines(results):
        found = [results[s][rows] for s in shapes]
        config, total = found[0]["literals"][best], sum(one["ms"][best] for one in found)
        print(f"    Choice(rows={rows}, columns={columns or '_ANY'}, config={config}),  # {total:.4f} ms")


def best_layers(text: str, results: dict[str, Any]) -> dict[int, float | str]:
    """{rows: ms of the four products of a layer}, each with the best of its line, in one CUDA graph."""
    chosen: dict[int, dict[str, str]] = {}
    for rows, _, shapes, best in best_lines(results):
        chosen.setdefault(rows, {}).update(dict.fromkeys(shapes, best))
    weights = {shape: QuantWeights(text, *SHAPES[shape]) for shape in LAYER}
    found: dict[int, float | str] = {}
    for rows, names in chosen.items():
        if len(names) < len(LAYER):
            continue
        calls: list[Callable[[], Tensor]] = []
        for shape, one in weights.items():
            config = {name_of(config): config for config in configs(one, rows)}[names[shape]]
            product, x, weight = product_of(one, config), one.rows(rows), one.copies[0]
            calls.append(lambda product=product, x=x, weight=weight: product(x, weight))  # type: ignore[misc]

        def layer(calls: list[Callable[[], Tensor]] = calls) -> None:
            for call in calls:
                call()

        try:
            found[rows] = 1e3 * seconds([layer], 5e-5)
        except Exception as error:  # a benchmark: recorded, and the next one is run
            found[rows] = _said(error)
        print(f"layer {text:20} T={rows:<5} by the best of the sweep: {found[rows]}", flush=True)
    return found


# --------------------------------------------------------------------------------------------------------------- layers
def _calls(variant: str) -> list[Callable[[Tensor], Tensor]]:
    """The products of a layer, by the tables: each takes x [T, K of that product]."""
    calls: list[Callable[[Tensor], Tensor]] = []
    for shape in LAYER:
        n, k = SHAPES[shape]
        text = VARIANTS[variant]
        if text is not None:
            weights = QuantWeights(text, n, k)
            parts = weights.parts
            given = (parts.values, parts.scale, parts.zero_point, parts.global_scale, None, weights.x_scale, text)
            calls.append(lambda x, given=given: quantized_linear(x, *given))  # type: ignore[misc]
        elif variant == "fp8":
            fp8 = Weights("fp8", n, k)
            assert fp8.scale is not None
            calls.append(lambda x, w=fp8.copies[0], s=fp8.scale: _fp8_product(x, w, s))  # type: ignore[misc]
        else:
            half = Weights("bf16", n, k).copies[0]
            calls.append(lambda x, w=half: gemm.linear(x, w, None))  # type: ignore[misc]
    return calls


def _fp8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return gemm.weight_only_linear(x, weight, scale, None, x.dtype)
    values, steps = row_quantize.quantize_rows(x)
    return gemm.scaled_linear(values, steps, weight, scale, None, x.dtype)


def layers(rows_tried: Sequence[int]) -> dict[str, dict[int, float | str]]:
    """{variant: {rows: ms of the four products}}"""
    results: dict[str, dict[int, float | str]] = {}
    flops = sum(2 * SHAPES[shape][0] * SHAPES[shape][1] for shape in LAYER)
    for variant in VARIANTS:
        results[variant] = {}
        calls = _calls(variant)
        for rows in rows_tried:
            inputs = [torch.randn(rows, SHAPES[shape][1], device=DEVICE, dtype=BF16) for shape in LAYER]

            def layer(calls=calls, inputs=inputs) -> None:
                for call, x in zip(calls, inputs):
                    call(x)

            try:
                results[variant][rows] = 1e3 * seconds([layer], max(5e-5, rows * flops / 788e12))
            except Exception as error:  # a benchmark: recorded, and the next one is run
                results[variant][rows] = _said(error)
            _print_layer(variant, rows, results, flops)
        del calls
        if STREAM is not None:
            torch.cuda.empty_cache()
    return results


def _print_layer(variant: str, rows: int, results: dict[str, dict[int, float | str]], flops: int) -> None:
    ms, plain = results[variant][rows], results["bf16"].get(rows)
    if isinstance(ms, str) or not isinstance(plain, float):
        print(f"layer {variant:10} T={rows:<5} {ms}", flush=True)
        return
    rate = f" {rows * flops / ms / 1e9:.0f} TFLOP/s" if rows >= 256 else ""
    print(f"layer {variant:10} T={rows:<5} {ms:.4f} ms  {plain / ms:.2f}x of bf16{rate}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400.0, help="of the whole script; the sweep is cut to fit")
    parser.add_argument("--sections", default="numerics,layers,prefill,sweep")
    parser.add_argument("--formats", default=",".join(SWEPT), help="of the sweep")
    parser.add_argument("--rows", default=",".join(map(str, SWEEP_ROWS)), help="of the sweep")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import triton

    begun = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {
        "command": sys.argv, "gpu": torch.cuda.get_device_name() if STREAM else "none", "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "seconds": {},
    }  # fmt: skip
    swept_rows = [int(rows) for rows in args.rows.split(",")]
    formats, sections = args.formats.split(","), args.sections.split(",")
    work: list[tuple[str, Callable[[], Any]]] = []
    if "numerics" in sections:
        work.append(("numerics", lambda: numerics(FORMATS)))
    if "layers" in sections:
        work.append(("layers", lambda: layers(LAYER_ROWS)))
    if "prefill" in sections:
        work.append(("prefill", lambda: layers((PREFILL_ROWS,))))
    if "sweep" in sections:
        end = begun + args.seconds - 10
        for left, text in zip(range(len(formats), 0, -1), formats):
            work.append((f"sweep {text}", partial(_sweep_share, text, swept_rows, end, left)))
    with torch.inference_mode():
        for name, section in work:
            started = time.perf_counter()
            results[name] = section()
            results["seconds"][name] = round(time.perf_counter() - started, 1)
            (args.out / "gpu-quant.json").write_text(json.dumps(results, indent=1, default=str))
        for text in formats:
            if f"sweep {text}" in results:
                results[f"best layers {text}"] = best_layers(text, results[f"sweep {text}"])
    (args.out / "gpu-quant.json").write_text(json.dumps(results, indent=1, default=str))
    for text in formats:
        if f"sweep {text}" in results:
            print_table(text, results[f"sweep {text}"])
    print(results["seconds"])


if __name__ == "__main__":
    main()
