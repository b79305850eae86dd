"""A trained early exit: what stands between layer n of a model and its own head (cf. Elhoushi et al. 2024, LayerSkip).

    h [N, H] behind layer n  ->  norm(h + up silu(down h))  ->  the model's lm_head

LayerSkip trains the whole model so that early layers can be read by the head; here the model stays as it is, and a norm and a
low-rank adapter are trained. exit.safetensors has norm.weight [H], down.weight [R, H] and up.weight [H, R]; config.json has
exit_layer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import check_tensors, read_config, read_tensors, write_checkpoint

FILE = "exit.safetensors"


class ExitHead(nn.Module):
    """Norm and adapter of an exit behind `layer` layers; the adapter adds nothing when it is made."""

    def __init__(self, layer: int, hidden_size: int, rank: int, eps: float) -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        super().__init__()
        self.layer, self.eps = layer, eps
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        self.norm = LlamaRMSNorm(hidden_size, eps=eps)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H], what the head reads."""
        out: Tensor = self.norm(hidden + self.up(nn.functional.silu(self.down(hidden))))
        return out


def read_exit(directory: Path) -> ExitHead:
    """The exit of a checkpoint, on the CPU. Raises ValueError for one that is damaged or none."""
    facts, tensors = read_config(directory), read_tensors(directory)
    layer, eps = facts.get("exit_layer"), facts.get("rms_norm_eps")
    if not isinstance(layer, int) or not isinstance(eps, float):
        raise ValueError(
            f"{directory}/config.json: exit_layer is {layer!r} and rms_norm_eps {eps!r}; allowed: an integer and a number, as "
            "camshaft.models.speculative.train writes them"
        )
    check_tensors(directory, tensors, {name: tuple(tensors[name].shape) if name in tensors else () for name in
                                       ("norm.weight", "down.weight", "up.weight")})  # fmt: skip
    rank, hidden_size = tensors["down.weight"].shape
    with torch.device("meta"):
        head = ExitHead(layer, hidden_size, rank, eps)
    check_tensors(directory, tensors, {name: tuple(value.shape) for name, value in head.state_dict().items()})
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_(False).eval()


def write_exit(head: ExitHead, directory: Path) -> None:
    """Writes a checkpoint that `read_exit` reads."""
    config = {"model_type": "camshaft_exit", "exit_layer": head.layer, "rms_norm_eps": head.eps}
    write_checkpoint(directory, FILE, config, head.state_dict())
