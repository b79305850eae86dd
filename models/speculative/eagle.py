"""EAGLE-3's draft layer (Li et al. 2025, section 3.1): one decoder layer on the target's hidden states.

    row of token t_p, H wide:
        f_(p-1) = fc(low, middle and high hidden state of the target at p - 1)        or, while drafting, g_(p-1)
        x       = [input_layernorm(embed(t_p)) ; hidden_norm(f_(p-1))]                2 H wide
        g_p     = f + attention(x), then + mlp(post_attention_layernorm(.))           its own hidden state
        logits  = lm_head(norm(g_p))                                                  over a vocabulary of its own, of token p + 1

A row lies at its token's position, and the row at 0, which has no hidden state before it, takes zeros; so does any row whose
hidden state is not known. (The project's own code has no row for the first token, and counts positions from the second; here a row
shares its token's block, so that what a block holds follows from the tokens up to its end.)

Checkpoints are those of the EAGLE project: fc, midlayer.*, norm, lm_head, `d2t` (what is added to a draft token to get the
target's), `t2d` (which of the target's tokens are drafted) and embed_tokens where it is not the target's; draft_vocab_size in a
Llama config.json, and the captured layers in eagle_config.eagle_aux_hidden_state_layer_ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import check_tensors, read_config, read_tensors, write_checkpoint

FILE = "model.safetensors"
ARCHITECTURE = "LlamaForCausalLMEagle3"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, heads, T, D], k and v [B, kv_heads, T, D]) -> [B, T, heads, D]"""


def named_layers(config: Any) -> tuple[int, ...]:
    """After how many of the target's layers a checkpoint says that its hidden states are captured; () where it does not."""
    return tuple((getattr(config, "eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids") or ())


def capture_layers(config: Any, num_layers: int) -> tuple[int, ...]:
    """After how many of the target's layers its hidden states are captured: as the config says, else EAGLE-3's choice.

    Raises ValueError for numbers that a target of `num_layers` layers does not have.
    """
    layers = named_layers(config) or (2, num_layers // 2, num_layers - 3)
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 < n < num_layers for n in layers):
        raise ValueError(
            f"the EAGLE checkpoint reads the hidden states after layers {list(layers)}, and the target has {num_layers} layers; "
            f"allowed: 1 to {num_layers - 1}. Give a checkpoint that was trained for this target"
        )
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"the EAGLE checkpoint names the layers {list(layers)}; allowed: ascending ones, each once")
    return layers


class EagleAttention(nn.Module):
    """Grouped-query attention with rotary positions on inputs of twice the hidden size."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        heads, kv_heads = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(2 * config.hidden_size, heads, bias=bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_heads, bias=bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_heads, bias=bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """[B, T, 2 H] -> [B, T, H]; rotary: cosines and sines [B, T, D]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        out: Tensor = self.o_proj(attend(q, k, v).flatten(2))
        return out


class EagleLayer(nn.Module):
    """The decoder layer ("midlayer")."""

    def __init__(self, config: Any) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

        super().__init__()
        self.self_attn = EagleAttention(config)
        self.mlp = LlamaMLP(config)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_before_residual = bool(getattr(config, "norm_before_residual", False))

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Embeddings and hidden states [B, T, H] -> its own hidden states [B, T, H]."""
        normed = self.hidden_norm(hidden)
        x = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        hidden = (normed if self.norm_before_residual else hidden) + self.self_attn(x, rotary, attend)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class EagleDraft(nn.Module):
    """The whole draft network; its state dict has the names of published checkpoints.

    config: a Transformers LlamaConfig with draft_vocab_size. fc_inputs: width of the captured hidden states together.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Any, fc_inputs: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(fc_inputs, config.hidden_size, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def draft_tokens(self) -> Tensor:
        """[draft_vocab_size] int64: the target's token for each of the draft's."""
        return torch.arange(self.d2t.shape[0], device=self.d2t.device) + self.d2t

    def forward(self, token_ids: Tensor, positions: Tensor, hidden: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Tokens and positions [B, T] int64, hidden states [B, T, H] -> (logits [B, T, draft_vocab_size], hidden [B, T, H])."""
        embedded = self.embed_tokens(token_ids).to(hidden.dtype)
        hidden = self.midlayer(embedded, hidden, self.rotary_emb(hidden, positions), attend)
        return self.lm_head(self.norm(hidden)), hidden


def read_eagle_config(directory: Path) -> Any:
    """The LlamaConfig of a checkpoint. Raises ValueError for one that is not EAGLE-3's."""
    from transformers import LlamaConfig

    facts = read_config(directory)
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not isinstance(facts.get(name), int)]
    if missing:
        raise ValueError(
            f"{directory}/config.json lacks {', '.join(missing)}; give the config.json of an EAGLE-3 checkpoint"
        )
    if facts.get("num_hidden_layers", 1) != 1:
        raise ValueError(
            f"{directory}/config.json: num_hidden_layers is {facts['num_hidden_layers']}; EAGLE-3's draft has 1: give its own "
            "config.json, not the target's"
        )
    config = LlamaConfig(
        **{name: value for name, value in facts.items() if name not in ("architectures", "model_type")}
    )
    if getattr(config, "draft_vocab_size", None) is None:
        config.draft_vocab_size = config.vocab_size
    return config


def read_eagle(directory: Path) -> EagleDraft:
    """The draft network of a checkpoint, on the CPU in the dtype in which it is stored.

    `embed_tokens` stays on the meta device where the checkpoint has none: then the target's are meant. Raises ValueError for
    tensors that are missing or do not go with the config.
    """
    config = read_eagle_config(directory)
    tensors = {_published(name): value for name, value in read_tensors(directory).items()}
    if "fc.weight" not in tensors or tensors["fc.weight"].dim() != 2:
        raise ValueError(f"{directory} lacks 'fc.weight', so it is no EAGLE-3 checkpoint (EAGLE 1 and 2 are others)")
    whole = config.draft_vocab_size == config.vocab_size
    if whole:  # such checkpoints need no maps
        tensors.setdefault("d2t", torch.zeros(config.vocab_size, dtype=torch.int64))
        tensors.setdefault("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
    with torch.device("meta"):
        draft = EagleDraft(config, tensors["fc.weight"].shape[1])
    expected = {name: tuple(value.shape) for name, value in draft.state_dict().items()}
    if "embed_tokens.weight" not in tensors:
        del expected["embed_tokens.weight"]
    check_tensors(directory, tensors, expected)
    draft.load_state_dict({name: tensors[name] for name in expected}, assign=True, strict=False)
    draft.d2t, draft.t2d = draft.d2t.long(), draft.t2d.bool()
    draft.rotary_emb = type(draft.rotary_emb)(config)  # its buffers are computed, not stored
    _check_maps(directory, draft)
    return draft.requires_grad_(False).eval()


def _published(name: str) -> str:
    """A tensor's name as the EAGLE project has it; other trainers write layers.0 and model.* for the same."""
    name = name.removeprefix("model.")
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _check_maps(directory: Path, draft: EagleDraft) -> None:
    """Raises ValueError where d2t names tokens that the target does not have, or t2d says otherwise."""
    tokens, vocab_size = draft.draft_tokens, draft.config.vocab_size
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size or tokens.unique().numel() != tokens.numel():
        raise ValueError(
            f"{directory}: d2t leads to the tokens {low} to {high}, {tokens.unique().numel()} of {tokens.numel()} different; "
            f"allowed: 0 to {vocab_size - 1}, each once"
        )
    if int(draft.t2d.sum()) != tokens.numel() or not bool(draft.t2d[tokens].all()):
        raise ValueError(f"{directory}: d2t and t2d name different tokens; download the checkpoint again")


def write_eagle(draft: EagleDraft, directory: Path, *, with_embeddings: bool = False) -> None:
    """Writes a checkpoint in the published format; floats are stored as bfloat16."""
    config = draft.config
    facts = {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "hidden_act": config.hidden_act,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
                 "draft_vocab_size", "max_position_embeddings", "rms_norm_eps", "eagle_config"):  # fmt: skip
        facts[name] = getattr(config, name)
    tensors = dict(draft.state_dict())
    if not with_embeddings:
        del tensors["embed_tokens.weight"]
    write_checkpoint(directory, FILE, facts, tensors)
