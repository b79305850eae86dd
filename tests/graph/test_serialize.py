"""Graphs as JSON: round trips, equal hashes for equal graphs, and what cannot be saved."""

from __future__ import annotations

import json
import math
import operator

import pytest
import torch
from camshaft.graph.serialize import find_target, graph_from_json, graph_hash, graph_to_json, target_name
from torch import fx

aten = torch.ops.aten


def _graph(value: object = 2.0, target: object = aten.mul.Tensor) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x0")
    x.meta["spec"] = (("T", 4), "float32")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    ones = graph.call_function(
        aten.full.default,
        ([size, 4], -math.inf),
        {"dtype": torch.float32, "device": torch.device("cuda"), "layout": torch.strided},
    )
    y = graph.call_function(target, (x, value))
    split = graph.call_function(aten.split_with_sizes.default, (y, [1, 3], -1))
    graph.output((graph.call_function(operator.getitem, (split, 1)), ones))
    return graph


def test_round_trip() -> None:
    nodes = graph_to_json(_graph())
    assert json.loads(json.dumps(nodes)) == nodes
    module = graph_from_json(json.loads(json.dumps(nodes)), torch.device("cpu"))
    assert graph_to_json(module.graph) == nodes
    x = torch.randn(3, 4)
    y, ones = module(x)
    assert torch.equal(y, 2 * x[:, 1:])
    assert ones.device.type == "cpu"
    assert bool((ones == -math.inf).all())


def test_hash() -> None:
    first, same, other = (graph_hash(graph_to_json(_graph(v))) for v in (2.0, 2.0, 3.0))
    assert first == same != other
    assert len(first) == 16


@pytest.mark.parametrize(
    "target", [aten.add.Tensor, torch.ops.aten.sym_size.int, operator.floordiv, math.ceil, torch.sym_max]
)
def test_targets(target: object) -> None:
    assert find_target(target_name(target)) is target


def test_python_functions_are_refused() -> None:
    with pytest.raises(ValueError, match="no operator that can be saved"):
        target_name(torch.relu)


def test_unknown_operator() -> None:
    with pytest.raises(ValueError, match="does not exist in torch"):
        find_target("aten.no_such_operator.default")


def test_values_that_cannot_be_saved() -> None:
    with pytest.raises(ValueError, match="cannot be saved in a graph"):
        graph_to_json(_graph(object()))
