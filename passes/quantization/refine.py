"""Refinement of a rounded weight: sweeps over all columns or groups in turn, and scales fitted to the values.

With W' = s (v - z) on a grid, D = W' - W and the Hessian H of the layer's inputs, the loss is tr(D H D^T). Coordinate descent
(Behdin et al. 2023, "QuantEase", section 3.2): column k goes to the grid's nearest point to w'_k - (D H)_k / H_kk, the best value
while all other columns stay. GPTQ answers an error by the columns behind it alone; a sweep goes on with all of them.

Where groups along K have scales of their own, a step is a group g with its scale: the best real values while all others stay are
t = w'_g - (D H)_g H_gg^-1, a row's loss is that of t and (v - t) H_gg (v - t)^T, and this is GPTQ's problem for the group alone.
So each candidate of the scale is tried with error compensation, and what was there stays unless one is better.

With values v - z fixed the loss is quadratic in a row's scales, one for each group, and its minimum is the solution of

    sum_h (c_g H_gh c_h^T) s_h = c_g (W H)_g^T          c_g = v - z of group g as a row, H_gh its and group h's block of H

No step raises the loss. Scales that are not stored in float32, or shared between rows, stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...graph.quant_formats import QuantizedWeight
from .grid import Grid

_BLOCK = 128
"""Columns between two products with the Hessian."""
_ROWS = 1024
"""Rows whose equations are solved at a time."""
_MOST = 2.0
"""Largest factor by which a sweep changes a scale."""


def refined(weight_NK: Tensor, restored_NK: Tensor, grid: Grid, hessian_KK: Tensor, *, sweeps: int) -> QuantizedWeight:
    """The weight [N, K] on the grid, from its values on it (`restored_NK`), after `sweeps`; float32, the Hessian damped."""
    restored = restored_NK.clone()
    for _ in range(sweeps):
        if grid.grouped and not grid.format.block:
            _sweep_groups(weight_NK, restored, grid, hessian_KK)
        else:
            _sweep(weight_NK, restored, grid, hessian_KK)
        if _has_own_scales(grid):
            grid, restored = _fitted(weight_NK, restored, grid, hessian_KK)
    return grid.encode(restored)


def _sweep(weight: Tensor, restored: Tensor, grid: Grid, hessian: Tensor) -> None:
    """One pass of coordinate descent, in place."""
    difference = restored - weight
    diagonal = hessian.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    for begin in range(0, weight.shape[1], _BLOCK):
        end = min(begin + _BLOCK, weight.shape[1])
        gradient = difference @ hessian[:, begin:end]
        for column in range(begin, end):
            here = column - begin
            best = grid.round(restored[:, column] - gradient[:, here] / diagonal[column], column)
            change = best - restored[:, column]
            gradient.addr_(change, hessian[column, begin:end])
            restored[:, column] = best
            difference[:, column] += change


def _sweep_groups(weight: Tensor, restored: Tensor, grid: Grid, hessian: Tensor) -> None:
    """One pass of coordinate descent over groups and their scales, in place."""
    difference = restored - weight
    width = grid.width
    lower = torch.linalg.cholesky(_diagonal_blocks(hessian, width))
    factors = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    block = max(_BLOCK // width, 1) * width
    for begin in range(0, weight.shape[1], block):
        end = min(begin + block, weight.shape[1])
        gradient = difference @ hessian[:, begin:end]
        for index in range(begin, end, width):
            group = slice(index, index + width)
            step = torch.cholesky_solve(
                gradient[:, index - begin : index - begin + width].t(), lower[index // width]
            ).t()
            current = restored[:, group].clone()
            best = grid.improve(current, current - step, index, hessian[group, group], factors[index // width])
            change = best - current
            gradient.addmm_(change, hessian[group, begin:end])
            restored[:, group] = best
            difference[:, group] += change


def _diagonal_blocks(matrix_KK: Tensor, width: int) -> Tensor:
    """The blocks [K / width, width, width] on the diagonal."""
    groups = matrix_KK.shape[0] // width
    blocks = matrix_KK.unflatten(0, (groups, width)).unflatten(2, (groups, width))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _has_own_scales(grid: Grid) -> bool:
    """Whether every row has scales of its own, in float32."""
    return grid.parts.scale.dtype == torch.float32 and grid.format.group >= 0 and not grid.format.block


def _fitted(weight: Tensor, restored: Tensor, grid: Grid, hessian: Tensor) -> tuple[Grid, Tensor]:
    """The grid with the best scales for the values as they are, and the matrix that they make."""
    groups = grid.scale.shape[1]
    values = restored.unflatten(1, (groups, -1)) / grid.scale[:, :, None]
    scale = torch.cat(
        [
            _best_scales(weight[rows], values[rows], grid.scale[rows], hessian)
            for rows in (slice(begin, begin + _ROWS) for begin in range(0, weight.shape[0], _ROWS))
        ]
    )
    return grid.with_scale(scale), (values * scale[:, :, None]).flatten(1)


def _best_scales(weight: Tensor, values_NGW: Tensor, scale_NG: Tensor, hessian: Tensor) -> Tensor:
    """Solves for the scales [N, G] of some rows; rows whose equations have no solution near their scales keep them."""
    groups, width = values_NGW.shape[1:]
    system = torch.stack(
        [
            ((values_NGW[:, g] @ hessian[g * width : (g + 1) * width]).unflatten(1, (groups, width)) * values_NGW).sum(
                -1
            )
            for g in range(groups)
        ],
        1,
    )
    target = ((weight @ hessian).unflatten(1, (groups, width)) * values_NGW).sum(-1)
    system.diagonal(dim1=1, dim2=2).add_(1e-6 * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    found, failed = torch.linalg.solve_ex(system, target[..., None])
    found = found[..., 0]
    sound = (failed == 0) & ((found > scale_NG / _MOST) & (found < scale_NG * _MOST)).all(1)
    return torch.where(sound[:, None], found, scale_NG)
