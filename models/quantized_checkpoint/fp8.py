"""fp8 as Transformers names it: "fp8" (DeepSeek's blocks of 128 x 128, or one scale for a matrix) and "fbgemm_fp8".

    weight            float8_e4m3fn [N, K]
    weight_scale_inv  float [ceil(N / 128), ceil(K / 128)]    blocks; it multiplies, whatever its name says
    weight_scale      float [] or [1], fbgemm [N, 1]
    input_scale       float [] or [1]                         activation_scheme "static"

DeepSeek-V3 (2024), section 3.3.2: activations have a scale for each 128 elements of a token.
"""

from __future__ import annotations

from functools import partial

from ...graph.linear_format import Activations
from ...graph.weights import Weight
from .layers import byte_modules, fp8_layer
from .settings import Settings
from .tensors import Tensors


def read(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """The layers of an "fp8" checkpoint by the names of their weights. Raises ValueError for other blocks."""
    settings.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    scheme = settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    blocks = settings.get("weight_block_size")
    if blocks is None:
        activations: Activations = "fp8_static" if scheme == "static" else "fp8"
        layer = partial(fp8_layer, tensors, scale="weight_scale", group=-1, activations=activations)
    elif list(blocks) != [128, 128]:
        raise settings.error(f"weight_block_size is {list(blocks)}, allowed: [128, 128]")
    elif scheme == "static":
        raise settings.error("weight_block_size with static activations, allowed: activation_scheme 'dynamic'")
    else:
        layer = partial(fp8_layer, tensors, scale="weight_scale_inv", group=128, block=True, activations="fp8_block")
    return {f"{module}.weight": layer(module).dense() for module in byte_modules(tensors)}


def read_fbgemm(settings: Settings, tensors: Tensors, notes: list[str]) -> dict[str, Weight]:
    """The layers of an "fbgemm_fp8" checkpoint: scales of rows, and of tokens."""
    modules = byte_modules(tensors)
    for module in modules:
        tensors.skip(f"{module}.input_scale_ub")
    bound = settings.get("activation_scale_ub")
    if bound is not None and modules:
        notes.append(
            f"fbgemm_fp8: activations are not cut off at activation_scale_ub ({bound}); a token's scale is its max-abs / 448"
        )
    layer = partial(fp8_layer, tensors, scale="weight_scale", group=0, activations="fp8")
    return {f"{module}.weight": layer(module).dense() for module in modules}
