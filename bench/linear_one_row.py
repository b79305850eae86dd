"""Section `one_row` of `gpu_linear.py`: a step of one token with fp8 weights, and the kernels that quantize few rows.

products    one row in 16 bits by each fp8 weight, every configuration; "fp8 rows" is the product of a quantized row by the tables
gates       glu_quantize in one launch and in two, and quantize_rows by hand and by Inductor
layers      a layer with quantized rows, and without
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from camshaft.export.kernels import gemm, row_quantize
from camshaft.export.kernels.gemm import Config
from camshaft.export.kernels.gemm_one_row import OneRowConfig
from camshaft.export.kernels.gemm_skinny import RowsConfig, TileConfig
from linear_cases import (
    BANDWIDTH,
    BF16,
    DEVICE,
    MAX_ERROR,
    SHAPES,
    STREAM,
    Weights,
    error_of,
    floor,
    name_of,
    quantized,
    seconds,
    synchronize,
)
from linear_layer import ADD_NORM, EPS, GLU, HIDDEN, INTERMEDIATE, LAYERS, QUANTIZE, Layer, chosen_by, forward, ops
from torch import Tensor

# block_n, block_k, warps, stages
ONE_ROW = (
    (16, 1024, 8, 3), (8, 2048, 4, 1), (8, 2048, 4, 3), (4, 2048, 4, 1), (4, 4096, 8, 1), (8, 4096, 8, 1), (16, 2048, 4, 1),
    (16, 1024, 4, 1), (8, 1024, 4, 1), (8, 1024, 2, 1), (4, 4096, 4, 1), (16, 1024, 4, 3), (4, 2048, 2, 1),
)  # fmt: skip
CONFIGS: tuple[Config, ...] = (
    *(OneRowConfig(block_n=n, block_k=k, warps=w, stages=s) for n, k, w, s in ONE_ROW),
    RowsConfig(block_n=16, block_k=1024, warps=8, stages=3),
    RowsConfig(block_n=4, block_k=2048, warps=4, stages=1),
    *(TileConfig(block_n=64, block_k=256, splits=s, asm=asm) for s in (1, 2) for asm in (True, False)),
    TileConfig(block_n=64, block_k=128, stages=6, asm=True),
    TileConfig(block_n=128, block_k=128, asm=True),
    TileConfig(block_n=64, block_k=512, splits=2, stages=3, asm=True),
    TileConfig(block_n=32, block_k=256, weight_left=False, asm=True),
)


def label(config: Config) -> str:
    """A short name of a configuration."""
    if isinstance(config, OneRowConfig):
        return f"one n{config.block_n} k{config.block_k} w{config.warps} s{config.stages}"
    return name_of(config) + (" asm" if isinstance(config, TileConfig) and config.asm else "")


def one_row(quick: bool) -> dict[str, Any]:
    """All of the section."""
    _compile_all()
    found = {shape: _products(shape, *size) for shape, size in SHAPES.items()}
    best: dict[int, Config] = {}
    for n in {size[0] for size in SHAPES.values()}:
        rows = [found[shape]["ms"] for shape, size in SHAPES.items() if size[0] == n]
        usable = [config for config in CONFIGS if all(label(config) in row for row in rows)]
        best[n] = min(usable, key=lambda config: sum(row[label(config)] for row in rows))
    print("best by N", {n: label(config) for n, config in best.items()}, flush=True)
    return {"products": found, "gates": _gates(quick), "layers": _layers(best)}


# ------------------------------------------------------------------------------------------------------------- products
def _compile_all() -> None:
    def build(config: Config, k: int) -> None:
        weight = torch.zeros((256, k), device=DEVICE).to(torch.float8_e4m3fn)
        x, scale = torch.zeros((1, k), device=DEVICE, dtype=BF16), torch.ones(256, device=DEVICE)
        try:
            with torch.inference_mode(), torch.cuda.stream(STREAM):
                gemm.run(config, x, weight, None, scale, None, BF16)
        except Exception as error:  # a benchmark: the configuration is dropped where it is used, and said
            print(f"FAILED: {label(config)} {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)

    with ThreadPoolExecutor(os.cpu_count() if STREAM else 1) as pool:
        for k in sorted({k for _, k in SHAPES.values()}):
            for config in CONFIGS:
                pool.submit(build, config, k)
    synchronize()


def _products(shape: str, n: int, k: int) -> dict[str, Any]:
    weights = Weights("fp8", n, k)
    scale = weights.scale
    assert scale is not None
    x = torch.randn(1, k, device=DEVICE, dtype=BF16)
    wanted = weights.expected(x, None) * scale
    least = floor("fp8", 1, n, k)
    ms: dict[str, float] = {}
    errors: dict[str, float] = {}
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        label(config): lambda w, config=config: gemm.run(config, x, w, None, scale, None, BF16)  # type: ignore[misc]
        for config in CONFIGS
    }
    for name, call in calls.items():
        try:
            with torch.cuda.stream(STREAM):
                out = call(weights.copies[0])
            synchronize()
        except Exception as error:  # a benchmark: said when it was compiled
            errors[name] = float("inf")
            print(f"FAILED: {shape} {name} {type(error).__name__}", flush=True)
            continue
        errors[name] = error_of(out, wanted)
        if errors[name] > MAX_ERROR["bf16"]:
            print(f"WRONG: {shape} {name}: error {errors[name]:.1e}", flush=True)
            continue
        ms[name] = 1e3 * seconds([lambda w=w, call=call: call(w) for w in weights.copies], least)  # type: ignore[misc]
    rows, steps = quantized(x)
    ms["fp8 rows"] = 1e3 * seconds(
        [lambda w=w: gemm.scaled_linear(rows, steps, w, scale, None, BF16) for w in weights.copies], least  # type: ignore[misc]
    )  # fmt: skip
    ms = dict(sorted(ms.items(), key=lambda item: item[1]))
    listed = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in list(ms.items())[:6])
    print(f"one row {shape:8} floor {least * 1e6:.1f} us | fp8 rows {ms['fp8 rows'] * 1e3:.1f} | {listed}", flush=True)
    return {"ms": ms, "errors": errors, "floor_ms": 1e3 * least}


# --------------------------------------------------------------------------------------------------------- quantization
def _gates(quick: bool) -> list[dict[str, Any]]:
    compiled = torch.compile(QUANTIZE, dynamic=True)
    results = []
    for rows in (1, 64) if quick or STREAM is None else (1, 16, 64, 128, 8192):
        y = torch.randn(1, rows, 2 * INTERMEDIATE, device=DEVICE, dtype=BF16)
        x = torch.randn(1, rows, HIDDEN, device=DEVICE, dtype=BF16)
        calls: dict[str, Callable[[], Any]] = {
            "glu, one launch": lambda y=y: row_quantize.glu_quantize_whole(y, "silu"),  # type: ignore[misc]
            "quantize_rows, Inductor": lambda x=x: compiled(x),  # type: ignore[misc]
            "quantize_rows, by hand": lambda x=x: row_quantize.quantize_rows(x),  # type: ignore[misc]
        }
        for part in (512, 1024, 2048):
            name = f"glu, parts of {part}"
            calls[name] = lambda y=y, part=part: row_quantize.glu_quantize_parts(y, "silu", part=part)  # type: ignore[misc]
        expected = max(rows * INTERMEDIATE * 5 / BANDWIDTH, 4e-6)
        us = {name: round(1e6 * seconds([call], expected), 2) for name, call in calls.items()}
        same = all(
            torch.equal(a.float(), b.float())
            for a, b in zip(calls["glu, one launch"](), calls["glu, parts of 1024"](), strict=True)
        )
        results.append({"tokens": rows, "us": us, "equal": same})
        print("gates", results[-1], flush=True)
    return results


# ---------------------------------------------------------------------------------------------------------------- layer
def _by_hand(attended: Tensor, residual: Tensor, weights: Any, gains: Any) -> tuple[Tensor, Tensor]:
    # As engines are lowered: quantizations are whole operators
    (o, o_scale), (gate_up, gate_up_scale), (down, down_scale), (qkv, qkv_scale) = weights
    y = ops.scaled_linear(*ops.quantize_rows(attended), o, o_scale, None, BF16)
    x, scale, residual = ops.add_rms_norm_quantize(y, residual, gains[0], EPS, 0.0, True)
    y = ops.scaled_linear(x, scale, gate_up, gate_up_scale, None, BF16)
    y = ops.scaled_linear(*ops.glu_quantize(y, "silu"), down, down_scale, None, BF16)
    x, scale, residual = ops.add_rms_norm_quantize(y, residual, gains[1], EPS, 0.0, True)
    return ops.scaled_linear(x, scale, qkv, qkv_scale, None, BF16), residual


def _weight_only(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = ops.weight_only_linear(x, weight, scale, None, BF16)
    return out


def _exact(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (x.float() @ weight.float().t() * scale).to(BF16)


def _plain(
    attended: Tensor, residual: Tensor, weights: Any, gains: Any, product: Callable[..., Tensor] = _weight_only
) -> tuple[Tensor, Tensor]:
    # The variant for one token
    o, gate_up, down, qkv = weights
    x, residual = ADD_NORM(product(attended, *o), residual, gains[0], EPS, 0.0, True)
    y = product(GLU(product(x, *gate_up), "silu"), *down)
    x, residual = ADD_NORM(y, residual, gains[1], EPS, 0.0, True)
    return product(x, *qkv), residual


def _layers(best: dict[int, Config]) -> list[dict[str, Any]]:
    table = gemm.choose

    def swept(lines: Any, rows: int, n: int) -> Config | None:
        return best[n] if lines is gemm.WEIGHT_ONLY_TABLE and n in best else table(lines, rows, n)

    stack = [Layer("fp8", seed) for seed in range(LAYERS)]
    variants: dict[str, tuple[Callable[..., Any], bool, Any, tuple[int, ...]]] = {  # dynamic, chooser, tokens
        "quantized by Inductor": (forward(False, False), True, table, (1,)),
        "quantized by hand": (_by_hand, True, table, (1, 16, 64)),
        "one row": (_plain, False, table, (1,)),
        "one row, swept": (_plain, False, swept, (1,)),
    }
    inputs = {rows: torch.randn(2, 1, rows, HIDDEN, device=DEVICE, dtype=BF16).unbind() for rows in (1, 16, 64)}
    results = []
    for name, (run, dynamic, chooser, tokens) in variants.items():
        torch._dynamo.reset()
        with chosen_by(chooser):
            call = torch.compile(run, dynamic=dynamic)
            for rows in tokens:
                calls = [lambda l=l: call(*inputs[rows], l.weights, l.gains) for l in stack]  # type: ignore[misc]  # noqa: B023
                ms = round(1e3 * seconds(calls, 1e-4, 7), 5)
                wanted = _plain(*inputs[rows], stack[0].weights, stack[0].gains, _exact)[0].float()
                error = float((calls[0]()[0].float() - wanted).norm() / wanted.norm())
                results.append({"variant": name, "tokens": rows, "ms": ms, "error": error})
                print("layer", results[-1], flush=True)
    return results
