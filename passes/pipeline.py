"""The pipeline: every pass, in the order in which it runs. This list is the order; nothing else decides it."""

from __future__ import annotations

import torch

from .base import GraphPass
from .fuse_add_norm import FuseAddNorm
from .fuse_glu import FuseGlu
from .fuse_glu_quantize import FuseGluQuantize
from .fuse_norm_quantize import FuseNormQuantize
from .fuse_projections import FuseProjections
from .fuse_rope_cache import FuseRopeCache
from .match_attention import MatchAttention
from .match_linear import MatchLinear
from .match_rms_norm import MatchRmsNorm
from .match_rope import MatchRope
from .normalize import Normalize
from .page_attention import PageAttention
from .quantize_fp8 import QuantizeFp8
from .resolve_masks import ResolveMasks
from .select_rows import SelectRows


def canonicalize_passes() -> list[GraphPass]:
    """Semantic operators out of aten chains; legal for any program."""
    return [Normalize(), ResolveMasks(), MatchAttention(), MatchLinear(), MatchRmsNorm(), MatchRope(), Normalize()]


def fuse_passes() -> list[GraphPass]:
    """Fewer, larger operators; legal for any canonical program."""
    return [FuseProjections(), FuseGlu(), FuseAddNorm()]


def quantize_passes(format: str | None) -> list[GraphPass]:
    """Linear layers in another format ("fp8"), with what makes their inputs; none for None. Legal for any fused program."""
    if format is None:
        return []
    assert format == "fp8", format
    return [QuantizeFp8(), FuseNormQuantize(), FuseGluQuantize()]


def decoder_passes(
    *,
    block_size: int,
    quantize: str | None = None,
    cache_dtype: torch.dtype | None = None,
    fuse_rope: bool = False,
) -> list[GraphPass]:
    """The whole pipeline of a decoder that is served: one paged row of tokens in, logits of the sampled rows out.

    quantize: format of linear layers, None: as they are. cache_dtype: of keys and values, None: the one they are computed in.
    fuse_rope: attention turns queries and keys itself (CUDA, whose attention kernels can).
    """
    return [
        *canonicalize_passes(),
        *fuse_passes(),
        *quantize_passes(quantize),
        PageAttention(block_size=block_size, cache_dtype=cache_dtype),
        SelectRows(),
        Normalize(),
        *([FuseRopeCache()] if fuse_rope else []),
    ]


def module_passes() -> list[GraphPass]:
    """The pipeline of a module that is no decoder: canonical and fused, inputs and outputs as they were."""
    return [*canonicalize_passes(), *fuse_passes()]
