"""Calls of operators, each as a segment of one node: what the emitters' tables are tested with."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import camshaft.graph.ops  # noqa: F401  registers camshaft::*
import torch
from camshaft.export.segment import Segment
from camshaft.graph.serialize import find_target, graph_hash, graph_to_json
from torch import Tensor, fx

CPU = torch.device("cpu")
MAX = 2**63 - 1
INF = float("inf")


@dataclass
class In:
    """An input: shape ("T" varies), kind of values, dtype of floats; `weight` makes it a weight of the segment."""

    shape: Sequence[Any]
    kind: str = "normal"
    weight: bool = False
    dtype: torch.dtype | None = None


@dataclass
class T:
    """The number of tokens, as a size node of the graph."""


@dataclass
class Case:
    """One call: the operator, its arguments, and how many results it has."""

    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    results: int = 0
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name}{'-' + self.label if self.label else ''}"


X = In([1, "T", 8])
Y = In([1, "T", 8])
P = In([1, "T", 8], "positive")
Q = In([1, "T", 4, 6])
HEADS = In([1, 4, "T", 6])
IDS = In([1, "T"], "ids")
LONG = In([1, "T", 8], "ids")
MASK = In([1, "T", 8], "bool")
W8 = In([8], weight=True)


def value(spec: In, num_tokens: int, seed: int) -> Tensor:
    """Random values of an input."""
    generator = torch.Generator().manual_seed(seed)
    shape = [num_tokens if size == "T" else size for size in spec.shape]
    if spec.kind == "ids":
        return torch.randint(0, 4, shape, generator=generator)
    if spec.kind == "bool":
        return torch.rand(shape, generator=generator) > 0.5
    made = torch.randn(shape, generator=generator)
    if spec.kind == "positive":
        made = made.abs() + 0.1
    if spec.kind == "halves":
        made = torch.cat([made[..., : shape[-1] // 2]] * 2, dim=-1)
    if spec.kind == "pairs":
        made = made[..., : shape[-1] // 2].repeat_interleave(2, dim=-1)
    made = made.double() if spec.kind == "double" else made.half() if spec.kind == "half" else made
    return made if spec.dtype is None else made.to(spec.dtype)


def unary(names: Sequence[str], spec: In = X) -> list[Case]:
    return [Case(f"aten.{name}", [spec]) for name in names]


CASES: list[Case] = [
    *unary([f"{n}.default" for n in (
        "neg", "abs", "cos", "sin", "tan", "exp", "tanh", "sigmoid", "relu", "reciprocal", "floor", "ceil", "round", "erf",
        "sign", "hardswish", "mish", "expm1", "square", "silu", "gelu", "softplus", "leaky_relu", "elu", "relu6", "isnan",
        "isinf", "logical_not", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "zeros_like", "ones_like",
        "mean", "sum", "max", "min", "argmax", "argmin", "hardtanh", "lift_fresh", "detach_", "squeeze", "mT", "amax", "amin",
    )]),
    *unary(["log.default", "sqrt.default", "rsqrt.default", "log1p.default"], P),
    *[Case(f"aten.{n}.{kind}", [X, Y if kind == "Tensor" else 0.3]) for n in
      ("add", "sub", "mul", "div", "rsub", "eq", "ne", "gt", "ge", "lt", "le", "remainder") for kind in ("Tensor", "Scalar")],
    Case("aten.add.Tensor", [X, Y], {"alpha": 2.5}, label="alpha"), Case("aten.add.Tensor", [IDS, 2], label="ids"),
    Case("aten.add.Tensor", [IDS, 0.5], label="promoted"), Case("aten.mul.Tensor", [X, LONG], label="mixed"),
    Case("aten.add.Tensor", [X, T()], label="size"), Case("aten.add.Tensor", [X, W8], label="weight"),
    Case("aten.div.Tensor", [IDS, 3], label="ids"), Case("aten.gt.Scalar", [IDS, 1.5], label="promoted"),
    *[Case(f"aten.div.{n}", [X, Y if n == "Tensor_mode" else 0.3], {"rounding_mode": "floor"}) for n in
      ("Tensor_mode", "Scalar_mode")],
    Case("aten.floor_divide.default", [X, Y]), Case("aten.floor_divide.Scalar", [IDS, 3]),
    Case("aten.floor_divide.default", [In([1, "T"], "ids"), -3], label="negative"),
    Case("aten.remainder.Scalar", [IDS, 3], label="ids"),
    *[Case("aten.pow.Tensor_Scalar", [P, e], label=str(e)) for e in (1, 2, 3.0, 0.5, -0.5, -1, 1.7)],
    Case("aten.pow.Tensor_Tensor", [P, Y]), Case("aten.pow.Scalar", [3.0, Y]), Case("aten.float_power.Tensor_Scalar", [P, 1.7]),
    Case("aten.clamp.default", [X, -0.5, 0.4]), Case("aten.clamp.default", [X, None, 0.4], label="max"),
    Case("aten.clamp.Tensor", [X, Y]), Case("aten.clamp_min.default", [X, 0.1]), Case("aten.clamp_max.default", [X, 0.1]),
    Case("aten.clamp_min.Tensor", [X, Y]), Case("aten.clamp_max.Tensor", [X, Y]),
    *[Case(f"aten.{n}", [X, Y]) for n in ("minimum.default", "maximum.default", "min.other", "max.other", "type_as.default")],
    *[Case(f"aten.{n}.default", [MASK, In([1, "T", 8], "bool")]) for n in ("logical_and", "logical_or", "logical_xor")],
    *[Case(f"aten.{n}.Tensor", [MASK, In([1, "T", 8], "bool")]) for n in ("bitwise_and", "bitwise_or", "__and__", "__or__")],
    *[Case(f"aten.{n}.Scalar", [LONG, 2]) for n in ("bitwise_and", "bitwise_or")],
    Case("aten.bitwise_not.default", [MASK]), Case("aten.bitwise_not.default", [LONG], label="ints"),
    Case("aten.where.self", [MASK, X, Y]), Case("aten.where.ScalarSelf", [MASK, 0.5, Y]),
    Case("aten.where.ScalarOther", [MASK, X, -INF]), Case("aten.where.Scalar", [MASK, 1.0, 0.0]),
    Case("aten.masked_fill.Scalar", [X, MASK, -INF]), Case("aten.masked_fill.Tensor", [X, MASK, In([])]),
    *[Case("aten._to_copy.default", [s], {"dtype": d}, label=f"{s.kind}-{d}") for s, d in
      ((IDS, torch.float32), (X, torch.int64), (X, torch.bool), (MASK, torch.float32), (IDS, torch.int32), (X, torch.float64))],
    Case("aten.to.dtype", [IDS, torch.float32]), Case("aten.to.other", [IDS, X]), Case("aten.to.device", [IDS, CPU, torch.float32]),
    Case("aten.to.dtype_layout", [IDS], {"dtype": torch.float32}),
    Case("aten.dropout.default", [X, 0.5, False]), Case("aten.feature_dropout.default", [X, 0.5, False]),
    Case("aten.softplus.default", [X, 2.0], label="beta"), Case("aten.gelu.default", [X], {"approximate": "tanh"}, label="tanh"),
    Case("aten.silu.default", [In([1, "T", 8], "double")], label="double"),
    *[Case("camshaft.glu.default", [X, name], label=name) for name in ("silu", "gelu", "gelu_tanh", "relu")],
    Case("camshaft.rms_norm.default", [X, W8, 1e-6, 0.0, True]),
    Case("camshaft.rms_norm.default", [X, W8, 1e-6, 1.0, False], label="offset"),
    Case("camshaft.rms_norm.default", [Q, None, 1e-6, 0.0, True], label="plain"),
    Case("camshaft.add_rms_norm.default", [X, Y, W8, 1e-6, 1.0, False], results=2),
    Case("camshaft.add_rms_norm.default", [Q, Q, In([6], weight=True), 1e-6, 0.0, True], results=2, label="heads"),
    Case("camshaft.add_rms_norm.default", [X, W8, W8, 1e-6, 0.0, True], results=2, label="broadcast"),
    *[Case("camshaft.rope.default", [Q, In([1, "T", 6], kind), In([1, "T", 6], kind), kind == "pairs"], label=kind)
      for kind in ("halves", "pairs")],
    *[Case("camshaft.rope.default", [Q, In([1, "T", 4], kind), In([1, "T", 4], kind), kind == "pairs"], label=f"{kind}-part")
      for kind in ("halves", "pairs")],
    Case("aten.rms_norm.default", [X, [8], W8, 1e-6]), Case("aten.rms_norm.default", [X, [8]], label="plain"),
    Case("aten.layer_norm.default", [X, [8], W8, W8]), Case("aten.layer_norm.default", [X, [8], W8, None], label="no-bias"),
    Case("aten.layer_norm.default", [X, [8]], label="plain"), Case("aten.layer_norm.default", [Q, [4, 6]], label="two"),
    Case("aten.group_norm.default", [In(["T", 8, 5]), 2, W8, W8]),
    Case("aten.group_norm.default", [In(["T", 8, 5]), 2], label="plain"),
    Case("aten.batch_norm.default", [In(["T", 8, 5]), W8, W8, W8, In([8], "positive", True), False, 0.1, 1e-5, False]),
    *[Case(f"aten.{n}", [Q, [-1], True]) for n in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default")],
    *[Case(f"aten.{n}", [Q, [1, 2]], label="two") for n in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default")],
    Case("aten.sum.dim_IntList", [MASK, [-1]], label="bool"),
    Case("aten.sum.dim_IntList", [X, None], {"dtype": torch.float64}, label="dtype"),
    *[Case(f"aten.{n}.dim", [X, -1, True], results=2) for n in ("max", "min")],
    *[Case(f"aten.{n}.default", [X, -1, True], label="dim") for n in ("argmax", "argmin")],
    *[Case("aten.linalg_vector_norm.default", [X, order, [-1], True], label=str(order)) for order in (1, 2)],
    Case("aten.cumsum.default", [X, 1]), Case("aten.cumsum.default", [MASK, -1], label="bool"),
    Case("aten.softmax.int", [X, -1]), Case("aten.softmax.int", [X, 1, torch.float32], label="dtype"),
    Case("aten._softmax.default", [X, -1, False]), Case("aten.log_softmax.int", [X, -1]),
    Case("aten._log_softmax.default", [X, -1, False]),
    Case("aten.linear.default", [X, In([5, 8], weight=True)]),
    Case("aten.linear.default", [X, In([5, 8], weight=True), In([5], weight=True)], label="bias"),
    Case("aten.linear.default", [In(["T", 8]), In([5, 8], weight=True), In([5], weight=True)], label="rows"),
    Case("aten.matmul.default", [X, In([8, 5])]), Case("aten.mm.default", [In(["T", 8]), In([8, 5])]),
    Case("aten.bmm.default", [X, In([1, 8, "T"])]),
    Case("aten.addmm.default", [In([5]), In(["T", 8]), In([8, 5])], {"beta": 0.5, "alpha": 2.0}),
    Case("aten.baddbmm.default", [In([1, "T", 5]), X, In([1, 8, 5])]), Case("aten.einsum.default", ["btd,bsd->bts", [X, Y]]),
    *[Case("aten.scaled_dot_product_attention.default", [HEADS, In([1, 4, "T", 6]), In([1, 4, "T", 6]), None, 0.0, causal],
           label=f"causal-{causal}") for causal in (True, False)],
    Case("aten.conv1d.default", [In([1, 8, "T"]), In([4, 8, 3], weight=True), In([4], weight=True), [1], [1]]),
    Case("aten.conv2d.default", [In(["T", 4, 9, 9]), In([6, 2, 3, 3], weight=True), None, [2, 1], [1, 1], [1, 1], 2]),
    Case("aten.max_pool1d.default", [In(["T", 4, 9]), [3], [2], [1]]),
    Case("aten.max_pool2d.default", [In(["T", 4, 9, 9]), [3, 3]]),
    Case("aten.adaptive_avg_pool1d.default", [In(["T", 4, 9]), [1]]),
    Case("aten.adaptive_avg_pool2d.default", [In(["T", 4, 9, 9]), [1, 1]]),
    # layouts
    Case("aten.reshape.default", [X, [1, -1, 2, 4]]), Case("aten.reshape.default", [Q, [1, T(), 24]], label="size"),
    Case("aten.view.default", [X, [-1, 8]]), Case("aten._unsafe_view.default", [X, [-1, 8]]),
    Case("aten.view_copy.default", [X, [-1, 8]]),
    Case("aten.flatten.using_ints", [Q, 2, -1]), Case("aten.unflatten.int", [X, -1, [2, 4]]),
    Case("aten.view_as.default", [X, Y]), Case("aten.reshape_as.default", [X, In([1, "T", 4, 2])]),
    Case("aten.transpose.int", [Q, 1, -2]), Case("aten.t.default", [In(["T", 8])]),
    Case("aten.permute.default", [Q, [0, -2, 1, 3]]),
    Case("aten.unsqueeze.default", [X, -2]), Case("aten.squeeze.dim", [X, 0]),
    Case("aten.squeeze.dims", [In([1, 1, 8, "T"]), [0, 1]]),
    Case("aten.expand.default", [X, [3, -1, -1]]), Case("aten.expand.default", [In([1, 1, 8]), [2, T(), 8]], label="size"),
    Case("aten.expand.default", [X, [2, 1, -1, 8]], label="rank"), Case("aten.repeat.default", [X, [2, 1, 3]]),
    Case("aten.repeat.default", [X, [2, 1, 1, 1]], label="rank"), Case("aten.tile.default", [X, [2, 1, 1]]),
    *[Case("aten.repeat_interleave.self_int", [Q, 3, d], label=str(d)) for d in (-1, 1, 2, None)],
    Case("aten.cat.default", [[X, Y], -1]), Case("aten.concat.default", [[X, In([1, "T", 2], "ids")], -1], label="mixed"),
    Case("aten.cat.default", [[X, Y], 1], label="tokens"), Case("aten.stack.default", [[X, Y], -1]),
    Case("aten.split.Tensor", [X, 3, -1], results=3), Case("aten.split_with_sizes.default", [X, [1, 5, 2], -1], results=3),
    Case("aten.split.sizes", [X, [1, 7], -1], results=2), Case("aten.chunk.default", [X, 3, -1], results=3),
    Case("aten.unbind.int", [X, -1], results=8), Case("aten.constant_pad_nd.default", [X, [1, 2, 0, 3], 0.5]),
    *[Case("aten.slice.Tensor", [X, *rest], label=str(i)) for i, rest in enumerate((
        [2, 0, 5], [-1, 2, MAX], [-1, -3, MAX], [2, 1, MAX, 2], [2, None, -1], [1, -1, MAX], [0, 0, MAX], [1, 0, T()]))],
    Case("aten.slice_scatter.default", [X, In([1, "T", 3]), 2, 2, 5]),
    Case("aten.slice_scatter.default", [X, Y, 2, 0, MAX], label="all"),
    Case("aten.copy.default", [X, Y]), Case("aten.flip.default", [X, [1, -1]]), Case("aten.select.int", [X, -1, -2]),
    Case("aten.index.Tensor", [Q, [None, None, In([3], "ids", True)]]),
    Case("aten.index_select.default", [X, -1, In([3], "ids", True)]),
    Case("aten.embedding.default", [In([9, 8], weight=True), IDS, 1]), Case("aten.gather.default", [X, -1, LONG]),
    Case("aten.scatter.value", [X, -1, In([1, "T", 1], "ids"), 1]),
    Case("aten.scatter.src", [X, -1, In([1, "T", 1], "ids"), In([1, "T", 1])]),
    Case("aten.scatter_add.default", [X, -1, LONG, Y]), Case("aten.one_hot.default", [IDS, 5]),
    Case("aten.tril.default", [In([1, "T", "T"])]), Case("aten.triu.default", [In([1, "T", "T"]), 1]),
    Case("aten.topk.default", [X, 3], results=2), Case("aten.topk.default", [X, 2, -1, False], results=2, label="smallest"),
    Case("aten.sort.default", [X, -1, True], results=2), Case("aten.sort.default", [X, 1], results=2, label="tokens"),
    Case("aten.sort.stable", [X], {"stable": True, "dim": -1}, results=2), Case("aten.argsort.default", [X]),
    Case("aten.argsort.stable", [X], {"stable": True, "dim": -1}),
    # tensors from sizes; X gives T
    Case("aten.full.default", [[2, 3], 0.5]), Case("aten.full.default", [[T(), 3], 1.5], label="size"),
    Case("aten.zeros.default", [[T(), 2]], {"dtype": torch.int64}), Case("aten.ones.default", [[T()]]),
    Case("aten.new_full.default", [X, [T(), 2], 3.0]), Case("aten.new_zeros.default", [X, [2]]),
    Case("aten.new_ones.default", [X, [2]]),
    Case("aten.full_like.default", [X, 2.0]), Case("aten.scalar_tensor.default", [2.5]),
    Case("aten.arange.default", [T()]), Case("aten.arange.start", [1, 5]),
    Case("aten.arange.start_step", [0, 16, 2], {"dtype": torch.float32}),
]  # fmt: skip


def build(case: Case) -> tuple[Segment, list[In]]:
    """The segment of one call; inputs first, then weights."""
    graph, made, specs = fx.Graph(), {}, []
    found = [item for item in flat([case.args, case.kwargs]) if isinstance(item, In)] or [X]
    if any(isinstance(item, T) for item in flat([case.args])) and not any("T" in item.shape for item in found):
        found.append(X)
    order = [item for item in found if not item.weight] + [item for item in found if item.weight]
    for index, item in enumerate(order):
        if id(item) not in made:
            num_before = sum(spec.weight == item.weight for spec in specs)
            node = graph.placeholder(f"{'w' if item.weight else 'x'}{num_before}")
            sample = value(item, 7, index)
            node.meta["spec"] = (tuple(item.shape), str(sample.dtype).removeprefix("torch."))
            made[id(item)] = node
            specs.append(item)
    source = next((s for s in specs if "T" in s.shape), None)

    def place(item: Any) -> Any:
        if isinstance(item, In):
            return made[id(item)]
        if isinstance(item, T):
            return graph.call_function(torch.ops.aten.sym_size.int, (made[id(source)], list(source.shape).index("T")))
        if isinstance(item, list | tuple):
            return [place(part) for part in item]
        return item

    args = tuple(place(arg) for arg in case.args)
    node = graph.call_function(find_target(case.name), args, {key: place(item) for key, item in case.kwargs.items()})
    outputs = [graph.call_function(operator.getitem, (node, i)) for i in range(case.results)] or [node]
    graph.output(tuple(outputs))
    for index, node in enumerate(node for node in graph.nodes if node.op == "call_function"):
        node.name = f"n{index}"
    nodes = graph_to_json(graph)
    num_weights = sum(spec.weight for spec in specs)
    return Segment(graph_hash(nodes), nodes, len(specs) - num_weights, num_weights, len(outputs)), specs


def flat(item: Any) -> list[Any]:
    """The leaves of nested arguments."""
    if isinstance(item, dict):
        item = list(item.values())
    return [leaf for part in item for leaf in flat(part)] if isinstance(item, list | tuple) else [item]


def traced(case: Case) -> fx.Node:
    """The node of a case with fake values, as the partitioner sees it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    segment, specs = build(case)
    module = segment.graph_module(CPU)
    with FakeTensorMode() as mode, torch.no_grad():
        fakes = iter([mode.from_tensor(value(spec, 7, 0)) for spec in specs])
        env: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(fakes)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            if node in env:
                node.meta["val"] = env[node]
    return next(node for node in module.graph.nodes if node.op == "call_function" and str(node.target) == case.name)
