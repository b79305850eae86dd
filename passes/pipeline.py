"""The pipeline: every pass, in the order in which it runs. This list is the order; nothing else decides it."""

from __future__ import annotations

import torch

from .base import GraphPass
from .bind_stored_weights import BindStoredWeights
from .capture_hidden import CaptureHidden
from .center_keys import CenterKeys
from .fold_channel_factor import FoldChannelFactor
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
from .quantization.algorithm import LayerQuantizer, Observer
from .quantization.recipe import Recipe
from .quantization.support import KernelSupport
from .quantize_linear import QuantizeLinear
from .resolve_masks import ResolveMasks
from .scale_kv_cache import ScaleKVCache
from .select_rows import SelectRows
from .split_early_exit import ExitWeights, MarkExit, SplitEarlyExit


def canonicalize_passes() -> list[GraphPass]:
    """Semantic operators out of aten chains; legal for any program."""
    return [Normalize(), ResolveMasks(), MatchAttention(), MatchLinear(), MatchRmsNorm(), MatchRope(), Normalize()]


def fuse_passes() -> list[GraphPass]:
    """Fewer, larger operators; legal for any canonical program."""
    return [FuseProjections(), FuseGlu(), FuseAddNorm()]


def quantize_passes(
    recipe: Recipe | None, quantizer: LayerQuantizer | None = None, kernels: KernelSupport | None = None
) -> list[GraphPass]:
    """Linear layers in other formats, with what makes their inputs; none for None. Legal for any fused program that is not paged.

    quantizer: quantizes by calibration data. kernels: of the target; None: the operators' definitions run every format.
    """
    if recipe is None or recipe.format is None and not recipe.overrides:
        return []
    fold = [FoldChannelFactor()] if recipe.calibrated else []
    return [QuantizeLinear(recipe, quantizer, kernels), *fold, FuseNormQuantize(), FuseGluQuantize()]


def stored_passes(kernels: KernelSupport | None = None) -> list[GraphPass]:
    """Linear layers that the checkpoint stores quantized, with what makes their inputs. Legal for any fused program.

    kernels: of the target; None: the operators' definitions run every format.
    """
    return [BindStoredWeights(kernels), FuseNormQuantize(), FuseGluQuantize()]


def cache_passes(cache_dtype: torch.dtype | None, observer: Observer | None) -> list[GraphPass]:
    """What prepares keys and values for a cache of few bits; fp8 alone does without calibration data. Legal before paging."""
    if cache_dtype == torch.int8:
        return [ScaleKVCache(observer)]
    return [CenterKeys(observer)] if cache_dtype == torch.float8_e4m3fn and observer is not None else []


def decoder_passes(
    *,
    block_size: int,
    quantize: Recipe | None = None,
    quantizer: LayerQuantizer | None = None,
    kernels: KernelSupport | None = None,
    cache_dtype: torch.dtype | None = None,
    fuse_rope: bool = False,
    hidden_layers: tuple[int, ...] = (),
    early_exit: int | None = None,
    exit_weights: ExitWeights | None = None,
) -> list[GraphPass]:
    """The whole pipeline of a decoder that is served: one paged row of tokens in, logits of the sampled rows out.

    quantize: recipe of linear layers, None: as the checkpoint has them; quantizer, kernels: see `quantize_passes`. cache_dtype: of
    keys and values, None: the one they are computed in; int8 needs `quantizer`. fuse_rope: attention turns queries and keys itself
    (CUDA's kernels can).
    hidden_layers: whose hidden states are further outputs (`capture_hidden`). early_exit: layers in front of an exit that drafts
    (`split_early_exit`), exit_weights: its own, where it has been trained.
    """
    return [
        *([CaptureHidden(hidden_layers)] if hidden_layers else []),
        *([MarkExit(early_exit)] if early_exit is not None else []),
        *canonicalize_passes(),
        *fuse_passes(),
        *(stored_passes(kernels) if quantize is None else quantize_passes(quantize, quantizer, kernels)),
        *cache_passes(cache_dtype, quantizer),
        PageAttention(block_size=block_size, cache_dtype=cache_dtype),
        SelectRows(),
        *([BindStoredWeights(kernels, head=True)] if quantize is None else []),
        Normalize(),
        *([FuseRopeCache()] if fuse_rope else []),
        *([SplitEarlyExit(exit_weights)] if early_exit is not None else []),
    ]


def module_passes() -> list[GraphPass]:
    """The pipeline of a module that is no decoder: canonical and fused, inputs and outputs as they were."""
    return [*canonicalize_passes(), *fuse_passes()]
