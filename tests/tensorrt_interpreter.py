"""Runs an INetworkDefinition in PyTorch, layer by layer: what a network computes can be checked on a machine without a GPU.

Every layer kind is written from TensorRT's documentation of it, not from what emits it. Matrix products of 16-bit floats add up
in fp32, as on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from camshaft.export.tensorrt.builder import DTYPES
from torch import Tensor

_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_TORCH |= {"FP4": torch.float32, "E8M0": torch.float32}  # what bytes of these mean
_CLASSES = {
    "ACTIVATION": "IActivationLayer", "CAST": "ICastLayer", "CONCATENATION": "IConcatenationLayer",
    "CONSTANT": "IConstantLayer", "CUMULATIVE": "ICumulativeLayer", "EINSUM": "IEinsumLayer",
    "ELEMENTWISE": "IElementWiseLayer", "GATHER": "IGatherLayer", "IDENTITY": "IIdentityLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "REDUCE": "IReduceLayer", "SCATTER": "IScatterLayer",
    "SELECT": "ISelectLayer", "SHUFFLE": "IShuffleLayer", "SLICE": "ISliceLayer", "SOFTMAX": "ISoftMaxLayer",
    "TOPK": "ITopKLayer", "UNARY": "IUnaryLayer", "ATTENTION_INPUT": "IAttentionInputLayer",
    "ATTENTION_OUTPUT": "IAttentionOutputLayer", "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "QUANTIZE": "IQuantizeLayer", "DEQUANTIZE": "IDequantizeLayer", "DYNAMIC_QUANTIZE": "IDynamicQuantizeLayer",
}  # fmt: skip


def run_network(trt: Any, network: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's outputs by name. inputs: by name, of the dtypes and shapes that the network says."""
    values: dict[str, Tensor] = dict(inputs)
    for index in range(network.num_inputs):
        info = network.get_input(index)
        given = values[info.name]
        if info.dtype.name in ("INT4", "FP4"):
            values[info.name] = _unpack(given, info.dtype.name)
            assert tuple(values[info.name].shape) == tuple(info.shape), info.name
            continue
        if info.dtype.name == "E8M0":
            values[info.name] = torch.pow(2.0, given.float() - 127)
            continue
        assert (given.dtype, tuple(given.shape)) == (_TORCH[info.dtype.name], tuple(info.shape)), info.name
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = layer.type.name
        arguments = [layer.get_input(i) for i in range(layer.num_inputs)]
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        layer.__class__ = getattr(trt, _CLASSES[kind])
        taken = [None if item is None else values[item.name] for item in arguments]
        made = _LAYERS[kind](layer, values) if kind in _WITH_VALUES else _LAYERS[kind](layer, *taken)
        for tensor, value in zip(outputs, made if isinstance(made, tuple) else (made,), strict=True):
            assert tensor.name not in values, f"two tensors are called {tensor.name}"
            assert kind.startswith("ATTENTION") or tuple(value.shape) == tuple(tensor.shape), layer.name
            assert value.dtype == _TORCH[tensor.dtype.name], (layer.name, value.dtype, tensor.dtype)
            values[tensor.name] = value
    names = [network.get_output(index).name for index in range(network.num_outputs)]
    return {name: values[name] for name in names}


# ---------------------------------------------------------------------------------------------------- one kind of layer
def _axes(mask: int) -> list[int]:
    return [axis for axis in range(8) if mask >> axis & 1]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _constant(layer: Any) -> Tensor:
    return torch.from_numpy(layer.weights.copy()).reshape(tuple(layer.shape))


def _shuffle(layer: Any, x: Tensor) -> Tensor:
    order = [axis for axis in tuple(layer.first_transpose) if axis < x.dim()][: x.dim()]
    x = x.permute(order)
    if layer.reshape_dims is not None and len(layer.reshape_dims) >= 0:
        x = x.reshape(tuple(layer.reshape_dims))
    assert list(tuple(layer.second_transpose)[: x.dim()]) == list(range(x.dim()))
    return x


def _slice(layer: Any, x: Tensor) -> Tensor:
    assert layer.mode.name == "STRICT_BOUNDS"
    for axis, (start, size, stride) in enumerate(zip(layer.start, layer.shape, layer.stride)):
        positions = torch.arange(size) * stride + start
        assert size == 0 or (positions.min() >= 0 and positions.max() < x.shape[axis]), (layer.name, axis)
        x = x.index_select(axis, positions)
    return x


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add, "PROD": torch.mul, "SUB": torch.sub, "MAX": torch.maximum, "MIN": torch.minimum, "POW": torch.pow,
    "DIV": lambda x, y: x / y if x.dtype.is_floating_point else torch.div(x, y, rounding_mode="trunc"),
    "FLOOR_DIV": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "AND": torch.logical_and, "OR": torch.logical_or, "XOR": torch.logical_xor,
    "EQUAL": torch.eq, "GREATER": torch.gt, "LESS": torch.lt,
}  # fmt: skip
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp, "LOG": torch.log, "SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs, "NEG": torch.neg,
    "SIN": torch.sin, "COS": torch.cos, "TAN": torch.tan, "CEIL": torch.ceil, "FLOOR": torch.floor, "ERF": torch.erf,
    "NOT": torch.logical_not, "SIGN": torch.sign, "ROUND": torch.round, "ISINF": torch.isinf, "ISNAN": torch.isnan,
}  # fmt: skip
_REDUCE: dict[str, Callable[..., Tensor]] = {
    "SUM": lambda x, dims, keep: x.sum(dims, keep, dtype=x.dtype), "AVG": torch.mean, "MAX": torch.amax, "MIN": torch.amin,
}  # fmt: skip


def _elementwise(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    assert x.dtype == y.dtype and x.dim() == y.dim(), layer.name
    return _BINARY[layer.op.name](x, y)


def _activation(layer: Any, x: Tensor) -> Tensor:
    import tensorrt_rtx as trt

    kind = trt.IActivationLayer.type.fget(layer).name
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "RELU": torch.relu, "SIGMOID": torch.sigmoid, "TANH": torch.tanh, "GELU_ERF": torch.nn.functional.gelu,
        "GELU_TANH": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "LEAKY_RELU": lambda x: torch.nn.functional.leaky_relu(x, layer.alpha),
        "ELU": lambda x: torch.nn.functional.elu(x, layer.alpha),
    }  # fmt: skip
    return functions[kind](x)


def _matrix_multiply(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    assert x.dtype == y.dtype and x.dim() == y.dim(), layer.name
    sides = [side.mT if op.name == "TRANSPOSE" else side for side, op in ((x, layer.op0), (y, layer.op1))]
    return torch.matmul(*(_wide(side) for side in sides)).to(x.dtype)


def _gather(layer: Any, x: Tensor, indices: Tensor) -> Tensor:
    if layer.mode.name == "ELEMENT":
        return torch.gather(x, layer.axis, indices.long())
    assert layer.mode.name == "DEFAULT" and layer.num_elementwise_dims == 0
    assert indices.numel() == 0 or (indices.min() >= 0 and indices.max() < x.shape[layer.axis]), layer.name
    flat = x.index_select(layer.axis, indices.reshape(-1).long())
    return flat.reshape(*x.shape[: layer.axis], *indices.shape, *x.shape[layer.axis + 1 :])


def _scatter(layer: Any, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if layer.mode.name == "ELEMENT":
        return x.scatter(layer.axis, indices.long(), updates)
    places = tuple(indices.long().unbind(-1))
    return x.clone().index_put(places, updates)


def _topk(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    (axis,) = _axes(layer.axes)
    values, places = x.sort(dim=axis, descending=layer.op.name == "MAX", stable=True)
    return values.narrow(axis, 0, layer.k), places.narrow(axis, 0, layer.k).to(_TORCH[layer.indices_type.name])


def _attention(layer: Any, values: Mapping[str, Tensor]) -> Tensor:
    attention = layer.attention
    q, k, v = (_wide(values[attention.get_input(index).name]) for index in range(3))
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).mT
    rows, columns = scores.shape[-2:]
    if attention.causal_kind.name != "NONE":
        shift = columns - rows if attention.causal_kind.name == "LOWER_RIGHT" else 0
        scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(shift), float("-inf"))
    if attention.mask is not None:
        mask = values[attention.mask.name]
        assert attention.causal_kind.name == "NONE" and mask.dim() == 4
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    out = torch.softmax(scores, -1) @ v.repeat_interleave(repeats, 1)
    return out.to(values[attention.get_input(0).name].dtype)


def _kv_cache_update(layer: Any, cache: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    made = cache.clone()
    for row, begin in enumerate(write_indices.tolist()):
        made[row, :, begin : begin + update.shape[2]] = update[row]
    return made


def _cumulative(layer: Any, x: Tensor, axis: Tensor) -> Tensor:
    assert not layer.exclusive and not layer.reverse
    return x.cumsum(int(axis), dtype=x.dtype)


def _unpack(packed: Tensor, kind: str) -> Tensor:
    """The numbers of 4-bit inputs, the low half of a byte first."""
    numbers = []
    for byte in packed.flatten().tolist():
        for bits in (byte & 15, byte >> 4):
            if kind == "INT4":
                numbers.append(bits - 16 if bits & 8 else bits)
            else:  # e2m1: sign, two bits of exponent with bias 1, one of mantissa
                exponent, mantissa = bits >> 1 & 3, bits & 1
                size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
                numbers.append(-size if bits & 8 else size)
    return torch.tensor(numbers, dtype=torch.float32).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def _blocks(layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    """The scale in fp32, one for each element of x."""
    scale = scale.float()
    if scale.dim() == 1:
        return scale.reshape([-1 if axis == layer.axis else 1 for axis in range(x.dim())]).expand(x.shape)
    for axis, size in enumerate(scale.shape):
        scale = scale.repeat_interleave(x.shape[axis] // size, axis)
    return scale.expand(x.shape)


def _quantize(layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    scaled = x.float() / _blocks(layer, x, scale)
    if layer.to_type.name == "INT8":
        return scaled.round().clamp(-128, 127).to(torch.int8)
    assert layer.to_type.name == "FP8"
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)


def _dynamic_quantize(layer: Any, x: Tensor, double_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Blocks along the last dimension: NVFP4 with FP8 scales over a global one, MXFP4 and MXFP8 with powers of two."""
    assert layer.axis == x.dim() - 1
    blocks = x.float().unflatten(-1, (-1, layer.block_size))
    largest = blocks.abs().amax(-1)
    limit = 6.0 if layer.to_type.name == "FP4" else 448.0
    if layer.scale_type.name == "FP8":
        assert double_scale is not None
        scale = (largest / (limit * double_scale.float())).clamp(max=448).to(torch.float8_e4m3fn)
        factor = scale.float() * double_scale.float()
    elif layer.to_type.name == "FP8":
        factor = scale = torch.pow(2.0, torch.ceil(torch.log2(largest / limit)).clamp(-127, 127))
    else:  # the MX specification's rule: the exponent of the largest less that of the largest e2m1 number, 2
        factor = scale = torch.pow(2.0, (torch.floor(torch.log2(largest)) - 2).clamp(-127, 127))
    scaled = blocks / torch.where(factor == 0, 1.0, factor)[..., None]
    if layer.to_type.name == "FP8":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (grid[1:] + grid[:-1]) / 2
    size = scaled.abs().contiguous()
    down, up = (
        torch.bucketize(size, middles),
        torch.bucketize(size, middles, right=True),
    )  # they differ in the middle alone
    return (grid[torch.where(down % 2 == 0, down, up)].copysign(scaled)).flatten(-2), scale


_WITH_VALUES = ("ATTENTION_INPUT",)
_LAYERS: dict[str, Callable[..., Any]] = {
    "ACTIVATION": _activation,
    "CAST": lambda layer, x: x.to(_TORCH[layer.to_type.name]),
    "CONCATENATION": lambda layer, *xs: torch.cat(xs, layer.axis),
    "CONSTANT": _constant,
    "CUMULATIVE": _cumulative,
    "EINSUM": lambda layer, *xs: torch.einsum(layer.equation, *map(_wide, xs)).to(xs[0].dtype),
    "ELEMENTWISE": _elementwise,
    "GATHER": _gather,
    "IDENTITY": lambda layer, x: x,
    "MATRIX_MULTIPLY": _matrix_multiply,
    "REDUCE": lambda layer, x: _REDUCE[layer.op.name](_wide(x), _axes(layer.axes), layer.keep_dims).to(x.dtype),
    "SCATTER": _scatter,
    "SELECT": lambda layer, c, x, y: torch.where(c, x, y),
    "SHUFFLE": _shuffle,
    "SLICE": _slice,
    "SOFTMAX": lambda layer, x: torch.softmax(_wide(x), _axes(layer.axes)[0]).to(x.dtype),
    "TOPK": _topk,
    "UNARY": lambda layer, x: _UNARY[layer.op.name](x),
    "ATTENTION_INPUT": _attention,
    "ATTENTION_OUTPUT": lambda layer, x: x,
    "QUANTIZE": _quantize,
    "DYNAMIC_QUANTIZE": _dynamic_quantize,
    "DEQUANTIZE": lambda layer, x, scale: (x.float() * _blocks(layer, x, scale)).to(_TORCH[layer.to_type.name]),
    "KV_CACHE_UPDATE": _kv_cache_update,
}
