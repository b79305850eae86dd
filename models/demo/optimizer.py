"""Muon for the weight matrices and AdamW for the rest, grouped by shape so that a step is a few batched products."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(g_NRC: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration to the nearest semi-orthogonal matrices, [N, R, C], in bf16 (Jordan et al. 2024, Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g_NRC.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised (Jordan et al. 2024), for every 2-d parameter but the embedding; decoupled decay."""

    def __init__(
        self, parameters: list[nn.Parameter], *, lr: float, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[tuple(parameter.shape)].append(parameter)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros_like(torch.stack([p.data for p in group])) for group in self.groups]
        self.lr, self.momentum, self.decay = lr, momentum, decay

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with the learning rate times ``scale``."""
        lr = self.lr * scale
        for group, buffer in zip(self.groups, self.buffers):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp_(buffer, self.momentum)).float()
            factor = max(1.0, gradient.shape[-2] / gradient.shape[-1]) ** 0.5
            torch._foreach_mul_([p.data for p in group], 1 - lr * self.decay)
            torch._foreach_add_([p.data for p in group], list(update.unbind()), alpha=-lr * factor)


class Optimizer:
    """Muon and AdamW together; ``step(scale)`` multiplies both learning rates by ``scale`` and clears the gradients."""

    def __init__(self, model: nn.Module, *, muon_lr: float, adam_lr: float) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        fused = others[0].is_cuda
        self.muon = Muon(matrices, lr=muon_lr)
        self.adam_lr = adam_lr
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self.model = model

    def step(self, scale: float) -> None:
        """One update of all parameters."""
        self.muon.step(scale)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
