"""How a Transformers model is made to speak Camshaft's operators while it is traced.

One attention function, one mask function and one experts function are registered under the name "camshaft"; a model that
uses Transformers' interfaces needs nothing else, whatever its family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import ops as _ops
from ..graph.capture import CaptureError

NAME = "camshaft"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, V], None)."""
    for name in ("position_bias", "head_mask", "cu_seq_lens_q", "block_sequence_ids"):
        if kwargs.get(name) is not None:
            raise CaptureError(
                f"{type(module).__name__} passes {name} to attention, which camshaft::attention does not take"
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal and attention_mask is None:
        raise CaptureError(f"{type(module).__name__} attends in both directions; only causal decoders can be served")
    out = torch.ops.camshaft.attention(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        None,
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        int(sliding_window or 0),
        float(softcap or 0.0),
    )
    return out, None


def mask_forward(**kwargs: Any) -> Tensor:
    """The mask interface: returns `camshaft::mask`, which names the mask instead of computing it."""
    kind, size = _describe(kwargs["mask_function"])
    like = torch.empty((1, kwargs["q_length"]), device=kwargs.get("device"), dtype=torch.float32)
    return torch.ops.camshaft.mask(like, kind, size)


def _describe(function: Callable[..., Any]) -> tuple[str, int]:
    """The kind and size of a Transformers mask function: causal, with a sliding window at most."""
    names: list[tuple[str, int]] = []

    def walk(inner: Any) -> None:
        qualname = getattr(inner, "__qualname__", str(inner))
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or ())) if hasattr(inner, "__code__") else {}
        values = {name: cell.cell_contents for name, cell in cells.items()}
        if qualname.startswith("and_masks"):
            for part in values["mask_functions"]:
                walk(part)
        elif qualname.startswith(
            "remap_positions_for_packed_sequence"
        ):  # Transformers 5.18 on: positions within a sequence
            walk(values["mask_function"])
        elif qualname.startswith("sliding_window_overlay"):
            names.append(("sliding", int(values["sliding_window"])))
        elif qualname.startswith(("causal_mask_function", "packed_sequence_mask_function")):
            names.append(("causal", 0))
        else:
            raise CaptureError(
                f"attention mask {qualname.split('.')[0]!r} is not supported; supported: causal, sliding window"
            )

    walk(function)
    if ("causal", 0) not in names:
        raise CaptureError("the attention mask is not causal; only causal decoders can be served")
    sizes = [size for kind, size in names if kind == "sliding"]
    return ("sliding", min(sizes)) if sizes else ("causal", 0)


def experts_forward(module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The experts interface: hidden [T, C] (or [1, T, C]), index and weight [T, K] -> like hidden."""
    gated = bool(module.has_gate)
    activation = module.camshaft_activation
    up = module.gate_up_proj if gated else module.up_proj
    up_bias = (module.gate_up_proj_bias if gated else module.up_proj_bias) if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    return torch.ops.camshaft.moe(
        hidden.reshape(-1, hidden.shape[-1]),
        index,
        weight,
        up,
        module.down_proj,
        up_bias,
        down_bias,
        activation,
        gated,
        bool(module.is_transposed),
        not module.is_concatenated,
    ).view(hidden.shape)


def name_expert_gates(model: nn.Module) -> None:
    """Writes the name of each experts module's gate to `camshaft_activation`, before the trace, which sees no values.

    A gate is told apart by value: each known one is tried on random numbers. Raises CaptureError for an unknown gate.
    """
    for module in model.modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated"):
            setattr(module, "camshaft_activation", _gate_name(module))  # noqa: B010  nn.Module types attributes


def _gate_name(module: Any) -> str:
    x = torch.randn((7, 16), generator=torch.Generator().manual_seed(0)) * 6
    gated = bool(module.has_gate)
    expected = module._apply_gate(x) if gated else module.act_fn(x)
    for name in (*_ops.ACTIVATIONS, "swiglu_clamped"):
        interleaved = not module.is_concatenated
        if name == "swiglu_clamped" and not gated:
            continue
        if torch.allclose(_ops._expert_gate(x, name, interleaved, gated), expected, atol=1e-6):
            return name
    raise CaptureError(
        f"{type(module).__name__} uses an expert gate that is not known; known: {[*_ops.ACTIVATIONS, 'swiglu_clamped']}"
    )


def register() -> None:
    """Registers the three functions with Transformers (idempotent)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


@contextmanager
def symbolic_masks() -> Iterator[None]:
    """While it is open, Transformers' "eager" and "sdpa" masks are `camshaft::mask` too.

    For families that compute attention in their own module (ALiBi, GPT-J): they are traced as "sdpa" or "eager", and the
    pass `match_attention` recognises the form.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mapping = type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
    originals = {name: mapping[name] for name in ("eager", "sdpa")}
    mapping.update(dict.fromkeys(originals, mask_forward))
    try:
        yield
    finally:
        mapping.update(originals)
