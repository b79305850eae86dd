"""Quantized checkpoints of tiny models, packed here from the descriptions of their formats, and the models that they mean.

A writer takes a float32 matrix [N, K] and returns the tensors of its layer by suffix, the dense matrix that they mean, and what
activations are rounded to (a function, or None).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import random_model
from safetensors.torch import save_file
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Rounding = Callable[[Tensor], Tensor]


@dataclass
class Layer:
    """One layer as stored."""

    tensors: dict[str, Tensor]
    dense: Tensor
    rounding: Rounding | None = None


Writer = Callable[[Tensor], Layer]


@dataclass
class Written:
    """A checkpoint on disk; reference: the model in float32 that it means, its linear layers rounding activations as asked."""

    path: Path
    reference: Any
    dense: dict[str, Tensor] = field(default_factory=dict)


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A random model: hidden 128, one layer, sizes that groups of 32 divide."""
    import transformers

    facts = {
        "vocab_size": 96, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    config = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "gpt_oss": transformers.GptOssConfig,
    }
    return random_model(config[family](**facts))


class _Rounded(nn.Module):
    def __init__(self, linear: nn.Linear, rounding: Rounding) -> None:
        super().__init__()
        self.linear, self.rounding = linear, rounding

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rounding(x))


def write_checkpoint(
    path: Path,
    model: Any,
    writer: Writer,
    quantization: dict[str, Any],
    *,
    name_of: Callable[[str], Writer | None] | None = None,
) -> Written:
    """Writes `model` with its linear layers quantized, but for the head. name_of: another writer for some names."""
    path.mkdir(parents=True, exist_ok=True)
    reference = copy.deepcopy(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = Written(path, reference)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        chosen = writer if name_of is None else name_of(name)
        if chosen is None:
            continue
        layer = chosen(tensors.pop(f"{name}.weight").float())
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in layer.tensors.items()}
        written.dense[f"{name}.weight"] = layer.dense
        target = reference.get_submodule(name)
        target.weight.data = layer.dense.clone()
        if layer.rounding is not None:
            parent, _, child = name.rpartition(".")
            setattr(reference.get_submodule(parent), child, _Rounded(target, layer.rounding))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return written


# -------------------------------------------------------------------------------------------------------------- integers
def _words(values: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """Values [R, C] (0 to 2^bits - 1) along C in int32: `order[i]` of each 32 / bits columns goes to bits i * bits and up."""
    each = 32 // bits
    filled = torch.nn.functional.pad(values.long(), (0, -values.shape[1] % each))
    words = torch.zeros(values.shape[0], filled.shape[1] // each, dtype=torch.int64)
    for position, column in enumerate(order or range(each)):
        words |= filled[:, column::each] << (bits * position)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _integers(weight: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(unsigned values [N, K], scales [N, G] in float16, zeros [N, G], dense [N, K])."""
    rows, dim = weight.shape
    grouped = weight.reshape(rows, -1, group)
    top = 2**bits - 1
    if symmetric:
        scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = ((grouped.amax(-1) - grouped.amin(-1)) / top).half()
        zero = (-grouped.amin(-1) / scale.float()).round().clamp(1, top).half()
    wide = scale.float()[..., None], zero.float()[..., None]
    values = ((grouped / wide[0]).round() + wide[1]).clamp(0, top)
    dense = (values - wide[1]) * wide[0]
    return values.reshape(rows, dim).to(torch.uint8), scale, zero.to(torch.uint8), dense.reshape(rows, dim)


def awq(group: int = 32) -> Writer:
    """AutoAWQ's GEMM packing."""
    columns = [0, 2, 4, 6, 1, 3, 5, 7]

    def write(weight: Tensor) -> Layer:
        values, scale, zero, dense = _integers(weight, group, 4, False)
        tensors = {
            "qweight": _words(values.t(), 4, columns),
            "qzeros": _words(zero.t(), 4, columns),
            "scales": scale.t(),
        }
        return Layer(tensors, dense)

    return write


def gptq(
    group: int = 32, *, bits: int = 4, symmetric: bool = False, version: int = 1, act_order: bool = False
) -> Writer:
    """AutoGPTQ's packing; act_order: columns of a group lie anywhere, as desc_act leaves them."""

    def write(weight: Tensor) -> Layer:
        rows, dim = weight.shape
        length = dim if group == -1 else group
        index = torch.arange(dim) // length
        if act_order:
            index = index[torch.randperm(dim, generator=torch.Generator().manual_seed(dim))]
        order = index.argsort(stable=True)
        values, scale, zero, dense = _integers(weight[:, order], length, bits, symmetric)
        back = order.argsort()
        stored_zero = (zero.int() - (1 if version == 1 else 0)) % 2**bits
        tensors = {
            "qweight": _words(values[:, back], bits).t(), "qzeros": _words(stored_zero.t(), bits), "scales": scale.t(),
            "g_idx": index.int(),
        }  # fmt: skip
        return Layer(tensors, dense[:, back])

    return write


def packed(group: int = 32, *, bits: int = 4, symmetric: bool = True, rounding: Rounding | None = None) -> Writer:
    """compressed-tensors' pack-quantized."""

    def write(weight: Tensor) -> Layer:
        length = weight.shape[1] if group == -1 else group
        values, scale, zero, dense = _integers(weight, length, bits, symmetric)
        tensors = {
            "weight_packed": _words(values, bits), "weight_shape": torch.tensor(weight.shape), "weight_scale": scale,
        }  # fmt: skip
        if not symmetric:
            tensors["weight_zero_point"] = _words(zero.t(), bits).t()
        return Layer(tensors, dense, rounding)

    return write


def int8(*, static: float | None = None, symmetric: bool = True) -> Writer:
    """compressed-tensors' int-quantized: rows, and tokens or one static scale."""

    def write(weight: Tensor) -> Layer:
        values, scale, zero, dense = _integers(weight, weight.shape[1], 8, symmetric)
        tensors = {"weight": (values.int() - 128).to(torch.int8), "weight_scale": scale}
        if not symmetric:
            tensors["weight_zero_point"] = (zero.int() - 128).to(torch.int8)
        if static is None:
            return Layer(tensors, dense, int8_tokens)
        tensors["input_scale"] = torch.tensor([static])
        return Layer(tensors, dense, lambda x: (x / static).round().clamp(-127, 127) * static)

    return write


def int8_tokens(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


# ------------------------------------------------------------------------------------------------------------------- fp8
def fp8_tokens(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(E4M3).float() * scale


def fp8_blocks(x: Tensor) -> Tensor:
    parts = [fp8_tokens(part) for part in x.split(128, -1)]
    return torch.cat(parts, -1)


def fp8(
    strategy: str = "channel",
    *,
    static: float | None = None,
    scale_name: str = "weight_scale",
    weight_only: bool = False,
) -> Writer:
    """float8_e4m3fn with a scale for the tensor, each row ("channel") or each 128 x 128 ("block")."""

    def write(weight: Tensor) -> Layer:
        rows, dim = weight.shape
        if strategy == "block":
            scale = torch.stack([
                torch.stack([tile.abs().amax() / 448 for tile in band.split(128, 1)]) for band in weight.split(128, 0)
            ])  # fmt: skip
            spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :dim]
        else:
            scale = (
                weight.abs().amax(1, keepdim=True) / 448 if strategy == "channel" else (weight.abs().max() / 448)[None]
            )
            spread = scale
        values = (weight / spread).to(E4M3)
        tensors, dense = {"weight": values, scale_name: scale}, values.float() * spread
        if weight_only:
            return Layer(tensors, dense)
        if static is None:
            return Layer(tensors, dense, fp8_blocks if strategy == "block" else fp8_tokens)
        tensors["input_scale"] = torch.tensor(static)
        return Layer(tensors, dense, lambda x: (x / static).clamp(-448, 448).to(E4M3).float() * static)

    return write


# ------------------------------------------------------------------------------------------------------------------- fp4
def e2m1_bits(x: Tensor) -> Tensor:
    """The nearest of the eight magnitudes, as an index, with the sign as bit 3."""
    index = (x.abs()[..., None] - E2M1).abs().argmin(-1)
    return index + 8 * (x < 0).long()


def e2m1_values(bits: Tensor) -> Tensor:
    return E2M1[bits % 8] * torch.where(bits > 7, -1.0, 1.0)


def _bytes(bits: Tensor) -> Tensor:
    return (bits[..., 0::2] + 16 * bits[..., 1::2]).to(torch.uint8)


def nvfp4_rounding(overall: float) -> Rounding:
    """Activations in blocks of 16 with fp8 scales under one global scale."""

    def round_(x: Tensor) -> Tensor:
        blocks = (x / overall).unflatten(-1, (-1, 16))
        scale = (blocks.abs().amax(-1, keepdim=True) / 6).clamp(max=448).to(E4M3).float()
        return (e2m1_values(e2m1_bits(blocks / scale.clamp(min=1e-30))) * scale).flatten(-2) * overall

    return round_


def nvfp4(flavor: str, *, static: float | None = None) -> Writer:
    """flavor: "modelopt" (scales multiply) or "compressed-tensors" (global scales divide); static: of activations."""

    def write(weight: Tensor) -> Layer:
        overall = 2.0**-10  # a power of two, whose inverse is exact
        blocks = weight.unflatten(1, (-1, 16)) / overall
        scale = (blocks.abs().amax(-1) / 6).clamp(max=448).to(E4M3)
        bits = e2m1_bits(blocks / scale.float()[..., None].clamp(min=1e-30))
        dense = (e2m1_values(bits) * scale.float()[..., None] * overall).flatten(1)
        tensors = {"weight_scale": scale}
        if flavor == "modelopt":
            tensors |= {"weight": _bytes(bits.flatten(1)), "weight_scale_2": torch.tensor(overall)}
        else:
            tensors |= {"weight_packed": _bytes(bits.flatten(1)), "weight_global_scale": torch.tensor([1 / overall])}
        if static is None:
            return Layer(tensors, dense)
        if flavor == "modelopt":
            tensors["input_scale"] = torch.tensor(static)
        else:
            tensors["input_global_scale"] = torch.tensor([1 / static])
        return Layer(tensors, dense, nvfp4_rounding(static))

    return write


def mx_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4 of the last dimension: (bits [.., K / 32, 32], e8m0 [.., K / 32], dense)."""
    blocks = weight.unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    bits = e2m1_bits(blocks / 2 ** exponent[..., None])
    dense = (e2m1_values(bits) * 2 ** exponent[..., None]).flatten(-2)
    return bits, (exponent + 127).to(torch.uint8), dense


def mxfp4(weight: Tensor) -> Layer:
    """compressed-tensors' mxfp4-pack-quantized, weights alone."""
    bits, scale, dense = mx_blocks(weight)
    return Layer({"weight_packed": _bytes(bits.flatten(-2)), "weight_scale": scale}, dense)


def mxfp8(weight: Tensor) -> Layer:
    """float8_e4m3fn with e8m0 scales of blocks of 32, weights alone."""
    blocks = weight.unflatten(-1, (-1, 32))
    exponent = torch.ceil(torch.log2(blocks.abs().amax(-1) / 448))
    values = (blocks / 2 ** exponent[..., None]).to(E4M3)
    dense = (values.float() * 2 ** exponent[..., None]).flatten(-2)
    return Layer({"weight": values.flatten(-2), "weight_scale": (exponent + 127).to(torch.uint8)}, dense)


def pack_experts(weight_EKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gpt-oss: (blocks uint8 [E, N, K / 32, 16], scales uint8 [E, N, K / 32], dense [E, K, N])."""
    bits, scale, dense = mx_blocks(weight_EKN.transpose(1, 2).contiguous())
    return _bytes(bits), scale, dense.transpose(1, 2)
