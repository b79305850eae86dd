"""Random weights for an architecture: any size is built and measured without a checkpoint.

    RandomWeights.of("llama-3.1-8b")  ->  camshaft.compile(...)  ->  Engine

No module ever holds the weights: each one is drawn, from a seed and its name, when the engine asks for it, on the device of the
engine. So a model is never in memory twice, and what a pass joins, transposes or quantizes is freed as soon as it is done.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..graph.json_file import read_json_object
from ..graph.weights import Weight

if TYPE_CHECKING:
    from .huggingface import ModelSource

_LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_DEFAULT_STD = 0.02


def _llama(
    hidden: int, inner: int, layers: int, heads: int, *, factor: float = 8.0, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": hidden // heads, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "rope_parameters": {**_LLAMA_ROPE, "factor": factor}, "bos_token_id": 128000, "eos_token_id": 128001,
    }  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, factor=32.0, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""Public shapes by name, as their Hugging Face configs have them."""


@dataclass(frozen=True)
class RandomWeights:
    """A model to compile whose weights are drawn at random.

    config: a Transformers config. name: shown in documents. seed: of all weights. device: where they are drawn, "cuda" or "cpu";
    None: CUDA where torch sees a GPU. Matrices are normal with the config's `initializer_range`, biases 0, other vectors 1.
    """

    config: Any
    name: str
    seed: int = 0
    device: str | None = None

    @classmethod
    def of(cls, shape: str | Path, *, seed: int = 0, device: str | None = None) -> RandomWeights:
        """From the name of a shape in SHAPES, a config.json, or a directory that holds one. Raises ValueError."""
        facts, name = _config_dict(shape)
        from transformers import AutoConfig

        model_type = facts.pop("model_type", None)
        try:
            config = AutoConfig.for_model(model_type, **facts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{shape}: Transformers makes no config of it: {str(error).splitlines()[0]}") from error
        return cls(config, name, seed, device)

    def open(self, dtype: torch.dtype) -> ModelSource:
        """The model on the meta device, and weights that are drawn when they are loaded."""
        from . import huggingface

        model = huggingface._meta_model(None, self.config, dtype)
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        std = float(getattr(self.config.get_text_config(), "initializer_range", None) or _DEFAULT_STD)
        owners: dict[int, str] = {}  # tied weights are equal
        weights = {}
        for key, value in model.state_dict(keep_vars=True).items():
            owner = owners.setdefault(id(value), key)
            if isinstance(value, nn.Parameter):
                weights[key] = _random_weight(owner, tuple(value.shape), value.dtype, std, self.seed, device)
            else:
                weights[key] = Weight.from_tensor(value)
        return huggingface._source(f"{self.name} (random weights)", model, weights, None, None)


def _random_weight(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int, device: torch.device
) -> Weight:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()

    def load() -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest))
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

    return Weight(shape, dtype, load)


def _config_dict(shape: str | Path) -> tuple[dict[str, Any], str]:
    """(config, name) of a shape."""
    if str(shape) in SHAPES:
        return dict(SHAPES[str(shape)]), str(shape)
    path = Path(shape)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"random weights of {str(shape)!r}: no such shape and no such file; give a config.json, a directory that holds "
            f"one, or one of {', '.join(SHAPES)}"
        )
    facts = read_json_object(file, fix="give the config.json of a Hugging Face model")
    if not isinstance(facts.get("model_type"), str):
        raise ValueError(f"{file} names no model_type; give the config.json of a Hugging Face model")
    if facts.get("quantization_config") is not None:
        raise ValueError(
            f"{file} is of a quantized model; take quantization_config out, and ask for it with --quantize"
        )
    return facts, (path.resolve().name if path.is_dir() else path.stem)
