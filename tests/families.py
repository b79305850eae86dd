"""Small random configs of many decoder families: hidden 64, two layers, vocabulary 128."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_HYBRID = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_FALCON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "new_decoder_architecture": False,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 16}),
    "gemma": ("GemmaConfig", {**_GQA, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 16, **_HYBRID}),
    "phi": ("PhiConfig", _GQA),
    "phi3": ("Phi3Config", {**_GQA, "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", _BASE),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
            "pad_token_id": 1,
        },
    ),
    "olmo2": ("Olmo2Config", _GQA),
    "granite": (
        "GraniteConfig",
        {
            **_GQA,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
        },
    ),
    "cohere2": ("Cohere2Config", {**_GQA, **_HYBRID}),
    "glm4": ("Glm4Config", {**_GQA, "head_dim": 16, "pad_token_id": 0}),
    "starcoder2": ("Starcoder2Config", {**_GQA, "sliding_window": 16}),
    "stablelm": ("StableLmConfig", _GQA),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GQA, "head_dim": 16, **_MOE}),
    "gpt_oss": ("GptOssConfig", {**_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **_HYBRID}),
    "bloom": ("BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {**_FALCON, "multi_query": True, "alibi": False}),
    "falcon_alibi": ("FalconConfig", {**_FALCON, "multi_query": False, "alibi": True}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "codegen": ("CodeGenConfig", {**_GPT, "rotary_dim": 8}),
    "mpt": ("MptConfig", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 256,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
        },
    ),
}
"""Every family that the tests hold to Transformers' eager tokens."""

MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("OlmoConfig", _GQA),
    "olmo3": ("Olmo3Config", {**_GQA, "sliding_window": 16}),
    "cohere": ("CohereConfig", _GQA),
    "glm": ("GlmConfig", {**_GQA, "head_dim": 16, "pad_token_id": 0}),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "nemotron": ("NemotronConfig", _GQA),
    "persimmon": ("PersimmonConfig", _BASE),
    "qwen2_moe": ("Qwen2MoeConfig", {**_GQA, **_MOE, "shared_expert_intermediate_size": 32}),
    "olmoe": ("OlmoeConfig", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", {**_GQA, "num_local_experts": 4}),
    "helium": ("HeliumConfig", {**_GQA, "head_dim": 16}),
    "exaone4": ("Exaone4Config", {**_GQA, "sliding_window": 16}),
    "smollm3": ("SmolLM3Config", {**_GQA, "pad_token_id": 0}),
    "ernie4_5": ("Ernie4_5Config", _GQA),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {**_GQA, "head_dim": 16}),
    "seed_oss": ("SeedOssConfig", {**_GQA, "head_dim": 16}),
    "arcee": ("ArceeConfig", _GQA),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "jais2": ("Jais2Config", _GQA),
    "apertus": ("ApertusConfig", _GQA),
    "biogpt": ("BioGptConfig", _BASE),
    "xglm": (
        "XGLMConfig",
        {
            "vocab_size": 128,
            "d_model": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 256,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_GQA,
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "ministral": ("MinistralConfig", {**_GQA, "head_dim": 16, "sliding_window": 16}),
    "vaultgemma": ("VaultGemmaConfig", {**_GQA, "head_dim": 16}),
    "minimax_m2": ("MiniMaxM2Config", {**_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "diffllama": ("DiffLlamaConfig", _GQA),
}
"""Families of the support table that are checked by one short run each."""

REPRESENTATIVE = ("llama", "qwen3", "gemma2", "gpt2", "bloom", "falcon", "gpt_oss", "mixtral", "deepseek_v3")
"""Families that between them have every feature of the table: heads' norms, windows, soft caps, sinks, learned positions, ALiBi,
parallel residuals, experts, keys and values of different size. Tests of every family run on these in `make test`."""

FOREIGN_ATTENTION = ("falcon", "falcon_alibi")
"""Families whose attention class is fixed when the model is made; falcon's ALiBi is right in "sdpa" only."""


def every_family(names: Iterable[str], quick: Iterable[str] = REPRESENTATIVE) -> list[Any]:
    """Parameters of a test of every family: those outside `quick` are left to `make test-long`."""
    import pytest

    chosen = set(quick)
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.long) for name in names]


def tiny_config(name: str) -> Any:
    """The small config of a family."""
    import transformers

    class_name, fields = {**FAMILIES, **MORE_FAMILIES}[name]
    return getattr(transformers, class_name)(**fields)


def random_model(config: Any, seed: int = 0) -> Any:
    """A causal LM in eval mode, every parameter moved away from its initial value (norms and biases too)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    kwargs = {} if config.model_type == "falcon" else {"attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_(False)
    return model


def greedy_tokens(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by the eager model: the whole row again for every token, no cache (the oracle)."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


def greedy_choices(model: Any, prompt: list[int], tokens: list[int]) -> list[int]:
    """The eager model's choice at the place of each of `tokens`, which follow `prompt`, from one run over all of them.

    The choices are `tokens` if and only if those are the greedy continuation: each is then the choice after those before it.
    """
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.argmax(-1).tolist()  # type: ignore[no-any-return]
