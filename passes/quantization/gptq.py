"""GPTQ: rounding column by column, each column's error answered by the columns that are not rounded yet.

Frantar, Ashkboos, Hoefler, Alistarh 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
For a layer y = x W^T with inputs X [T, K] the loss of a rounded W' is tr((W - W') H (W - W')^T) with H = X^T X (up to a
factor). With U the upper Cholesky factor of the damped H's inverse, column k is rounded and the error e = (w_k - w'_k) / U_kk is
taken off the columns j > k as e U_kj (section 3.3, steps 1 to 3). Columns go in blocks: within a block one by one, behind it by
one matrix product.

Any format whose grid is known beforehand can be rounded so: int4, int8, fp8, nvfp4, mxfp4, mxfp8 (`grid`). Order of the columns:

    "none"     as they are; a group's scales are chosen when its first column is reached, from what compensation made of it, by
               what rounding the group with compensation loses
    "static"   by falling diagonal of H; scales of all groups chosen beforehand: nothing changes for the kernels
    "gather"   by falling diagonal of H, and stored so: groups of alike columns, for which x is gathered along K by `order`

Memory: float32 copies of W, of H and of its inverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...graph.linear_format import LinearFormat, check_divides
from ...graph.quant_formats import QuantizedWeight
from .grid import Grid
from .recipe import ActOrder
from .refine import refined

_MAX_DAMP = 1.0


@dataclass(frozen=True)
class Rounded:
    """A weight after error-compensated rounding.

    parts: as it is stored. order: int64 [K]; stored column j multiplies x[order[j]]; None: as x is.
    """

    parts: QuantizedWeight
    order: Tensor | None = None


def gptq(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    format: LinearFormat,
    *,
    damp: float = 0.01,
    block: int = 128,
    act_order: ActOrder = "none",
    sweeps: int = 0,
    name: str = "the weight",
) -> Rounded:
    """Rounds a float matrix [N, K] to `format` for the least squared error of the layer's output.

    hessian_KK: X^T X of the layer's inputs (any positive factor), float32, on the weight's device; it is not changed. damp: what is
    added to the diagonal, as a share of its mean. block: columns between two updates of the rest. sweeps: of coordinate
    descent behind it (`refine`). Raises ValueError where groups do not divide K or H is not positive definite with the largest
    damping either (1).
    """
    check_divides(format, tuple(weight_NK.shape), name)
    hessian = hessian_KK.float()
    dead = hessian.diagonal() <= 0  # inputs that were always zero: their weights mean nothing
    weight = weight_NK.float().masked_fill(dead[None], 0.0)
    importance = hessian.diagonal().clamp(min=0)
    if act_order == "none":
        grid = Grid.of(weight, format, importance)
        factor, added = _inverse_factor(hessian, damp, name)
        return Rounded(_finished(weight, _rounded(weight, factor, grid, None, block), grid, hessian, added, sweeps))
    order = torch.argsort(importance, descending=True, stable=True)
    factor, added = _inverse_factor(hessian[order][:, order], damp, name)
    if act_order == "gather":
        weight, importance = weight[:, order], importance[order]
        grid = Grid.of(weight, format, importance)
        restored = _rounded(weight, factor, grid, None, block)
        return Rounded(_finished(weight, restored, grid, hessian[order][:, order], added, sweeps), order)
    grid = Grid.of(weight, format, importance)
    restored = _rounded(weight[:, order], factor, grid, order.tolist(), block)[:, torch.argsort(order)]
    return Rounded(_finished(weight, restored, grid, hessian, added, sweeps))


def _finished(
    weight: Tensor, restored: Tensor, grid: Grid, hessian: Tensor, added: float, sweeps: int
) -> QuantizedWeight:
    """What is stored of a rounded weight, after `sweeps` of coordinate descent; `added` to the Hessian's diagonal."""
    if not sweeps:
        return grid.encode(restored)
    damped = hessian.clone()
    damped.diagonal().add_(added)
    return refined(weight, restored, grid, damped, sweeps=sweeps)


def output_error(weight_NK: Tensor, restored_NK: Tensor, hessian_KK: Tensor) -> float:
    """Squared error of a layer's output over its squared norm: tr(D H D^T) / tr(W H W^T), D = W - W'; 0 where W H W^T is 0."""
    wide = weight_NK.float()
    difference = wide - restored_NK.float()
    error = float(((difference @ hessian_KK) * difference).sum())
    energy = float(((wide @ hessian_KK) * wide).sum())
    return error / energy if energy > 0 else 0.0


def corrected(
    weight_NK: Tensor, hessian_KK: Tensor, cross_KK: Tensor, *, damp: float = 0.01, name: str = "the weight"
) -> Tensor:
    """The float matrix that on the inputs as they will be comes closest to the layer's own output: W (C + l I) (H + l I)^-1.

    hessian_KK: mean of q q^T, q the inputs behind quantized layers and rounded as the format says. cross_KK: mean of x q^T, x the
    inputs of the unquantized model. l: `damp` of H's mean diagonal. Minimizes |W x - W' q|^2 + l |W - W'|^2, so GPTQ also answers
    what earlier layers lost (asymmetric calibration: Li et al. 2025, "GPTAQ", section 3). Raises ValueError as `gptq` does.
    """
    lower, added = _damped_cholesky(hessian_KK.float(), damp, name)
    target = weight_NK.float() @ cross_KK + added * weight_NK.float()
    return torch.cholesky_solve(target.t(), lower).t().contiguous()


def _inverse_factor(hessian_KK: Tensor, damp: float, name: str) -> tuple[Tensor, float]:
    """(the upper Cholesky factor U of the damped matrix's inverse: H^-1 = U^T U, what damping added to the diagonal)."""
    lower, added = _damped_cholesky(hessian_KK, damp, name)
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed):
        raise ValueError(
            f"{name}: the inverse of its inputs' second moments has no Cholesky factor; raise gptq_damp ({damp})"
        )
    return upper, added


def _damped_cholesky(hessian_KK: Tensor, damp: float, name: str) -> tuple[Tensor, float]:
    """(the lower Cholesky factor of H with a damped diagonal, what was added). Tries ten times the damping where there is none."""
    mean = float(hessian_KK.diagonal().mean()) or 1.0
    while damp <= _MAX_DAMP:
        damped = hessian_KK.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return lower, damp * mean
        damp = max(damp, 1e-4) * 10
    raise ValueError(
        f"{name}: the inputs' second moments have no Cholesky factor with damping up to {_MAX_DAMP}; they are not finite, or far "
        "too large for float32"
    )


def _rounded(weight_NK: Tensor, factor_KK: Tensor, grid: Grid, order: list[int] | None, block: int) -> Tensor:
    """The columns on the grid, each error answered by the columns behind it.

    order: the grid's column of each column; None: the same, and a group's scales are chosen when it is reached.
    """
    work = weight_NK.clone()
    dim, width = work.shape[1], grid.width
    chosen_here = order is None and grid.grouped and not grid.format.block
    if chosen_here:  # a group lies in one block, so that all its columns are up to date when it is reached
        block = max(block // width, 1) * width
    for begin in range(0, dim, block):
        end = min(begin + block, dim)
        part, factor = work[:, begin:end], factor_KK[begin:end, begin:end]
        errors = torch.empty_like(part)
        for column in range(end - begin):
            index = begin + column
            if chosen_here and index % width == 0:
                group = slice(column, column + width)
                grid.choose(part[:, group], index, factor[group, group])
            value = part[:, column].clone()
            part[:, column] = grid.round(value, index if order is None else order[index])
            error = (value - part[:, column]) / factor[column, column]
            part[:, column + 1 :].addr_(error, factor[column, column + 1 :], alpha=-1.0)
            errors[:, column] = error
        work[:, end:].addmm_(errors, factor_KK[begin:end, end:], alpha=-1.0)
    return work
