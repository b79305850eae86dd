"""FX graphs as JSON: what the artifact holds, and what identifies equal graphs.

A node is {"name", "op", "target", "args", "kwargs"}; a placeholder adds "shape" and "dtype". Sizes that vary are text ("T",
"R"). Only operators (aten, camshaft, prims) and Python's own arithmetic on sizes can stand in a graph.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

_BUILTINS = {
    f"operator.{name}": getattr(operator, name)
    for name in (
        "getitem",
        "add",
        "sub",
        "mul",
        "floordiv",
        "mod",
        "neg",
        "truediv",
        "pow",
        "eq",
        "ne",
        "ge",
        "le",
        "lt",
        "gt",
    )
}
_BUILTINS |= {
    f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_ite")
}
_BUILTINS |= {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")}
_BUILTIN_NAMES = {function: name for name, function in _BUILTINS.items()}


def target_name(target: Any) -> str:
    """An operator's name: aten.linear.default or operator.getitem. Raises ValueError for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _BUILTIN_NAMES:
        return _BUILTIN_NAMES[target]
    raise ValueError(f"{target!r} is no operator that can be saved in a graph")


def find_target(name: str) -> Any:
    """The operator of a name. Raises ValueError if this version of torch does not have it."""
    if name in _BUILTINS:
        return _BUILTINS[name]
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError as error:
        raise ValueError(
            f"operator {name} does not exist in torch {torch.__version__}; build the engine again"
        ) from error


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "target"}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.SymInt):
        raise ValueError(f"a varying size ({value}) stands in the graph itself; it must come from a node")
    raise ValueError(f"{value!r} ({type(value).__name__}) cannot be saved in a graph")


def decode_value(value: Any, nodes: Mapping[str, Any], device: torch.device) -> Any:
    """An argument as it stands in a saved graph, with the values of `nodes` in the place of their names."""
    if isinstance(value, list):
        return [decode_value(item, nodes, device) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "node":
            return nodes[content]
        if kind == "device":
            return device
        if kind == "float":
            return float(content)
        if kind in ("dtype", "layout", "memory_format"):
            return getattr(torch, content)
        raise ValueError(f"graph holds an unknown value {value!r}")
    return value


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph; placeholders carry `meta["spec"]` = (shape, dtype name)."""
    nodes = []
    for node in graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "placeholder":
            shape, dtype = node.meta["spec"]
            entry |= {"shape": list(shape), "dtype": dtype}
        elif node.op == "call_function":
            entry |= {"target": target_name(node.target), "args": _encode(node.args)}
            if node.kwargs:
                entry["kwargs"] = {key: _encode(item) for key, item in node.kwargs.items()}
        else:
            entry["args"] = _encode(node.args)
        nodes.append(entry)
    return nodes


def graph_from_json(nodes: list[dict[str, Any]], device: torch.device) -> fx.GraphModule:
    """The GraphModule of saved nodes; tensors that the graph creates go to `device`."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in nodes:
        if entry["op"] == "placeholder":
            node = graph.placeholder(entry["name"])
            node.meta["spec"] = (tuple(entry["shape"]), entry["dtype"])
        elif entry["op"] == "output":
            node = graph.output(tuple(decode_value(entry["args"][0], made, device)))
        else:
            args = tuple(decode_value(entry["args"], made, device))
            kwargs = {key: decode_value(item, made, device) for key, item in entry.get("kwargs", {}).items()}
            node = graph.call_function(find_target(entry["target"]), args, kwargs)
        made[entry["name"]] = node
    return fx.GraphModule(nn.Module(), graph)


def graph_hash(nodes: list[dict[str, Any]]) -> str:
    """16 hex digits that two graphs share exactly if they are equal, names included."""
    return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()[:16]
