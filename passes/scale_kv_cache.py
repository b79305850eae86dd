"""scale_kv_cache: keys and values as large as an integer KV cache can hold, so that rounding them to integers loses little.

    before                                      after
    q' = camshaft.rope(q, ...)                  q' = camshaft.rope(q / a, ...)
    k' = camshaft.rope(k, ...)                  k' = camshaft.rope(k * a, ...)
    o = camshaft.attention(q', k', v, ...)      o = camshaft.attention(q', k', v * b, ...) / b

q [1, T, H, D], k [1, T, G, D], v [1, G, T, V]; o [1, T, H, V]. a [G, D] are powers of two, one for both channels of a rotary
pair, b is a number, such that k' and v * b are within -127 to 127 on calibration tokens. Keys need a factor for each channel: some
of their channels are much larger than others, which count as much because queries are large there (Liu et al. 2024, "KIVI",
section 3.2). The bound of a pair is its norm, which holds at every position, and powers of two leave products as they are, to the
last bit. Values have no such channels: one number a layer.

Factors go into the rows of the layers that make q, k and v, and 1 / b into those of the layer that reads o, and cost nothing; where
rows cannot be scaled a multiplication stays. Queries and keys that are turned by other means than camshaft.rope are scaled behind
it. Runs on a fused program that is not paged. Numerics: reordered (the cache's rounding comes with `page_attention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.program import Program
from ..graph.quantized_linear import QUANTIZED_LINEAR
from ..graph.weights import Weight
from .base import GraphPass, Stage, only_user
from .fold_rows import is_sole, scale_rows, scale_source
from .match import VIEWS, aten, call, is_call, value
from .match_rope import ROPE, is_slice
from .quantization.algorithm import Observer
from .quantize_fp8 import QUANTIZE_ROWS, SCALED_LINEAR
from .resolve_masks import ATTENTION

LIMIT = 127.0
"""Largest integer of the cache; -128 is not used."""
_TINY = 2.0**-40
_LARGEST, _LARGEST_HALF = 2.0**14, 2.0**8
"""Largest factor of a channel of the keys; float16 has no room for more in the queries' weights."""


@dataclass(frozen=True)
class _Place:
    """Where queries or keys can be scaled.

    x: [1, T, heads, D], or [1, heads, T, D] (heads_at 1 or 2). shared: something else reads x as it is. rotated: channels that are
    turned behind x, in pairs of halves or of neighbours.
    """

    x: fx.Node
    heads_at: int
    shared: bool
    rotated: int = 0
    is_interleaved: bool = False


@dataclass
class ScaleKVCache(GraphPass):
    """Scales keys and values by what they are on calibration tokens. observer: needed; None is refused when the pass runs."""

    observer: Observer | None

    name = "scale_kv_cache"
    stage = Stage.CACHE
    numerics = "reordered"

    def options(self) -> dict[str, Any]:
        return {"calibration": None if self.observer is None else self.observer.digest()}

    def run(self, program: Program) -> int:
        nodes = [node for node in program.graph.nodes if is_call(node, ATTENTION)]
        if not nodes:
            return 0
        if self.observer is None:
            raise ValueError(needs_calibration())
        ranges = _ranges(program, self.observer, nodes)
        for node in nodes:
            k_amax, v_amax = ranges[node]
            _scale_keys(program, node, k_amax)
            _scale_values(program, node, v_amax)
        return len(nodes)


def needs_calibration() -> str:
    """What to say where an int8 KV cache has no data."""
    return (
        "an int8 KV cache needs calibration data, on which its scales are found: give calibration=texts or token ids, or "
        "--calibration FILE on the command line; kv_cache_dtype='fp8' needs none"
    )


# --------------------------------------------------------------------------------------------------------------- ranges
def _ranges(program: Program, observer: Observer, nodes: list[fx.Node]) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """(bound of each channel of the keys [G, D], largest absolute value [] of the values) for each attention."""
    operands: set[Any] = {operand for node in nodes for operand in node.args[1:3]}
    places = {node.args[1]: _place(node, 1) for node in nodes}
    key_bounds: dict[Any, Tensor] = {}
    value_bounds: dict[Any, Tensor] = {}
    for operand, pieces in observer.values_of(program, operands):
        seen = [(_key_bound(x, places.get(operand)), x.float().abs().amax().cpu()) for x in pieces]
        key_bounds[operand] = torch.stack([bound for bound, _ in seen]).amax(0)
        value_bounds[operand] = torch.stack([bound for _, bound in seen]).amax()
    return {node: (key_bounds[node.args[1]], value_bounds[node.args[2]]) for node in nodes}


def _key_bound(k_BGTD: Tensor, place: _Place | None) -> Tensor:
    """The largest size of each channel at any position, [G, D] float32: of turned channels their pair's norm."""
    bound = k_BGTD.float().abs()
    if place is not None and place.rotated:
        channels = torch.arange(place.rotated, device=bound.device)
        first, second = channels.view(-1, 2).t() if place.is_interleaved else channels.view(2, -1)
        norm = torch.hypot(bound[..., first], bound[..., second])
        bound[..., first] = bound[..., second] = norm
    return bound.amax((0, 2)).cpu()


# -------------------------------------------------------------------------------------------------------------- scaling
def _scale_keys(program: Program, attention: fx.Node, bound_GD: Tensor) -> None:
    queries, keys = _place(attention, 0), _place(attention, 1)
    if (queries.rotated, queries.is_interleaved) != (keys.rotated, keys.is_interleaved):
        queries, keys = _behind(attention, 0), _behind(attention, 1)
    largest = _LARGEST_HALF if value(keys.x).dtype == torch.float16 else _LARGEST
    factor_GD = torch.exp2(torch.floor(torch.log2(LIMIT / bound_GD.clamp(min=_TINY)))).clamp(1 / largest, largest)
    group = int(value(queries.x).shape[queries.heads_at]) // factor_GD.shape[0]
    _scale_heads(program, attention, keys, factor_GD)
    _scale_heads(program, attention, queries, (1.0 / factor_GD).repeat_interleave(group, 0))


def _scale_heads(program: Program, attention: fx.Node, place: _Place, factor_HD: Tensor) -> None:
    """Multiplies queries or keys, in the rows of the layer that makes them or by a node."""
    if not place.shared and scale_source(program, place.x, factor_HD.flatten()):
        return
    shaped = factor_HD if place.heads_at == 2 else factor_HD[:, None]
    constant = _constant(program, attention, shaped.to(value(place.x).dtype))
    _insert_product(program, place.x, constant, [attention] if place.shared else list(place.x.users))


def _scale_values(program: Program, attention: fx.Node, bound: Tensor) -> None:
    v = attention.args[2]
    assert isinstance(v, fx.Node)
    factor = LIMIT / bound.clamp(min=_TINY)
    width = int(value(v).shape[1] * value(v).shape[3])
    if only_user(v) is not attention or not scale_source(program, v, factor.expand(width)):
        _insert_product(program, v, float(factor), [attention])
    layer = _output_layer(attention)
    if layer is not None:
        rows = int(value(layer).shape[-1])
        if scale_rows(program, layer, (1.0 / factor).expand(rows), 0, rows, bias=False):
            return
    _insert_product(program, attention, float(1.0 / factor), list(attention.users))


def _output_layer(attention: fx.Node) -> fx.Node | None:
    """The linear layer that alone reads attention's output, in a form in which its result grows with its input; or None."""
    out, reader = attention, only_user(attention)
    while reader is not None and is_call(reader, *VIEWS):
        out, reader = reader, only_user(reader)
    if reader is not None and is_call(reader, QUANTIZE_ROWS):  # scales are found for each row: the values stay the same
        readers = {layer for part in reader.users for layer in part.users}
        reader = readers.pop() if len(readers) == 1 else None
        return reader if is_call(reader, SCALED_LINEAR) else None
    if is_call(reader, QUANTIZED_LINEAR):
        assert reader is not None
        return (
            reader if reader.args[0] is out and reader.args[6] is None else None
        )  # x_scale is of the inputs as they were
    return reader if reader is not None and is_call(reader, aten.linear.default) and reader.args[0] is out else None


def _insert_product(program: Program, x: fx.Node, factor: fx.Node | float, readers: list[fx.Node]) -> None:
    """Lets `readers` read x * factor."""
    with program.graph.inserting_before(_first(program, readers)):
        scaled = call(program, aten.mul.Tensor, x, factor)
    for reader in readers:
        reader.replace_input_with(x, scaled)


def _first(program: Program, nodes: list[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    return next(node for node in program.graph.nodes if node in wanted)


def _constant(program: Program, attention: fx.Node, tensor: Tensor) -> fx.Node:
    with value(attention).fake_mode:  # type: ignore[attr-defined]
        example = torch.empty(tensor.shape, dtype=tensor.dtype)
    key = program.weights.add(f"{attention.name}.cache_factor", Weight.from_tensor(tensor))
    return program.add_input(f"{attention.name}_cache_factor", kind="weight", key=key, example=example)


# ------------------------------------------------------------------------------------------------------------- matching
def _place(attention: fx.Node, at: int) -> _Place:
    """Where argument `at` [1, heads, T, D] of attention can be scaled: before it is turned, where that is recognised."""
    operand: Any = attention.args[at]
    if only_user(operand) is not attention:
        return _behind(attention, at)
    node, is_token_major = _untransposed(operand)
    found: _Place | None = None
    if is_token_major and is_call(node, ROPE) and is_sole(node) and is_sole(node.args[0]):
        found = _Place(node.args[0], 2, False, int(value(node.args[1]).shape[-1]), bool(node.args[3]))
    elif is_call(node, aten.cat.default) and is_sole(node):
        found = _partly_turned(node, is_token_major)
    return found or _behind(attention, at)


def _behind(attention: fx.Node, at: int) -> _Place:
    """The argument itself: scaled behind whatever turns it."""
    operand = attention.args[at]
    assert isinstance(operand, fx.Node)
    return _Place(operand, 1, only_user(operand) is not attention)


def _partly_turned(node: fx.Node, is_token_major: bool) -> _Place | None:
    """The x of cat(rope(x[..., :R]), x[..., R:]) where nothing else reads it, or None."""
    parts: Any = node.args[0]
    if len(node.args) < 2 or node.args[1] not in (-1, 3) or len(parts) != 2:
        return None
    rope, is_turned_back = _untransposed(parts[0])
    if not is_call(rope, ROPE) or is_turned_back == is_token_major or not is_sole(rope):
        return None
    rotated, size = int(value(rope).shape[-1]), int(value(node).shape[-1])
    first, first_back = _untransposed(rope.args[0])
    rest, rest_back = _untransposed(parts[1])
    if not (is_call(first, aten.slice.Tensor) and is_sole(first) and is_sole(rest)):
        return None
    x = first.args[0]
    if len(x.users) != 2 or not (is_slice(first, x, 0, rotated) and is_slice(rest, x, rotated, size)):
        return None
    heads_at = 1 if first_back else 2
    rest_heads_at = 2 if rest_back != is_token_major else 1
    return _Place(x, heads_at, False, rotated, bool(rope.args[3])) if heads_at == rest_heads_at else None


def _untransposed(node: Any) -> tuple[Any, bool]:
    """(the node behind transpositions of axes 1 and 2 that are read once, whether their number is odd)."""
    is_odd = False
    while is_call(node, aten.transpose.int) and {axis % 4 for axis in node.args[1:]} == {1, 2} and is_sole(node):
        node, is_odd = node.args[0], not is_odd
    return node, is_odd
