"""Scales, values and packing against the libraries that made the formats: torchao, compressed-tensors, ModelOpt, AutoAWQ.

Equal means to the last bit. Max-abs scales (one candidate) are compared, because that is what these libraries take; groups of zeros
are left out, for which each has another smallest scale.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from camshaft.graph.linear_format import LinearFormat
from camshaft.graph.quant_formats import QuantizedWeight, dequantize_weight, quantize_weight, quantize_with_scale
from camshaft.models.random_weights import RandomWeights
from torch import Tensor

Pairs = list[tuple[str, Tensor, Tensor]]
"""(what, ours, theirs)."""
E4M3 = torch.float8_e4m3fn


def small_weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 512, generator=generator) * torch.linspace(0.01, 3, 96)[:, None]


def ours(weight: Tensor, text: str) -> QuantizedWeight:
    return quantize_weight(weight, LinearFormat.parse(f"{text}/none"), candidates=1)


def signed(parts: QuantizedWeight) -> Tensor:
    """int4 values [N, K] as signed numbers, those with a zero point less 8."""
    values = torch.stack([parts.values & 15, parts.values >> 4], -1).flatten(1).int()
    return values - 8 if parts.zero_point is not None else torch.where(values > 7, values - 16, values)


# ------------------------------------------------------------------------------------------------- compressed-tensors
def compressed(weight: Tensor, group: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(scales, zero points, values) of compressed-tensors, groups of columns or (0) rows."""
    library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = library.QuantizationArgs(**{**strategy, **options})
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return scale, zero_point, quantize(weight, scale, None if args.symmetric else zero_point, args)


def compressed_fp8(weight: Tensor) -> Pairs:
    scale, _, values = compressed(weight, 0, num_bits=8, type="float")
    mine = ours(weight, "fp8")
    return [("scale", mine.scale, scale.flatten()), ("values", mine.values.float(), values)]


def compressed_int4(weight: Tensor) -> Pairs:
    scale, _, values = compressed(weight, 32, num_bits=4)
    mine = ours(weight, "int4:g32")
    return [("scale", mine.scale, scale), ("values", signed(mine).float(), values)]


def compressed_int4_with_zero_points(weight: Tensor) -> Pairs:
    """Values only where weight / scale lies in no middle of two numbers: there, theirs depends on the zero point's parity."""
    scale, zero_point, values = compressed(weight, 64, num_bits=4, symmetric=False)
    mine = ours(weight, "int4:g64:zp")
    assert mine.zero_point is not None
    exact = (weight.unflatten(1, (-1, 64)) / scale[..., None]).flatten(1)
    clear = (exact - exact.floor() - 0.5).abs() > 1e-5
    found = [("scale", mine.scale, scale), ("zero points", mine.zero_point.int() - 8, zero_point.int())]
    return [*found, ("values", signed(mine)[clear].float(), values[clear])]


def compressed_nvfp4(weight: Tensor) -> Pairs:
    """Theirs keeps the reciprocal of the global scale and divides by it: what is divided by differs in its last bit."""
    library = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = library.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=E4M3, zp_dtype=E4M3
    )
    global_scale = generate_gparam(weight.amin(), weight.amax())
    groups = weight.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=global_scale)
    packed = pack_fp4_to_uint8(quantize(weight, scale, None, args, global_scale=global_scale))
    mine = ours(weight, "nvfp4")
    assert mine.global_scale is not None
    torch.testing.assert_close(mine.global_scale, 1 / global_scale.reshape([]), rtol=2.0**-22, atol=0)
    return [("scale", mine.scale.float(), scale.float()), ("packed values", mine.values, packed)]


# ------------------------------------------------------------------------------------------------------------- torchao
def torchao(module: str) -> Any:
    return pytest.importorskip(f"torchao.{module}", reason="torchao is not installed")


def torchao_mxfp4(weight: Tensor) -> Pairs:
    mx = torchao("prototype.mx_formats.mx_tensor")
    scale, values = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32, mx.ScaleCalculationMode.FLOOR)
    mine = ours(weight, "mxfp4")
    return [("scale", mine.scale, scale.view(torch.uint8)), ("packed values", mine.values, values.view(torch.uint8))]


def torchao_mxfp8(weight: Tensor) -> Pairs:
    mx = torchao("prototype.mx_formats.mx_tensor")
    scale, values = mx.to_mx(weight, E4M3, 32, mx.ScaleCalculationMode.RCEIL)
    mine = ours(weight, "mxfp8")
    return [("scale", mine.scale, scale.view(torch.uint8)), ("values", mine.values.float(), values.float())]


def torchao_int8(weight: Tensor) -> Pairs:
    affine = torchao("quantization.quant_primitives")
    found: Pairs = []
    for text, group in (("int8", weight.shape[1]), ("int8:g64", 64)):
        scale, zero_point = affine.choose_qparams_affine(
            weight, affine.MappingType.SYMMETRIC, (1, group), torch.int8, quant_min=-127, quant_max=127, eps=1e-30
        )
        values = affine.quantize_affine(weight, (1, group), scale, zero_point, torch.int8, -127, 127)
        mine = ours(weight, text)
        found += [(f"{text} scale", mine.scale.flatten(), scale.flatten()), (f"{text} values", mine.values, values)]
    return found


# ------------------------------------------------------------------------------------------------------------ ModelOpt
def modelopt_nvfp4(weight: Tensor) -> Pairs:
    library = pytest.importorskip("modelopt.torch.quantization.qtensor", reason="nvidia-modelopt is not installed")
    values, scale, global_scale = library.NVFP4QTensor.quantize(weight, 16)
    mine = ours(weight, "nvfp4")
    assert mine.global_scale is not None
    found = [("global scale", mine.global_scale, global_scale), ("scale", mine.scale.float(), scale.float())]
    return [*found, ("packed values", mine.values, values._quantized_data)]


CASES: dict[str, Callable[[Tensor], Pairs]] = {
    function.__name__: function
    for function in (
        compressed_fp8, compressed_int4, compressed_int4_with_zero_points, compressed_nvfp4, torchao_mxfp4, torchao_mxfp8,
        torchao_int8, modelopt_nvfp4,
    )
}  # fmt: skip
NEAR = {"compressed_nvfp4": 3e-5, "torchao_mxfp8": 1e-5, "torchao_int8": 5e-6}
"""Share of numbers that may fall to the other side of a middle, because a library multiplies by a reciprocal where we divide; of
mxfp8, of a power of two: without Blackwell's instruction theirs takes a logarithm in float32, which calls 2^-13 (1 + 2^-23) one."""


def check(name: str, weight: Tensor) -> None:
    for what, mine, theirs in CASES[name](weight):
        differ = int((mine != theirs.reshape(mine.shape)).sum())
        assert differ <= NEAR.get(name, 0) * mine.numel(), f"{what}: {differ} of {mine.numel()} differ"


@pytest.mark.parametrize("name", CASES)
def test_they_agree_to_the_last_bit(name: str) -> None:
    check(name, small_weight())


def test_autoawq_reads_what_we_write() -> None:
    """Its own unpacking of the packing that tests of checkpoints are written in, which the reader is held to."""
    from stored_checkpoints import awq

    folder = importlib.util.find_spec("awq")
    if folder is None or folder.submodule_search_locations is None:
        pytest.skip("autoawq is not installed")
    file = Path(next(iter(folder.submodule_search_locations))) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("awq_packing_utils", file)  # not its package, which needs much more
    assert spec is not None and spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    layer = awq(32)(small_weight())
    tensors = layer.tensors
    dense = library.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"].float(), 4, 32)
    assert torch.equal(dense.t(), layer.dense)


# ------------------------------------------------------------------------------------------------- a model of 1B's shape
FORMATS = (
    "fp8", "fp8:tensor", "fp8:block128", "int8", "int8:g64:zp", "int4:g128", "int4:g64:zp", "nvfp4", "mxfp4", "mxfp8",
)  # fmt: skip


@functools.cache
def layer_of_1b() -> dict[str, Tensor]:
    """The projections of one layer of a random Llama-3.2-1B-shaped model, float32."""
    weights = RandomWeights.of("llama-3.2-1b", device="cpu")
    weights.config.num_hidden_layers = 1
    stored = weights.open(torch.float32).weights
    return {name: weight.load() for name, weight in stored.items() if name.endswith("proj.weight")}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_1b_shape_agrees_with_the_libraries(name: str) -> None:
    layer = layer_of_1b()
    assert len(layer) == 7 and layer["model.layers.0.mlp.down_proj.weight"].shape == (2048, 8192)
    for weight in layer.values():
        check(name, weight)


@pytest.mark.long
@pytest.mark.parametrize("text", FORMATS)
def test_a_layer_of_1b_shape_comes_back(text: str) -> None:
    """What a stored weight means, rounded again with its scales, is what was stored."""
    format = LinearFormat.parse(f"{text}/none")
    for weight in layer_of_1b().values():
        stored = quantize_weight(weight, format, candidates=8)
        meant = dequantize_weight(stored, format)
        assert (meant - weight).norm() < 0.15 * weight.norm()
        again = quantize_with_scale(meant, format, stored)
        assert torch.equal(again.values.view(torch.uint8), stored.values.view(torch.uint8))
