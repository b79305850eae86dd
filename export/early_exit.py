"""What a build is told of an early exit: a number of layers, or the directory of an exit that was trained."""

from __future__ import annotations

from pathlib import Path

import torch

from ..graph.weights import Weight
from ..passes.split_early_exit import ExitWeights, check_exit
from .cache import weight_digest

ExitOption = int | str | Path | None
"""Layers in front of the exit; a checkpoint that `camshaft.models.speculative.exit` reads, which says how many; None: no exit."""


def read_exit_option(option: ExitOption, dtype: torch.dtype, name: str) -> tuple[int | None, ExitWeights | None]:
    """(layers in front of the exit, its own weights). Raises ValueError for what is neither a number nor a checkpoint."""
    if option is None:
        return None, None
    if not isinstance(option, (str, Path)):
        check_exit(option, None, name)
        return option, None
    from ..models.speculative.exit import read_exit

    head = read_exit(Path(option))
    named = {"norm": head.norm.weight, "down": head.down.weight, "up": head.up.weight}
    weights = {part: Weight.from_tensor(tensor.detach().to(dtype)) for part, tensor in named.items()}
    check_exit(head.layer, None, name)
    return head.layer, ExitWeights(**weights, eps=head.eps, digest=weight_digest(weights))
