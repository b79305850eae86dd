"""Writes a Llama-shaped checkpoint as a GGUF file without vocabulary, for token ids in and out; needs numpy and gguf.

    checkpoint   model.layers.3.self_attn.q_proj.weight [H*D, E]  bf16, fp16 or fp32
    GGUF         blk.3.attn_q.weight                    [H*D, E]  f32 or f16 (norms: f32)

llama.cpp rotates neighbouring entries of a head (0 and 1, 2 and 3, ...), Transformers those that lie half a head apart
(0 and D/2, ...), so the rows of q and k are put in llama.cpp's order. Tied embeddings are written once.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from protocol import MissingPeerError

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as float32 (numpy has no bfloat16, hence not the safetensors package)."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        data = raw[begin:end]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in ("F16", "F32"):
            values = np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[entry["dtype"]]).astype(np.float32)
        else:
            raise ValueError(f"{name} in {path} is {entry['dtype']}; allowed: BF16, F16, F32")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def neighbouring_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [H*D, E] from "half a head apart" to "neighbours": row i of a head's upper half follows that of the lower."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3)).reshape(weight.shape)


def checked_config(model: Path) -> dict[str, Any]:
    """config.json, where this file can express the model."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unfit = []
    if config["model_type"] != "llama":
        unfit.append(f"model_type {config['model_type']} (allowed: llama)")
    if rope.get("rope_type", "default") != "default":
        unfit.append(f"rope_type {rope['rope_type']} (allowed: default)")
    if config.get("attention_bias") or config.get("mlp_bias"):
        unfit.append("biases (allowed: none)")
    if not (model / "model.safetensors").is_file():
        unfit.append("no model.safetensors (allowed: a single file)")
    if unfit:
        raise MissingPeerError(f"to_gguf.py cannot write {model}: {', '.join(unfit)}")
    return config


def write_gguf(model: Path, path: Path, dtype: str) -> None:
    """Writes the checkpoint in `model` to `path`; `dtype` of the matrices: "f32" or "f16".

    Raises:
        MissingPeerError: a model that is not plain Llama.
        ValueError: another dtype, or a tensor that this file does not know.
    """
    import gguf

    if dtype not in ("f32", "f16"):
        raise ValueError(f"dtype is {dtype}; allowed: f32, f16")
    config = checked_config(model)
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    for name, weight in read_checkpoint(model / "model.safetensors").items():
        if name in TOP_NAMES:
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            target = TOP_NAMES[name]
        else:
            prefix, _, rest = name.partition("model.layers.")
            layer, _, inner = rest.partition(".")
            inner = inner.removesuffix(".weight")
            if prefix or inner not in LAYER_NAMES:
                raise ValueError(f"{name} in {model} is no tensor of a plain Llama; known: {', '.join(LAYER_NAMES)}")
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = neighbouring_pairs(weight, num_heads if inner == "self_attn.q_proj" else num_kv_heads)
            target = f"blk.{layer}.{LAYER_NAMES[inner]}.weight"
        writer.add_tensor(target, weight.astype(np.float16) if dtype == "f16" and weight.ndim > 1 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
