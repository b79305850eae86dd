"""Sections of `gpu_linear.py` beyond single products: invariance, quantization, and a whole layer between two attentions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from camshaft.export.kernels import gemm, gemm_ops, row_quantize  # noqa: F401  gemm_ops registers the operators
from camshaft.export.kernels.gemm import Config
from camshaft.export.kernels.gemm_tiled import TiledConfig
from camshaft.graph.ops import DEFINITIONS
from linear_cases import BANDWIDTH, BF16, DEVICE, SHAPES, Weights, floor, name_of, quantized, seconds
from torch import Tensor

ops = torch.ops.camshaft
HIDDEN, INTERMEDIATE, EPS = SHAPES["o"][0], SHAPES["down"][1], 1e-5
LAYERS = 4
"""Layers whose weights are used in turn."""
ADD_NORM, GLU, QUANTIZE = (
    DEFINITIONS[op] for op in (ops.add_rms_norm.default, ops.glu.default, ops.quantize_rows.default)
)
Chooser = Callable[[Any, int, int], Config | None]


# ----------------------------------------------------------------------------------------------------------- invariance
def invariant(dtype: str) -> dict[str, Any]:
    """Rows alone and in batches with the invariant configuration, and the bits of other tile sizes, on real shapes."""
    base = gemm.INVARIANT_FP8 if dtype == "fp8" else gemm.INVARIANT_HALF
    others = [
        replace(base, block_m=m, block_n=n, block_k=k, warps=w, stages=3)
        for m, n, k, w in ((64, 32, base.block_k, 4), (64, 64, base.block_k // 2, 4), (128, 128, base.block_k // 2, 8),
                           (128, 256, base.block_k // 2, 8))
    ]  # fmt: skip
    result: dict[str, Any] = {"dtype": dtype, "config": name_of(base)}
    for shape in ("o", "down"):
        weights = Weights(dtype, *SHAPES[shape])
        x, scale = weights.rows(200)

        def product(config: TiledConfig, begin: int, end: int, x=x, scale=scale, weights=weights) -> Tensor:
            part = None if scale is None else scale[begin:end]
            return gemm.run(config, x[begin:end], weights.copies[0], part, weights.scale, None, BF16)

        whole = product(base, 0, 200)
        slices = ((0, 1), (57, 1), (199, 1), (3, 2), (100, 17), (136, 64))
        different = [f"{b}+{s}" for b, s in slices if not torch.equal(product(base, b, b + s), whole[b : b + s])]
        result[shape] = {
            "rows alone and in batches": "equal" if not different else f"DIFFERENT: {different}",
            "equal bits": {name_of(c): torch.equal(product(c, 0, 200), whole) for c in others},
            "ms": {
                rows: 1e3 * seconds(
                    [lambda w=w, r=rows: gemm.run(base, *_row_operands(x, scale, r, w, weights), None, BF16)  # noqa: B023
                     for w in weights.copies], floor(dtype, rows, weights.n, weights.k))
                for rows in (1, 16, 64, 200)
            },
        }  # fmt: skip
    print("invariant", result, flush=True)
    return result


def _row_operands(
    x: Tensor, scale: Tensor | None, rows: int, weight: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return x[:rows], weight, None if scale is None else scale[:rows], weights.scale


# --------------------------------------------------------------------------------------------------------- quantization
def quantize(quick: bool) -> list[dict[str, Any]]:
    """ms of norm + quantize and of gate + quantize: Inductor's kernels and those of `row_quantize`."""
    gain = torch.randn(HIDDEN, device=DEVICE, dtype=BF16)

    def norm(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        normed, total = ADD_NORM(x, residual, gain, EPS, 0.0, True)
        return *QUANTIZE(normed), total

    compiled_norm = torch.compile(norm, dynamic=True)
    compiled_glu = torch.compile(lambda y: QUANTIZE(GLU(y, "silu")), dynamic=True)
    results = []
    for rows in (2, 64, 1024) if quick else (1, 2, 64, 256, 1024, 8192):
        x, residual = torch.randn(2, 1, rows, HIDDEN, device=DEVICE, dtype=BF16)
        y = torch.randn(1, rows, 2 * INTERMEDIATE, device=DEVICE, dtype=BF16)
        cases: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
            "add_rms_norm + quantize": (
                lambda x=x, r=residual: compiled_norm(x, r),
                lambda x=x, r=residual: row_quantize.add_rms_norm_quantize(x, r, gain, EPS, 0.0, True),
                rows * HIDDEN * 7,
            ),
            "glu + quantize": (
                lambda y=y: compiled_glu(y), lambda y=y: row_quantize.glu_quantize(y, "silu"), rows * INTERMEDIATE * 5,
            ),
        }  # fmt: skip
        for name, (inductor, hand, size) in cases.items():
            a, b = inductor(), hand()
            values = [part[0].float() * part[1] for part in (a, b)]
            least = size / BANDWIDTH
            row = {
                "kernel": name, "tokens": rows, "inductor_ms": 1e3 * seconds([inductor], max(least, 4e-6)),
                "hand_ms": 1e3 * seconds([hand], max(least, 4e-6)), "floor_ms": 1e3 * least,
                "error": float((values[0] - values[1]).norm() / values[0].norm()),
            }  # fmt: skip
            print({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            results.append(row)
    return results


# ---------------------------------------------------------------------------------------------------------------- layer
class Layer:
    """Weights of one layer: o, gate_up, down, qkv, with scales where they are fp8, and two gains."""

    def __init__(self, dtype: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.gains = torch.ones(2, HIDDEN, device=DEVICE, dtype=BF16).unbind()
        self.weights: list[tuple[Tensor, Tensor | None]] = []
        for shape in ("o", "gate_up", "down", "qkv"):
            n, k = SHAPES[shape]
            weight = torch.randn(n, k, device=DEVICE, dtype=BF16).mul_(k**-0.5)
            if dtype == "fp8":
                weight, scale = quantized(weight)
                self.weights.append((weight, scale[:, 0].contiguous()))
            else:
                self.weights.append((weight, None))


def forward(hand: bool, inlined: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """attention's output, residual [1, T, 4096], a layer -> (q, k and v [1, T, 6144], residual).

    hand: fused quantization by `row_quantize`; inlined: fp8 products without scales, which are left to the next kernel.
    """
    one = torch.ones((), device=DEVICE)

    def product(x: Any, weight: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return ops.linear(x, weight, None)
        values, steps = x if isinstance(x, tuple) else QUANTIZE(x)
        if not inlined:
            return ops.scaled_linear(values, steps, weight, scale, None, BF16)
        rows = values.reshape(-1, values.shape[-1])
        y = torch._scaled_mm(rows, weight.t(), scale_a=one, scale_b=one, out_dtype=BF16, use_fast_accum=True)
        return (y.view(*values.shape[:-1], -1).float() * steps * scale).to(BF16)

    def norm(y: Tensor, residual: Tensor, gain: Tensor) -> tuple[Any, Tensor]:
        if not hand:
            return ADD_NORM(y, residual, gain, EPS, 0.0, True)
        values, steps, total = row_quantize.add_rms_norm_quantize(y, residual, gain, EPS, 0.0, True)
        return (values, steps), total

    def run(attended: Tensor, residual: Tensor, weights: Any, gains: Any) -> tuple[Tensor, Tensor]:
        o, gate_up, down, qkv = weights
        x, residual = norm(product(attended, *o), residual, gains[0])
        y = product(x, *gate_up)
        x, residual = norm(
            product(row_quantize.glu_quantize(y, "silu") if hand else GLU(y, "silu"), *down), residual, gains[1]
        )
        return product(x, *qkv), residual

    return run


@contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """The operators' configurations from `chooser` instead of the tables."""
    before = gemm.choose
    gemm.choose = chooser  # type: ignore[assignment]
    try:
        yield
    finally:
        gemm.choose = before


def layers(dtype: str, swept: dict[str, Any] | None, quick: bool) -> list[dict[str, Any]]:
    """ms of a layer by number of rows and by how its products are run."""
    best = {
        (row["tokens"], SHAPES[shape][0]): row["config"]
        for shape, rows in (swept or {}).items()
        if shape in SHAPES
        for row in rows
    }
    table = gemm.choose

    def measured(lines: Any, rows: int, n: int) -> Config | None:
        return best[rows, n] if (rows, n) in best else table(lines, rows, n)

    variants: dict[str, tuple[Chooser, bool, bool]] = {  # chooser, hand, inlined
        "library": (lambda lines, rows, n: None, False, False),
        "chosen": (measured, False, False),
    }
    if dtype == "fp8":
        variants["chosen, scales left to Inductor"] = (measured, False, True)
        variants["chosen, quantized by hand"] = (measured, True, False)
    stack = [Layer(dtype, seed) for seed in range(LAYERS)]
    tokens = (2, 16, 64) if quick else (1, 2, 8, 16, 32, 64, 256, 1024)
    inputs = {rows: torch.randn(2, 1, rows, HIDDEN, device=DEVICE, dtype=BF16).unbind() for rows in tokens}
    results: list[dict[str, Any]] = [
        {"tokens": rows, "dtype": dtype, "ms": {}, "floor_ms": _floor(dtype, rows)} for rows in tokens
    ]
    for name, (chooser, hand, inlined) in variants.items():
        torch._dynamo.reset()
        run = forward(hand, inlined)
        with chosen_by(chooser):
            call = run if hand else torch.compile(run, dynamic=True)
            for row in results:
                rows = row["tokens"]
                attended, residual = inputs[rows]
                calls = [lambda l=l: call(attended, residual, l.weights, l.gains) for l in stack]  # noqa: B023
                row["ms"][name] = round(1e3 * seconds(calls, 1e-4, 7), 5)
                if name == "library":
                    row["wanted"] = calls[0]()[0]
                row[f"error, {name}"] = float((calls[0]()[0] - row["wanted"]).norm() / row["wanted"].norm())
    for row in results:
        del row["wanted"]
        print("layer", row, flush=True)
    return results


def _floor(dtype: str, rows: int) -> float:
    return round(1e3 * sum(floor(dtype, rows, *SHAPES[shape]) for shape in ("o", "gate_up", "down", "qkv")), 5)
