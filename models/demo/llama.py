"""The demo model as a plain training module whose state dict has the names Transformers' LlamaForCausalLM uses.

Shapes: B sequences, T tokens, E hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one Llama-shaped model (tied embeddings, grouped-query attention, rotary positions, SwiGLU)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 32
    vocab: int = 4096
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """The ``config.json`` of Transformers for this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": [0, 3],
            "pad_token_id": 0,
        }


MODEL = Shape(hidden=256, layers=9, heads=8, kv_heads=2, intermediate=768)
DRAFT = Shape(hidden=128, layers=2, heads=4, kv_heads=2, intermediate=768)


def rope_table(shape: Shape) -> Tensor:
    """[2, max_positions, head_dim] float32: cosines and sines of the rotary angles (Su et al. 2021)."""
    frequency = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angle = torch.outer(torch.arange(shape.max_positions).float(), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(x_BHTD: Tensor, rope: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BHTD * rope[0] + turned * rope[1]).to(x_BHTD.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x_BTE: Tensor, rope: Tensor) -> Tensor:
        b, t, _ = x_BTE.shape
        q, k, v = (
            projection(x_BTE).view(b, t, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = functional.scaled_dot_product_attention(
            _rotate(q, rope), _rotate(k, rope), v, is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTE: Tensor) -> Tensor:
        wide = x_BTE.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x_BTE.dtype)


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BTE: Tensor, rope: Tensor) -> Tensor:
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), rope)
        return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))


class Body(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, eps=shape.norm_eps)


class Llama(nn.Module):
    """Next-token logits of token ids; float32 parameters, run under bf16 autocast on a GPU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.register_buffer("rope", rope_table(shape), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 if "embed" in name else 0.5 * parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=0.0 if "o_proj" in name or "down_proj" in name else std)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] -> logits [B, T, V] in the autocast dtype."""
        assert isinstance(self.rope, Tensor)
        x = self.model.embed_tokens(tokens_BT)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = self.rope[:, : tokens_BT.shape[1]]
        for layer in self.model.layers:
            x = layer(x, rope)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)


def save(model: Llama, folder: Path) -> None:
    """Writes ``config.json``, ``generation_config.json`` and bf16 ``model.safetensors`` for Transformers."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=1) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": [0, 3], "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
